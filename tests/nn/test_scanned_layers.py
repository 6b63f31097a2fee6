"""Scanned layers, compared with the same layers in a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.nn import Dropout, PerExampleRngs, ScannedLayers

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5)), jnp.float32)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(5, 5, rngs=rngs)
        self.dropout = Dropout(0.5)

    def __call__(self, x, shift, *, deterministic=True, rngs=None):
        x = x + jnp.tanh(self.linear(x)) + shift
        return self.dropout(x, deterministic=deterministic, rngs=rngs)


def make_layers(remat="none"):
    return ScannedLayers(Layer, 3, remat=remat, rngs=nnx.Rngs(0))


def run_in_a_loop(layers, x, shift):
    graph, params = nnx.split(layers.layers)
    hidden_states = []
    for index in range(layers.num_layers):
        x = nnx.merge(graph, jax.tree.map(lambda value, i=index: value[i], params))(x, shift)
        hidden_states.append(x)
    return x, jnp.stack(hidden_states)


def test_layers_run_in_order():
    layers = make_layers()
    last, hidden_states = layers(X, 0.1, output_hidden_states=True)
    expected, expected_states = run_in_a_loop(layers, X, 0.1)
    np.testing.assert_allclose(last, expected, atol=1e-6)
    np.testing.assert_allclose(hidden_states, expected_states, atol=1e-6)
    assert layers(X, 0.1)[1] is None


def test_layers_have_different_initial_parameters():
    kernel = make_layers().layers.linear.kernel[...]
    assert kernel.shape == (3, 5, 5)
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize(
    "rngs",
    [nnx.Rngs(dropout=0), PerExampleRngs(jax.random.split(jax.random.key(0)))],
    ids=["one_key", "key_per_example"],
)
def test_layers_drop_different_units(rngs):
    _, hidden_states = make_layers()(
        jnp.ones_like(X), 1.0, deterministic=False, rngs=rngs, output_hidden_states=True
    )
    dropped = np.asarray(hidden_states == 0)
    assert dropped.any() and not dropped.all()
    assert (dropped[0] != dropped[1]).any() and (dropped[:, 0] != dropped[:, 1]).any()


@pytest.mark.parametrize("remat", ["full", "dots", "mlp"])
def test_remat_does_not_change_gradients(remat):
    def gradient(remat):
        graph, params = nnx.split(make_layers(remat))

        def loss(params):
            return jnp.sum(nnx.merge(graph, params)(X, 0.1)[0] ** 2)

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for value, expected in zip(gradient(remat), gradient("none"), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_invalid_options_raise():
    with pytest.raises(ValueError, match="num_layers=0"):
        ScannedLayers(Layer, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="allowed: none, full, dots"):
        ScannedLayers(Layer, 2, remat="half", rngs=nnx.Rngs(0))
