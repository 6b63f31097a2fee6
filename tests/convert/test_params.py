"""Loading and saving of parameters by a key table."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mister_jax.convert.key_table import Source, layer_names
from mister_jax.convert.params import load_params, save_params
from mister_jax.convert.safetensors import Checkpoint, save_tensors
from mister_jax.errors import InputError
from mister_jax.nn import ScannedLayers
from mister_jax.nn.lora import LoRAConfig, LoRALinear, add_lora
from mister_jax.parallel.sharding import data_mesh, shardings

pytestmark = pytest.mark.devices

LAYERS = 4
TABLE = {
    "layers/layers/kernel": Source(layer_names("layer.{}.weight", LAYERS), (1, 0), stacked=True),
    "layers/layers/bias": Source(layer_names("layer.{}.bias", LAYERS), stacked=True),
    "head/kernel": Source(("head.weight",), (1, 0)),
    "head/bias": Source(
        ("head.first", "head.second"),
        combine=np.concatenate,
        split=lambda bias: np.split(bias, 2),
    ),
}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = ScannedLayers(lambda rngs: LoRALinear(8, 16, rngs=rngs), LAYERS, rngs=rngs)
        self.head = nnx.Linear(16, 24, rngs=rngs)


class Spy:
    """Tensor that records the number of bytes read and the size of the largest read."""

    read = largest = 0

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, index):
        part = self.array[index].copy()
        Spy.read += part.nbytes
        Spy.largest = max(Spy.largest, part.nbytes)
        return part


def abstract():
    return nnx.eval_shape(lambda: Model(nnx.Rngs(0)))


@nnx.jit
def concrete():
    return Model(nnx.Rngs(0))


def weights(dtype=np.float32):
    random = np.random.default_rng(0)
    shapes = {"head.weight": (24, 16), "head.first": (12,), "head.second": (12,)}
    for layer in range(LAYERS):
        shapes |= {f"layer.{layer}.weight": (16, 8), f"layer.{layer}.bias": (16,)}
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def assert_loaded(module, tensors):
    layers = module.layers.layers
    kernels, biases = np.asarray(layers.kernel[...]), np.asarray(layers.bias[...])
    for layer in range(LAYERS):
        np.testing.assert_array_equal(kernels[layer], tensors[f"layer.{layer}.weight"].T)
        np.testing.assert_array_equal(biases[layer], tensors[f"layer.{layer}.bias"])
    np.testing.assert_array_equal(module.head.kernel[...], tensors["head.weight"].T)
    np.testing.assert_array_equal(
        module.head.bias[...], np.concatenate([tensors["head.first"], tensors["head.second"]])
    )


@pytest.mark.parametrize("make", [abstract, concrete])
def test_tensors_are_loaded_into_the_parameters_of_the_table(make):
    assert_loaded(load_params(make(), TABLE, weights()), weights())


def test_saving_restores_the_loaded_tensors():
    saved = save_params(load_params(abstract(), TABLE, weights()), TABLE)
    assert set(saved) == set(weights())
    for name, value in weights().items():
        assert saved[name].shape == value.shape and saved[name].dtype == value.dtype
        np.testing.assert_array_equal(saved[name][...], value)
        np.testing.assert_array_equal(saved[name][1:3], value[1:3])


def test_names_can_have_a_prefix():
    prefixed = {f"model.{name}": value for name, value in weights().items()}
    module = load_params(abstract(), TABLE, prefixed, prefix="model.")
    assert_loaded(module, weights())
    assert set(save_params(module, TABLE, prefix="model.")) == set(prefixed)


def test_tensors_are_cast_to_the_parameter_dtype():
    half_precision = weights(jnp.bfloat16)
    module = load_params(abstract(), TABLE, half_precision)
    assert module.layers.layers.kernel.dtype == jnp.float32
    assert_loaded(module, half_precision)
    module = load_params(abstract(), TABLE, weights(), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("bfloat16")}


def test_each_device_holds_only_its_shard():
    mesh = data_mesh(4)
    rules = [("layers/kernel$", (None, "data", "model")), ("head/kernel$", ("model", "data"))]
    module = abstract()
    placed = shardings(nnx.to_pure_dict(nnx.state(module, nnx.Param)), mesh, rules)
    load_params(module, TABLE, weights(), shardings=placed)
    assert_loaded(module, weights())
    kernel = module.layers.layers.kernel[...]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "data", "model")), 3)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(LAYERS, 4, 4)}
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8
    head = module.head.kernel[...]
    assert {shard.data.shape for shard in head.addressable_shards} == {(4, 12)}
    assert module.head.bias[...].sharding.is_fully_replicated


@pytest.mark.parametrize("spec", [P(None, "data", "model"), P("data"), P()])
def test_stacked_parameters_can_be_sharded_along_any_axis(spec):
    sharding = NamedSharding(data_mesh(4), spec)
    replicated = NamedSharding(sharding.mesh, P())
    placed = jax.tree.map(
        lambda leaf: sharding if leaf.shape == (LAYERS, 8, 16) else replicated,
        nnx.to_pure_dict(nnx.state(abstract(), nnx.Param)),
    )
    module = load_params(abstract(), TABLE, weights(), shardings=placed)
    assert_loaded(module, weights())
    assert module.layers.layers.kernel[...].sharding.is_equivalent_to(sharding, 3)


def test_each_byte_is_read_once_and_one_tensor_at_a_time():
    tensors = weights()
    replicated = NamedSharding(data_mesh(2), P())
    for sharding in (None, replicated):
        Spy.read = Spy.largest = 0
        spies = {name: Spy(value) for name, value in tensors.items()}
        load_params(abstract(), TABLE, spies, shardings=sharding)
        assert Spy.read == sum(value.nbytes for value in tensors.values())
        assert Spy.largest == max(value.nbytes for value in tensors.values())


SPECS = {"one": None, "sharded": P("data", "model"), "replicated": P()}


@pytest.mark.parametrize("placement", SPECS)
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("axes", [None, (1, 0)])
@pytest.mark.parametrize("layers", [None, 3])
def test_host_memory_stays_below_twice_the_largest_tensor(
    tmp_path, layers, axes, dtypes, placement
):
    file_dtype, param_dtype = map(jnp.dtype, dtypes)
    tensors = {
        f"{layer}.weight": np.full((1024, 512), layer + 1, file_dtype)
        for layer in range(layers or 1)
    }
    save_tensors(tmp_path, tensors)
    names = layer_names("{}.weight", len(tensors))
    table = {"kernel": Source(names, axes, stacked=layers is not None)}
    shape = (1024, 512) if axes is None else (512, 1024)
    shape = shape if layers is None else (layers, *shape)

    def load():
        module = nnx.eval_shape(lambda: nnx.Dict(kernel=nnx.Param(jnp.zeros(shape, param_dtype))))
        spec = SPECS[placement]
        if spec is not None and layers is not None:
            spec = P(None, *spec)
        sharding = None if spec is None else NamedSharding(data_mesh(4), spec)
        return load_params(module, table, Checkpoint.open(tmp_path), shardings=sharding)

    load()  # The first call also allocates memory for imports and compiled programs.
    tracemalloc.start()
    module = load()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # `tracemalloc` does not trace the memory of JAX. Therefore, only one copy of one tensor may be
    # traced, even if the result stacks three tensors.
    assert peak < 1.2 * 1024 * 512 * max(file_dtype.itemsize, param_dtype.itemsize)
    for layer, kernel in enumerate(np.asarray(module.kernel[...]).reshape(-1, *shape[-2:])):
        assert (kernel == layer + 1).all()


def test_sharded_tensors_are_read_in_slices():
    mesh = data_mesh(4)
    placed = jax.tree.map(
        lambda leaf: NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "model")),
        nnx.to_pure_dict(nnx.state(abstract(), nnx.Param)),
    )
    Spy.read = Spy.largest = 0
    spies = {name: Spy(value) for name, value in weights().items()}
    load_params(abstract(), TABLE, spies, shardings=placed)
    assert Spy.largest == weights()["head.weight"].nbytes // 4


def test_concrete_parameters_keep_their_sharding():
    module = concrete()
    sharding = NamedSharding(data_mesh(), P(None, "data"))
    kernel = jax.device_put(module.layers.layers.kernel[...], sharding)
    module.layers.layers.kernel.set_value(kernel)
    load_params(module, TABLE, weights())
    assert module.layers.layers.kernel[...].sharding.is_equivalent_to(sharding, 3)


def test_errors_name_only_the_first_of_many_tensors():
    table = {
        f"{name}/kernel": Source(layer_names(f"{name}.{{}}.weight", 9), stacked=True)
        for name in "abcde"
    }

    def error_message(tensors):
        module = nnx.Dict({name: nnx.Dict(kernel=nnx.Param(jnp.zeros((9, 2)))) for name in "abcde"})
        with pytest.raises(InputError) as error:
            load_params(module, table, tensors)
        return str(error.value)

    others = {f"x{number}.{layer}": np.zeros(2) for number in range(9) for layer in range(9)}
    assert error_message(others) == (
        "weights: weights of another architecture: 45 missing: a.{0,1,...,8}.weight, "
        "b.{0,1,...,8}.weight, c.{0,1,...,8}.weight, ...; 81 unexpected: x0.0, x0.1, x0.2, ..."
    )
    complete = {name: np.zeros(2) for source in table.values() for name in source.names}
    del complete["a.0.weight"]
    assert error_message({**complete, **others}).startswith(
        "weights: tensors do not match the model: 1 missing: a.0.we"
    )
    assert error_message({}).startswith("weights: tensors do not match the model: 45 missing")


def test_low_rank_paths_are_not_changed():
    lora = LoRAConfig(rank=2, alpha=4, targets=("layers",))
    module = nnx.jit(lambda: add_lora(Model(nnx.Rngs(0)), lora, rngs=nnx.Rngs(1)))()
    before = np.asarray(module.layers.layers.lora_a[...])
    assert_loaded(load_params(module, TABLE, weights()), weights())
    np.testing.assert_array_equal(module.layers.layers.lora_a[...], before)
    assert set(save_params(module, TABLE)) == set(weights())


def test_stacked_parameters_can_be_combined_layer_by_layer():
    names = tuple(f"{layer}.{part}" for layer in range(2) for part in "ab")
    source = Source(
        names, (1, 0), stacked=True, combine=np.hstack, split=lambda x: np.split(x, 2, 1)
    )
    module = nnx.Dict(kernel=nnx.Param(jnp.zeros((2, 3, 8))))
    tensors = {name: np.full((4, 3), float(index)) for index, name in enumerate(names)}
    load_params(module, {"kernel": source}, tensors)
    np.testing.assert_array_equal(module.kernel[...][:, 0, ::4], [[0, 1], [2, 3]])
    saved = save_params(module, {"kernel": source})
    for name in names:
        np.testing.assert_array_equal(saved[name][...], tensors[name])


def test_one_error_names_all_mismatches_and_nothing_changes():
    tensors = weights()
    del tensors["layer.0.bias"], tensors["head.weight"]
    tensors["layer.1.weight"] = np.zeros((8, 16))
    tensors["layer.2.weight"] = np.zeros((8, 16))
    tensors["head.first"] = np.zeros(13)
    tensors["pooler.weight"] = tensors["extra.0.bias"] = tensors["extra.1.bias"] = np.zeros(2)
    module = abstract()
    with pytest.raises(InputError) as error:
        load_params(module, TABLE, tensors, ignore=(r"^pooler\.",))
    message = str(error.value)
    assert "\n" not in message
    assert "2 missing: head.weight, layer.0.bias;" in message
    assert "2 unexpected: extra.{0,1}.bias;" in message
    assert "3 mismatched" in message
    assert "layer.{1,2}.weight [8, 16] instead of [16, 8]" in message
    assert "head.first+head.second [13]+[12] instead of shapes that combine to [24]" in message
    assert isinstance(module.head.kernel.get_value(), jax.ShapeDtypeStruct)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["layer.2.weight", "head.second"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_rejected(dtype, name, value):
    tensors = {key: tensor.astype(dtype) for key, tensor in weights().items()}
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = value
    with pytest.raises(InputError, match=rf"^weights: tensor .*{name} has NaN or infinite values"):
        load_params(abstract(), TABLE, tensors)


def test_weights_that_overflow_the_parameter_dtype_are_rejected():
    tensors = weights() | {"head.weight": np.full_like(weights()["head.weight"], 1e6)}
    with pytest.raises(InputError, match=r"head\.weight has NaN or infinite values as float16"):
        load_params(abstract(), TABLE, tensors, dtype=jnp.float16)


def test_a_table_that_does_not_fit_the_module_raises_value_error():
    incomplete = {path: source for path, source in TABLE.items() if path != "head/bias"}
    with pytest.raises(ValueError, match=r"without a source \['head/bias'\]"):
        load_params(abstract(), incomplete, weights())
    with pytest.raises(ValueError, match=r"without a parameter \['tail'\]"):
        save_params(concrete(), {**TABLE, "tail": Source(("tail",))})
    too_few_names = {**TABLE, "layers/layers/bias": Source(("layer.0.bias",), stacked=True)}
    with pytest.raises(ValueError, match=r"1 names .* for 4 layers"):
        load_params(abstract(), too_few_names, weights())
    with pytest.raises(ValueError, match="no sharding for the parameters"):
        load_params(abstract(), TABLE, weights(), shardings={})
    with pytest.raises(ValueError, match="several with stacked or combine"):
        Source(("a", "b"))


def test_a_combined_parameter_without_split_cannot_be_saved():
    table = {**TABLE, "head/bias": Source(("head.first", "head.second"), combine=np.concatenate)}
    module = load_params(abstract(), table, weights())
    with pytest.raises(ValueError, match=r"head/bias is combined from .* cannot be split"):
        save_params(module, table)
