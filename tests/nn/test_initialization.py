"""Creation of modules in one program, and initialization with the distributions of PyTorch."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax import MisterE, MisterEConfig
from mister_jax.nn import (
    CoAttentionLayer,
    ParallelConvolution,
    StackedModules,
    initialize_like_torch,
)
from mister_jax.nn.initialization import create_in_one_program
from mister_jax.nn.rngs import make_rngs


def assert_uniform(values, fan_in):
    """Checks the range and the standard deviation of uniform values."""
    values, bound = np.asarray(values), 1 / math.sqrt(fan_in)
    assert np.abs(values).max() <= bound
    assert np.std(values) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_weights_and_biases_are_uniform_with_the_bounds_of_pytorch():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(50, 300, rngs=rngs)
            self.without_bias = nnx.Linear(20, 300, use_bias=False, rngs=rngs)
            self.convolution = ParallelConvolution(30, 300, (1, 3), rngs=rngs)

    model = Model(nnx.Rngs(0))
    initialize_like_torch(model, rngs=nnx.Rngs(1))
    assert_uniform(model.linear.kernel, 50)
    assert_uniform(model.linear.bias, 50)
    assert_uniform(model.without_bias.kernel, 20)
    for kernel, bias, fan_in in zip(
        model.convolution.kernels, model.convolution.biases, (30, 90), strict=True
    ):
        assert_uniform(kernel, fan_in)
        assert_uniform(bias, fan_in)


def test_projections_of_attention_have_the_variance_of_two_layers_in_a_row():
    dim, attention_dim = 60, 40
    layer = CoAttentionLayer(dim, attention_dim=attention_dim, num_heads=2, rngs=nnx.Rngs(0))
    initialize_like_torch(layer, rngs=nnx.Rngs(1))
    for stacked in (layer.cross_attention, layer.self_attention):
        attention = stacked.stack.attention
        # Each entry of a kernel is a sum of `attention_dim` products of two uniform values. A
        # uniform value between -a and a has variance a^2 / 3.
        in_variance = attention_dim * (1 / dim / 3) * (1.5 / attention_dim / 3)
        out_variance = attention_dim * (1 / attention_dim / 3) ** 2
        kernels = {
            "query": (attention.query.kernel, in_variance),
            "key_value": (attention.key_value.kernel, in_variance),
            "out": (attention.out.kernel, out_variance),
        }
        for name, (kernel, variance) in kernels.items():
            assert np.std(kernel) == pytest.approx(math.sqrt(variance), rel=0.1), name
        assert np.std(attention.value_bias) > 0
        # The stacked modules differ.
        assert not np.allclose(attention.query.kernel[0], attention.query.kernel[1])


@pytest.mark.parametrize("initialization", ["torch", "lecun"])
def test_the_config_chooses_the_distribution_of_all_layers(initialization):
    config = MisterEConfig.small(speech_dim=40, text_dim=30, initialization=initialization)
    model = MisterE(config, rngs=nnx.Rngs(0))
    variance = 3 if initialization == "lecun" else 1
    for layer in (model.speech.skip, model.fusion.text_in, model.fusion.projection):
        expected = math.sqrt(variance / 3 / layer.kernel.shape[0])
        assert np.std(layer.kernel) == pytest.approx(expected, rel=0.1)
        assert (np.std(layer.bias) > 0) == (initialization == "torch")


@pytest.mark.parametrize("make", [nnx.Rngs, make_rngs])
def test_one_program_gives_the_same_parameters_and_counts(make):
    def create(rngs):
        return nnx.Dict(
            linear=nnx.Linear(3, 4, rngs=rngs),
            convolution=ParallelConvolution(3, 4, (1, 3), rngs=rngs),
            dropout=nnx.Dropout(0.5, rngs=rngs),
        )

    key = jax.random.key(1)
    rngs, expected_rngs = make(key), make(key)
    created, expected = create_in_one_program(create, rngs), create(expected_rngs)
    chex.assert_trees_all_close(nnx.state(created, nnx.Param), nnx.state(expected, nnx.Param))
    # The parameters may differ by rounding, but the keys must be equal.
    assert created.dropout.rngs() == expected.dropout.rngs()
    assert rngs() == expected_rngs()
    assert rngs.default.count[...] == expected_rngs.default.count[...]


def test_modules_can_be_created_under_vmap():
    def create(rngs):
        return create_in_one_program(lambda rngs: nnx.Dict(a=nnx.Linear(3, 4, rngs=rngs)), rngs)

    keys = jax.random.split(jax.random.key(0), 2)
    models = nnx.vmap(lambda key: create(nnx.Rngs(key)))(keys)
    for index, key in enumerate(keys):
        model = jax.tree.map(lambda value, index=index: value[index], nnx.state(models))
        chex.assert_trees_all_close(model, nnx.state(create(nnx.Rngs(key))), rtol=1e-6)


def test_streams_of_rngs_stay_separate():
    rngs = nnx.Rngs(params=1, default=2)
    create_in_one_program(lambda rngs: nnx.Dict(linear=nnx.Linear(3, 4, rngs=rngs)), rngs)
    assert rngs.params.count[...] == 2
    assert rngs.default.count[...] == 0


def test_creating_a_model_compiles_its_operations_as_one_program(caplog):
    config = MisterEConfig.small(speech_dim=17, text_dim=19)
    with jax.log_compiles():
        model = MisterE(config, rngs=nnx.Rngs(0))
    compiled = [record for record in caplog.records if "Finished XLA comp" in record.message]
    assert 1 <= len(compiled) <= 4  # The other programs create the key.
    traced = nnx.jit(lambda: MisterE(config, rngs=nnx.Rngs(0)))()
    chex.assert_trees_all_close(nnx.state(model), nnx.state(traced), rtol=1e-5)


def test_modules_can_be_created_without_jit():
    def create(rngs):
        return nnx.Dict(linear=nnx.Linear(3, 4, rngs=rngs))

    with jax.disable_jit():
        created = create_in_one_program(create, nnx.Rngs(0))
    chex.assert_trees_all_close(nnx.state(created), nnx.state(create(nnx.Rngs(0))))


def test_models_of_different_seeds_differ_under_vmap():
    config = MisterEConfig.small(speech_dim=4, text_dim=3)
    create = nnx.jit(nnx.vmap(lambda key: MisterE(config, rngs=make_rngs(key))))
    models = create(jax.random.split(jax.random.key(0), 2))
    for path, value in jax.tree.leaves_with_path(nnx.state(models, nnx.Param)):
        name = jax.tree_util.keystr(path)
        assert ("norm" in name) == np.allclose(value[0], value[1]), name


def test_stacked_convolutions_have_the_bound_of_one_convolution():
    stacked = StackedModules(
        lambda rngs: ParallelConvolution(30, 300, (1, 3), rngs=rngs), 4, rngs=nnx.Rngs(0)
    )
    initialize_like_torch(stacked, rngs=nnx.Rngs(1))
    for kernel, fan_in in zip(stacked.stack.kernels, (30, 90), strict=True):
        assert_uniform(kernel, fan_in)


def test_parameters_keep_their_dtype():
    config = MisterEConfig.small(speech_dim=4, text_dim=3, param_dtype="bfloat16")
    params = nnx.state(MisterE(config, rngs=nnx.Rngs(0)), nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
