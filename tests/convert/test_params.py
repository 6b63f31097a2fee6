"""Loading and saving by a key table: whole, in place, slice by slice, or one line that says why."""

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
from mister_jax.convert.safetensors import Checkpoint, save
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
    """A tensor that counts the bytes read of it, and the most that were read at once."""

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


def weights(dtype=np.float32):
    random = np.random.default_rng(0)
    shapes = {"head.weight": (24, 16), "head.first": (12,), "head.second": (12,)}
    for layer in range(LAYERS):
        shapes |= {f"layer.{layer}.weight": (16, 8), f"layer.{layer}.bias": (16,)}
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def assert_loaded(module, given):
    kernels = module.layers.layers.kernel[...]
    for layer in range(LAYERS):
        np.testing.assert_array_equal(kernels[layer], given[f"layer.{layer}.weight"].T)
        np.testing.assert_array_equal(
            module.layers.layers.bias[...][layer], given[f"layer.{layer}.bias"]
        )
    np.testing.assert_array_equal(module.head.kernel[...], given["head.weight"].T)
    np.testing.assert_array_equal(
        module.head.bias[...], np.concatenate([given["head.first"], given["head.second"]])
    )


@pytest.mark.parametrize("make", [abstract, lambda: Model(nnx.Rngs(0))])
def test_every_tensor_arrives_where_the_table_says(make):
    assert_loaded(load_params(make(), TABLE, weights()), weights())


def test_saving_gives_back_what_was_loaded():
    saved = save_params(load_params(abstract(), TABLE, weights()), TABLE)
    assert set(saved) == set(weights())
    for name, value in weights().items():
        assert saved[name].shape == value.shape and saved[name].dtype == value.dtype
        np.testing.assert_array_equal(saved[name][...], value)
        np.testing.assert_array_equal(saved[name][1:3], value[1:3])


def test_names_may_have_a_prefix():
    prefixed = {f"model.{name}": value for name, value in weights().items()}
    module = load_params(abstract(), TABLE, prefixed, prefix="model.")
    assert_loaded(module, weights())
    assert set(save_params(module, TABLE, prefix="model.")) == set(prefixed)


def test_tensors_are_cast():
    half = weights(jnp.bfloat16)
    module = load_params(abstract(), TABLE, half)
    assert module.layers.layers.kernel.dtype == jnp.float32
    assert_loaded(module, half)
    module = load_params(abstract(), TABLE, weights(), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("bfloat16")}


def test_each_device_gets_its_shard_alone():
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
def test_stacks_may_be_sharded_along_any_axis(spec):
    sharding = NamedSharding(data_mesh(4), spec)
    replicated = NamedSharding(sharding.mesh, P())
    placed = jax.tree.map(
        lambda leaf: sharding if leaf.shape == (LAYERS, 8, 16) else replicated,
        nnx.to_pure_dict(nnx.state(abstract(), nnx.Param)),
    )
    module = load_params(abstract(), TABLE, weights(), shardings=placed)
    assert_loaded(module, weights())
    assert module.layers.layers.kernel[...].sharding.is_equivalent_to(sharding, 3)


def test_reading_takes_no_more_than_a_tensor_and_each_byte_once():
    given = weights()
    everywhere = NamedSharding(data_mesh(2), P())
    for where in (None, everywhere):
        Spy.read = Spy.largest = 0
        spies = {name: Spy(value) for name, value in given.items()}
        load_params(abstract(), TABLE, spies, shardings=where)
        assert Spy.read == sum(value.nbytes for value in given.values())
        assert Spy.largest == max(value.nbytes for value in given.values())


ON_DEVICES = {"one": None, "sharded": P("data", "model"), "replicated": P()}


