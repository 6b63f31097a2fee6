"""RNGs for the initialization of modules."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mister_jax import MisterE
from mister_jax.nn import StackedModules
from mister_jax.nn.rngs import make_rngs

transforms = pytest.mark.parametrize(
    "transform", [lambda function: function, jax.jit], ids=["eager", "jit"]
)


@transforms
def test_parameters_are_those_of_flax_rngs(tiny_config, transform):
    def initialize(make, key):
        return nnx.to_pure_dict(nnx.state(MisterE(tiny_config, rngs=make(key)), nnx.Param))

    for key in (jax.random.key(3), 3):
        params = transform(lambda key=key: initialize(make_rngs, key))()
        chex.assert_trees_all_close(params, initialize(nnx.Rngs, key), rtol=1e-6)


@transforms
def test_all_streams_return_the_keys_of_flax_rngs(transform):
    def draw(make):
        rngs = make(7)
        keys = [rngs[name]() for name in ("params", "dropout", "params")]
        keys += [rngs() for _ in range(130)]  # `make_rngs` computes blocks of 64 keys.
        keys += [rngs.fork().params(), rngs.params.split(3).key.get_value()[2], rngs.params()]
        graph, state = nnx.split(rngs)
        keys += [nnx.merge(graph, state).params(), rngs.params()]
        return jnp.stack(keys)

    chex.assert_trees_all_equal(transform(lambda: draw(make_rngs))(), draw(nnx.Rngs))


def test_streams_continue_inside_transformations():
    rngs, expected = make_rngs(0), nnx.Rngs(0)
    draw = nnx.jit(lambda rngs: (rngs.params(), rngs.params()))
    for _ in range(2):
        chex.assert_trees_all_equal(draw(rngs), draw(expected))
        chex.assert_trees_all_equal(rngs.params(), expected.params())


def test_stacked_modules_of_users_can_use_all_methods_of_rngs():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.scale = nnx.Param(jax.random.normal(rngs.fork()(), (4,)))

        def __call__(self, x, *, deterministic, rngs):
            return self.dropout(self.scale * x, deterministic=deterministic)

    stacked = StackedModules(lambda rngs: Layer(rngs), 2, rngs=nnx.Rngs(0))
    assert jnp.unique(stacked.stack.scale.get_value()).size == 8
