"""RNGs for the initialization of modules."""

import chex
import jax
import pytest
from flax import nnx

from mister_jax import MisterE
from mister_jax.nn.rngs import make_rngs


@pytest.mark.parametrize("transform", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_parameters_are_those_of_flax_rngs(tiny_config, transform):
    def initialize(make, key):
        return nnx.to_pure_dict(nnx.state(MisterE(tiny_config, rngs=make(key)), nnx.Param))

    for key in (jax.random.key(3), 3):
        params = transform(lambda key=key: initialize(make_rngs, key))()
        chex.assert_trees_all_close(params, initialize(nnx.Rngs, key), rtol=1e-6)


def test_keys_are_those_of_flax_rngs():
    rngs, expected = make_rngs(7), nnx.Rngs(7)
    for _ in range(130):  # More than two blocks.
        chex.assert_trees_all_equal(rngs.params(), expected.params())
