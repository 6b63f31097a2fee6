"""The stack of layers against the same layers in a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.nn.dropout import Dropout, PerExampleRngs
from mister_jax.nn.scanned_layers import ScannedLayers


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(5, 5, rngs=rngs)
        self.dropout = Dropout(0.5)

    def __call__(self, x, shift, *, deterministic=True, rngs=None):
        x = x + jnp.tanh(self.linear(x)) + shift
        return self.dropout(x, deterministic=deterministic, rngs=rngs)


def make(remat="none"):
    return ScannedLayers(Layer, 3, remat=remat, rngs=nnx.Rngs(0))


def in_a_loop(stack, x, shift):
    graph, params = nnx.split(stack.layers)
    given = []
    for index in range(stack.num_layers):
        x = nnx.merge(graph, jax.tree.map(lambda value, i=index: value[i], params))(x, shift)
        given.append(x)
    return x, jnp.stack(given)


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5)), jnp.float32)


def test_runs_layers_in_order():
    stack = make()
    last, given = stack(X, 0.1, output_hidden_states=True)
    expected, all_expected = in_a_loop(stack, X, 0.1)
    np.testing.assert_allclose(last, expected, atol=1e-6)
    np.testing.assert_allclose(given, all_expected, atol=1e-6)
    assert stack(X, 0.1)[1] is None


def test_layers_start_with_different_parameters():
    kernel = make().layers.linear.kernel[...]
    assert kernel.shape == (3, 5, 5)
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("keys", ["one", "dialogues"])
def test_each_layer_drops_units_of_its_own(keys):
    stack = make()
    source = (
        nnx.Rngs(dropout=0)
        if keys == "one"
        else PerExampleRngs(jax.random.split(jax.random.key(0)))
    )
    _, given = stack(
        jnp.ones_like(X), 1.0, deterministic=False, rngs=source, output_hidden_states=True
    )
    dropped = np.asarray(given == 0)
    assert dropped.any() and not dropped.all()
    assert (dropped[0] != dropped[1]).any() and (dropped[:, 0] != dropped[:, 1]).any()


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat):
    def gradient(remat):
        graph, params = nnx.split(make(remat))

        def loss(params):
            return jnp.sum(nnx.merge(graph, params)(X, 0.1)[0] ** 2)

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for value, expected in zip(gradient(remat), gradient("none"), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="0 layers"):
        ScannedLayers(Layer, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="allowed: none, full, dots"):
        ScannedLayers(Layer, 2, remat="half", rngs=nnx.Rngs(0))
