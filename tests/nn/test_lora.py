"""LoRA layers with float32, bfloat16 and int8 kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mister_jax.nn import ScannedLayers
from mister_jax.nn.lora import (
    LoRAConfig,
    LoRALinear,
    QuantizedParam,
    add_lora,
    dequantize,
    merge_lora,
    quantize,
)

CONFIG = LoRAConfig(rank=2, alpha=6, targets=("first", "block/second"))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.first = LoRALinear(5, 7, rngs=rngs)
        self.second = LoRALinear(7, 5, use_bias=False, rngs=rngs)

    def __call__(self, x, *, deterministic=True, rngs=None):
        options = {"deterministic": deterministic, "rngs": rngs}
        return x + self.second(jnp.tanh(self.first(x, **options)), **options)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.block = Block(rngs)
        self.second = LoRALinear(5, 5, rngs=rngs)

    def __call__(self, x, *, deterministic=True, rngs=None):
        x = self.block(x, deterministic=deterministic, rngs=rngs)
        return self.second(x, deterministic=deterministic, rngs=rngs)


class Model(nnx.Module):
    """Layers inside and outside of `ScannedLayers`."""

    def __init__(self, rngs):
        self.stack = ScannedLayers(Layer, 3, rngs=rngs)
        self.last = Block(rngs)

    def __call__(self, x, **options):
        return self.last(self.stack(x, **options)[0], **options)


@nnx.jit
def build():
    return add_lora(Model(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))


@functools.cache
def parts():
    return nnx.split(build())


def untrained(dtype=jnp.float32):
    """Returns the model with initial low-rank paths and base kernels in `dtype`."""

    def copy(path, leaf):
        return leaf.astype(jnp.float32 if "lora" in str(path) else dtype)

    graph, state = parts()
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(copy, state))


def trained(dtype=jnp.float32):
    """Returns the model with random low-rank paths, as after training."""
    return randomize(untrained(dtype))


def randomize(model):
    """Sets the low-rank paths to random values, as after training."""
    leaves, structure = jax.tree.flatten(nnx.state(model, nnx.LoRAParam))
    random = np.random.default_rng(2)
    values = [random.normal(0, 0.3, leaf.shape).astype(leaf.dtype) for leaf in leaves]
    nnx.update(model, jax.tree.unflatten(structure, values))
    return model


@nnx.jit
def run(model, x):
    return model(x)


X = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)


def flat_values(model, kind):
    state = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in state}


def single_layer(lora=None, **options):
    """Returns a layer that was created as the attribute `first` of a module."""

    @nnx.jit
    def create():
        module = nnx.Module()
        module.first = LoRALinear(5, 7, rngs=nnx.Rngs(0), **options)
        if lora is not None:
            add_lora(module, lora, rngs=nnx.Rngs(1))
        return module

    return create().first


def test_output_adds_the_scaled_low_rank_product():
    base = jax.jit(single_layer())(X)
    layer = single_layer(LoRAConfig(rank=3, alpha=12, targets=("first",)))
    np.testing.assert_array_equal(jax.jit(layer)(X), base)  # the second matrix starts at zero
    layer.lora_b.set_value(np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32))
    expected = base + 4 * X @ np.asarray(layer.lora_a) @ np.asarray(layer.lora_b)
    run = jax.jit(lambda x: layer(x))  # `jax.jit(layer)` would reuse the previous parameters.
    np.testing.assert_allclose(run(X), expected, atol=1e-5)


def test_only_target_layers_get_a_path_and_scanned_layers_one_each():
    lora = flat_values(trained(), nnx.LoRAParam)
    assert {path: value.shape for path, value in lora.items()} == {
        "last/first/lora_a": (5, 2),
        "last/first/lora_b": (2, 7),
        "stack/layers/block/first/lora_a": (3, 5, 2),
        "stack/layers/block/first/lora_b": (3, 2, 7),
        "stack/layers/block/second/lora_a": (3, 7, 2),
        "stack/layers/block/second/lora_b": (3, 2, 5),
    }


def test_lora_a_is_uniform_and_lora_b_is_zero_initially():
    model = nnx.Module()
    model.first = LoRALinear(100, 3, rngs=nnx.Rngs(0))
    add_lora(model, LoRAConfig(rank=50, alpha=1, targets=("first",)), rngs=nnx.Rngs(1))
    first = np.asarray(model.first.lora_a[...])
    assert np.abs(first).max() <= 0.1
    np.testing.assert_allclose(first.std(), 0.1 / np.sqrt(3), rtol=0.02)
    assert not model.first.lora_b[...].any()


@pytest.mark.parametrize("int8", [False, True])
def test_merging_does_not_change_outputs(int8):
    model = trained()
    if int8:
        quantize(model)
    expected = run(model, X)
    assert merge_lora(model) is model
    np.testing.assert_allclose(run(model, X), expected, atol=1e-5)
    assert not flat_values(model, nnx.LoRAParam)
    # Layers without a path are still quantized.
    quantized = {"last/second", "stack/layers/second"} if int8 else set()
    assert {path.rpartition("/")[0] for path in flat_values(model, QuantizedParam)} == quantized


def test_dequantizing_does_not_change_outputs():
    model = quantize(trained())
    expected = run(model, X)
    assert dequantize(model) is model
    np.testing.assert_allclose(run(model, X), expected, atol=1e-5)
    assert not flat_values(model, QuantizedParam)
    assert flat_values(model, nnx.LoRAParam)
    half = dequantize(quantize(single_layer(param_dtype=jnp.bfloat16)))
    assert half.kernel.dtype == jnp.bfloat16


def test_merging_keeps_the_base_dtype():
    layer = single_layer(LoRAConfig(rank=3, alpha=12, targets=("first",)), param_dtype=jnp.bfloat16)
    assert merge_lora(layer).kernel.dtype == jnp.bfloat16


def test_int8_weights_and_outputs_are_close_to_float():
    model = trained()
    expected, floats = run(model, X), flat_values(model, nnx.Param)
    quantize(model)
    int8 = flat_values(model, QuantizedParam)
    for path, kernel in floats.items():
        if path.endswith("kernel"):
            assert int8[path].dtype == np.int8
            dequantized = int8[path] * int8[f"{path}_scale"][..., None, :]
            bound = np.abs(kernel).max(-2, keepdims=True) / 254
            assert (np.abs(dequantized - kernel) <= bound * 1.001).all()
    np.testing.assert_allclose(run(model, X), expected, atol=0.05)
    assert not np.array_equal(run(model, X), expected)


def test_int8_represents_a_column_of_zeros():
    layer = LoRALinear(5, 7, rngs=nnx.Rngs(0))
    layer.kernel.set_value(layer.kernel[...].at[:, 3].set(0))
    np.testing.assert_array_equal(quantize(layer)(X)[..., 3], 0)


def test_quantizing_twice_changes_nothing():
    model = quantize(trained())
    expected = flat_values(model, QuantizedParam)
    quantize(model)
    jax.tree.map(np.testing.assert_array_equal, flat_values(model, QuantizedParam), expected)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8"])
def test_training_the_paths_does_not_change_the_base(base):
    model = trained(jnp.bfloat16 if base == "bfloat16" else jnp.float32)
    if base == "int8":
        quantize(model)
    frozen, lora = flat_values(model, nnx.Not(nnx.LoRAParam)), flat_values(model, nnx.LoRAParam)
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return (model(X) ** 2).mean()

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, gradients = nnx.value_and_grad(loss, argnums=wrt)(model)
        optimizer.update(model, gradients)
        return value

    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[2] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, flat_values(model, nnx.Not(nnx.LoRAParam)), frozen)
    for path, value in flat_values(model, nnx.LoRAParam).items():
        assert value.dtype == np.float32
        assert not np.array_equal(value, lora[path])


def test_int8_kernels_have_no_gradient():
    gradients = nnx.grad(lambda layer: (layer(X) ** 2).sum())(quantize(single_layer()))
    assert [path for path, _ in nnx.to_flat_state(gradients)] == [("bias",)]


def test_outputs_have_the_compute_dtype():
    lora = LoRAConfig(rank=3, alpha=12, targets=("first",))
    expected = randomize(single_layer(lora))(X)
    layer = randomize(single_layer(lora, dtype=jnp.bfloat16))
    for module in (layer, quantize(layer)):
        output = module(X)
        assert output.dtype == jnp.bfloat16
        np.testing.assert_allclose(output.astype(np.float32), expected, atol=0.05)


def test_dropout_is_applied_to_the_low_rank_path_in_training_only():
    lora = LoRAConfig(rank=2, alpha=6, dropout=0.5, targets=CONFIG.targets)
    model, expected = randomize(add_lora(trained(), lora, rngs=nnx.Rngs(1))), run(trained(), X)
    np.testing.assert_allclose(run(model, X), expected, atol=1e-6)
    dropped = model(X, deterministic=False, rngs=nnx.Rngs(dropout=0))
    assert not np.allclose(dropped, expected, atol=0.01)
    with pytest.raises(ValueError, match="needs rngs"):
        model(X, deterministic=False)
    initial = add_lora(untrained(), lora, rngs=nnx.Rngs(1))
    dropped = initial(X, deterministic=False, rngs=nnx.Rngs(dropout=0))
    np.testing.assert_allclose(dropped, run(untrained(), X), atol=1e-6)


def test_add_lora_and_quantize_work_on_abstract_modules():
    shapes = nnx.eval_shape(lambda: quantize(build()))
    kernel = shapes.stack.layers.block.first.kernel
    assert (kernel.shape, kernel.dtype) == ((3, 5, 7), jnp.int8)
    add_lora(shapes, CONFIG, rngs=nnx.Rngs(1))
    expected = flat_values(untrained(), nnx.LoRAParam)
    jax.tree.map(np.testing.assert_array_equal, flat_values(shapes, nnx.LoRAParam), expected)


def test_unknown_targets_raise_an_error_that_names_them():
    with pytest.raises(
        ValueError, match=r"targets \['third', 'econd'\].*allowed: \['first', 'second'\]"
    ):
        add_lora(trained(), LoRAConfig(2, 1, targets=("first", "third", "econd")), rngs=nnx.Rngs(0))


def test_error_names_the_layer_type_if_a_module_has_no_adaptable_layers():
    class Plain(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    message = (
        r"\['first'\]: no such layers of type mister_jax\.nn\.lora\.LoRALinear; Plain has none"
    )
    with pytest.raises(ValueError, match=message):
        add_lora(Plain(), LoRAConfig(2, 1, targets=("first",)), rngs=nnx.Rngs(0))


def test_a_leading_slash_marks_a_full_path():
    model = add_lora(trained(), LoRAConfig(2, 1, targets=("/last/first",)), rngs=nnx.Rngs(1))
    assert model.last.first.lora.targets == ("/last/first",)
    with pytest.raises(ValueError, match=r"targets \['/first'\]"):
        add_lora(trained(), LoRAConfig(2, 1, targets=("/first",)), rngs=nnx.Rngs(1))


def test_rslora_divides_by_the_root_of_the_rank():
    plain = LoRAConfig(rank=4, alpha=6, targets=("first",))
    rslora = dataclasses.replace(plain, use_rslora=True)
    assert (plain.scale, rslora.scale) == (1.5, 3.0)
    base, expected = single_layer()(X), randomize(single_layer(plain))(X)
    output = randomize(single_layer(rslora))(X)
    np.testing.assert_allclose(output - base, 2 * (expected - base), atol=1e-5)


def test_layers_can_opt_out_of_quantization():
    layer = quantize(LoRALinear(2, 2, quantizable=False, rngs=nnx.Rngs(0)))
    assert layer.kernel_scale is None and layer.kernel.dtype == jnp.float32


@pytest.mark.parametrize(
    "changes",
    [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": ()}, {"targets": "query"}],
)
def test_invalid_configs_raise_an_error_that_names_the_field(changes):
    (field,) = changes
    with pytest.raises(ValueError, match=f"LoRAConfig.{field}="):
        LoRAConfig(**{"rank": 2, "alpha": 4, **changes})