@pytest.mark.parametrize("where", ON_DEVICES)
@pytest.mark.parametrize(
    "kinds", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("axes", [None, (1, 0)])
@pytest.mark.parametrize("layers", [None, 3])
def test_host_memory_stays_below_twice_the_largest_tensor(tmp_path, layers, axes, kinds, where):
    in_file, placed = map(jnp.dtype, kinds)
    given = {
        f"{layer}.weight": np.full((1024, 512), layer + 1, in_file) for layer in range(layers or 1)
    }
    save(tmp_path, given)
    names = layer_names("{}.weight", len(given))
    table = {"kernel": Source(names, axes, stacked=layers is not None)}
    shape = (1024, 512) if axes is None else (512, 1024)
    shape = shape if layers is None else (layers, *shape)

    def load():
        module = nnx.eval_shape(lambda: nnx.Dict(kernel=nnx.Param(jnp.zeros(shape, placed))))
        spec = ON_DEVICES[where]
        if spec is not None and layers is not None:
            spec = P(None, *spec)
        sharding = None if spec is None else NamedSharding(data_mesh(4), spec)
        return load_params(module, table, Checkpoint.open(tmp_path), shardings=sharding)

    load()  # what is compiled and imported stays in memory
    tracemalloc.start()
    module = load()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The result is in JAX's memory, or it is the one copy that was made.
    assert peak < 1.2 * 1024 * 512 * max(in_file.itemsize, placed.itemsize)
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


def test_parameters_stay_where_they_are():
    module = Model(nnx.Rngs(0))
    sharding = NamedSharding(data_mesh(), P(None, "data"))
    kernel = jax.device_put(module.layers.layers.kernel[...], sharding)
    module.layers.layers.kernel.set_value(kernel)
    load_params(module, TABLE, weights())
    assert module.layers.layers.kernel[...].sharding.is_equivalent_to(sharding, 3)


def test_of_many_tensors_that_do_not_fit_the_first_are_named():
    table = {
        f"{name}/kernel": Source(layer_names(f"{name}.{{}}.weight", 9), stacked=True)
        for name in "abcde"
    }

    def refusal(given):
        module = nnx.Dict({name: nnx.Dict(kernel=nnx.Param(jnp.zeros((9, 2)))) for name in "abcde"})
        with pytest.raises(InputError) as error:
            load_params(module, table, given)
        return str(error.value)

    others = {f"x{number}.{layer}": np.zeros(2) for number in range(9) for layer in range(9)}
    assert refusal(others) == (
        "weights: weights of another architecture: 45 missing: a.{0,1,...,8}.weight, "
        "b.{0,1,...,8}.weight, c.{0,1,...,8}.weight, ...; 81 surplus: x0.0, x0.1, x0.2, ..."
    )
    ours = {name: np.zeros(2) for source in table.values() for name in source.names}
    del ours["a.0.weight"]
    assert refusal({**ours, **others}).startswith("weights: tensors do not fit: 1 missing: a.0.we")
    assert refusal({}).startswith("weights: tensors do not fit: 45 missing")  # cut short


def test_low_rank_paths_are_left_alone():
    module = add_lora(
        Model(nnx.Rngs(0)), LoRAConfig(rank=2, alpha=4, targets=("layers",)), rngs=nnx.Rngs(1)
    )
    before = np.asarray(module.layers.layers.lora_a[...])
    assert_loaded(load_params(module, TABLE, weights()), weights())
    np.testing.assert_array_equal(module.layers.layers.lora_a[...], before)
    assert set(save_params(module, TABLE)) == set(weights())


def test_stacked_values_may_be_combined_layer_by_layer():
    names = tuple(f"{layer}.{part}" for layer in range(2) for part in "ab")
    source = Source(
        names, (1, 0), stacked=True, combine=np.hstack, split=lambda x: np.split(x, 2, 1)
    )
    module = nnx.Dict(kernel=nnx.Param(jnp.zeros((2, 3, 8))))
    given = {name: np.full((4, 3), float(index)) for index, name in enumerate(names)}
    load_params(module, {"kernel": source}, given)
    np.testing.assert_array_equal(module.kernel[...][:, 0, ::4], [[0, 1], [2, 3]])
    saved = save_params(module, {"kernel": source})
    for name in names:
        np.testing.assert_array_equal(saved[name][...], given[name])


def test_all_that_does_not_fit_is_named_in_one_line_and_nothing_changes():
    given = weights()
    del given["layer.0.bias"], given["head.weight"]
    given["layer.1.weight"] = np.zeros((8, 16))
    given["layer.2.weight"] = np.zeros((8, 16))
    given["head.first"] = np.zeros(13)
    given["pooler.weight"] = given["extra.0.bias"] = given["extra.1.bias"] = np.zeros(2)
    module = abstract()
    with pytest.raises(InputError) as error:
        load_params(module, TABLE, given, ignore=(r"^pooler\.",))
    message = str(error.value)
    assert "\n" not in message
    assert "2 missing: head.weight, layer.0.bias;" in message
    assert "2 surplus: extra.{0,1}.bias;" in message
    assert "3 misshapen" in message
    assert "layer.{1,2}.weight [8, 16] instead of [16, 8]" in message
    assert "head.first+head.second [13]+[12] instead of shapes that combine to [24]" in message
    assert isinstance(module.head.kernel.get_value(), jax.ShapeDtypeStruct)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["layer.2.weight", "head.second"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named(dtype, name, value):
    tensors = {key: tensor.astype(dtype) for key, tensor in weights().items()}
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = value
    with pytest.raises(InputError, match=rf"^weights: tensor .*{name} has NaN or infinite values"):
        load_params(abstract(), TABLE, tensors)


def test_weights_that_overflow_the_parameters_type_are_named():
    tensors = weights() | {"head.weight": np.full_like(weights()["head.weight"], 1e6)}
    with pytest.raises(InputError, match=r"head\.weight has NaN or infinite values as float16"):
        load_params(abstract(), TABLE, tensors, dtype=jnp.float16)


def test_a_table_that_does_not_fit_the_module_is_a_programming_error():
    less = {path: source for path, source in TABLE.items() if path != "head/bias"}
    with pytest.raises(ValueError, match=r"without a source \['head/bias'\]"):
        load_params(abstract(), less, weights())
    with pytest.raises(ValueError, match=r"without a parameter \['tail'\]"):
        save_params(Model(nnx.Rngs(0)), {**TABLE, "tail": Source(("tail",))})
    fewer = {**TABLE, "layers/layers/bias": Source(("layer.0.bias",), stacked=True)}
    with pytest.raises(ValueError, match=r"1 names .* for 4 layers"):
        load_params(abstract(), fewer, weights())
    with pytest.raises(ValueError, match="no sharding for the parameters"):
        load_params(abstract(), TABLE, weights(), shardings={})
    with pytest.raises(ValueError, match="several with stacked or combine"):
        Source(("a", "b"))


def test_what_cannot_be_split_cannot_be_saved():
    table = {**TABLE, "head/bias": Source(("head.first", "head.second"), combine=np.concatenate)}
    module = load_params(abstract(), table, weights())
    with pytest.raises(ValueError, match=r"head/bias is combined from .* cannot be split"):
        save_params(module, table)
