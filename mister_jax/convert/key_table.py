"""Key tables: the mapping between tensors of a checkpoint and parameters of a module.

A table is plain data, one per architecture. `load_params` reads a checkpoint with it, one tensor at
a time and only the slices that a device needs; `save_params` returns the tensors. No files are
opened here.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mister_jax.errors import InputError

Index = tuple[slice, ...]
_MAX_NAMED = 3  # Tensors, or layers, that a message names of each kind.
_ALIGNMENT = 64  # bytes
_PIECE = 1 << 16  # values
AnyModule = TypeVar("AnyModule", bound=nnx.Module)


class Tensor(Protocol):
    """Array with shape and type that may still be in a file and is read by slicing."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of one parameter.

    Attributes:
      names: Tensor names; several with `stacked`, one per layer, or with `combine`.
      axes: Permutation of each tensor's axes when it is loaded, as for `np.transpose`: (1, 0) for
        the weight of a PyTorch Linear, (2, 1, 0) for that of a Conv1d.
      stacked: Whether the values of all layers are stacked along a new leading axis L; the names
        are ordered by layer.
      combine: Function from the tensors (of one layer) to the value, for anything but a plain
        permutation: fused projections, weight normalization. It reads whole tensors.
      split: Inverse of `combine`; without it the parameter cannot be saved.
    """

    names: tuple[str, ...]
    axes: tuple[int, ...] | None = None
    stacked: bool = False
    combine: Callable[[list[np.ndarray]], np.ndarray] | None = None
    split: Callable[[np.ndarray], list[np.ndarray]] | None = None

    def __post_init__(self):
        if not self.names or (len(self.names) > 1 and not (self.stacked or self.combine)):
            raise ValueError(
                f"Source.names={self.names}: allowed is one name, or several with stacked or "
                "combine"
            )


# "/"-joined path of a parameter in `nnx.state(module)` -> its tensors.
KeyTable = Mapping[str, Source]


def layer_names(pattern: str, num_layers: int) -> tuple[str, ...]:
    """Returns the names of all layers, from a pattern with `{}` for the layer's number."""
    return tuple(pattern.format(layer) for layer in range(num_layers))


def load_params(
    module: AnyModule,
    table: KeyTable,
    checkpoint: Mapping[str, Tensor],
    *,
    ignore: Sequence[str] = (),
    prefix: str = "",
    shardings: Any = None,
    dtype: DTypeLike | None = None,
    skip: Any = nnx.LoRAParam,
) -> AnyModule:
    """Fills the parameters of a module from a checkpoint.

    Tensors are read, cast and placed one after another (a stack layer by layer), and only the
    slices that devices of this process need. Beyond the placed values, host memory stays
    below twice the size of the largest tensor, in the file or as a layer of it is placed; results
    of `combine` come on top. A checkpoint whose tensors do not fit changes nothing. Values that are
    not finite are detected as they are read, when earlier parameters are already filled.

    Args:
      module: Concrete module, or an abstract one from `nnx.eval_shape`, which allocates nothing.
      table: Key table of all parameters of the module that are not skipped.
      checkpoint: `Checkpoint`, or plain mapping of names to arrays.
      ignore: Regular expressions of tensors that may be surplus.
      prefix: Prefix of all the table's names in the checkpoint, such as "model.".
      shardings: One `jax.sharding.Sharding` for all parameters, or a tree of them like the pure
        dictionary of the parameters, as from `parallel.shardings`. By default, a concrete parameter
        keeps its sharding, and others are placed on the first device.
      dtype: Type of the floating parameters; by default that of the module.
      skip: Filter of variables that have no source and keep their values.

    Returns:
      The module.

    Raises:
      InputError: Tensors are missing, surplus, misshapen or not finite; one line with the count
        and the first names.
      ValueError: The table does not fit the module.
    """
    state, params = _parameters(module, table, skip)
    named = {path: _prefixed(table[path], prefix) for path in params}
    _check(params, named, checkpoint, ignore)
    placed = _shardings_of(shardings, params)
    for path, variable in params.items():
        gc.collect(0)  # JAX then releases arrays that devices have read.
        kind = variable.dtype
        if dtype is not None and jnp.issubdtype(kind, jnp.floating):
            kind = dtype
        where = variable.shape, np.dtype(kind), placed[path]
        if named[path].stacked:
            value = _place_stack(named[path], checkpoint, *where)
        else:
            value = _place(named[path], checkpoint, named[path].names, *where, memory={})
        variable.set_value(value)
    nnx.update(module, state)
    return module


def save_params(
    module: nnx.Module, table: KeyTable, *, prefix: str = "", skip: Any = nnx.LoRAParam
) -> Mapping[str, Tensor]:
    """Returns the tensors of a module's parameters under the names of a checkpoint.

    Args:
      module: Concrete module.
      table: Key table of all parameters of the module that are not skipped.
      prefix: Prefix of all names.
      skip: Filter of variables that are left out.

    Returns:
      Tensors by name, each copied to the host when it is sliced.

    Raises:
      ValueError: The table does not fit the module, or has a `combine` without `split`.
    """
    tensors: dict[str, Tensor] = {}
    _, params = _parameters(module, table, skip)
    for path, variable in params.items():
        source = _prefixed(table[path], prefix)
        value = variable.get_value()
        if source.combine and not source.split:
            raise ValueError(f"{path} is combined of {source.names} and cannot be split again")
        shape = value.shape[1:] if source.stacked else value.shape
        for layer, names in enumerate(_by_layer(source, value.shape)):
            for part, name in enumerate(names):
                give = functools.partial(_part, source, value, layer, part)
                tensors[name] = _Saved(give, _given_shape(source, shape, part), value.dtype)
    return tensors


@dataclasses.dataclass(frozen=True)
class _Saved:
    """Tensor of a parameter; on the host only while it is sliced."""

    give: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.give()[index]


def _split(source: Source, value: np.ndarray) -> list[np.ndarray]:
    """Splits one layer's value into its tensors."""
    parts = source.split(value) if source.split else [value]
    if source.axes is not None:
        parts = [part.transpose(np.argsort(source.axes)) for part in parts]
    return parts


def _part(source: Source, value: jax.Array, layer: int, part: int) -> np.ndarray:
    """Returns one tensor of a parameter."""
    if source.stacked:
        value = jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
    if not value.is_fully_addressable:
        return _split(source, multihost_utils.process_allgather(value, tiled=True))[part]
    return _split(source, np.asarray(value))[part]


def _given_shape(source: Source, shape: tuple[int, ...], part: int) -> tuple[int, ...]:
    return _split(source, _ones(shape))[part].shape


def _ones(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array that takes no memory, to compute shapes with."""
    return np.broadcast_to(np.float32(1), shape)


def _parameters(
    module: nnx.Module, table: KeyTable, skip: Any
) -> tuple[nnx.State, dict[str, nnx.Param]]:
    """Returns the parameters of the table, as a state and by path."""
    state = nnx.state(module, nnx.All(nnx.Param, nnx.Not(skip)))
    params = {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}
    without, unknown = sorted(set(params) - set(table)), sorted(set(table) - set(params))
    if without or unknown:
        raise ValueError(
            f"key table: parameters without a source {without}, sources without a parameter "
            f"{unknown}"
        )
    return state, params


def _prefixed(source: Source, prefix: str) -> Source:
    return dataclasses.replace(source, names=tuple(prefix + name for name in source.names))


def _by_layer(source: Source, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Returns the names of each layer's tensors; a source that is not stacked is one layer."""
    layers = shape[0] if source.stacked else 1
    size, rest = divmod(len(source.names), layers)
    if rest or not size or (size > 1 and not source.combine):
        raise ValueError(f"{len(source.names)} names {source.names} for {layers} layers")
    return [source.names[size * layer : size * (layer + 1)] for layer in range(layers)]


def _check(
    params: Mapping[str, nnx.Param],
    sources: Mapping[str, Source],
    checkpoint: Mapping[str, Tensor],
    ignore: Sequence[str],
) -> None:
    """Raises InputError with the missing, surplus and misshapen tensors."""
    expected = {name for source in sources.values() for name in source.names}
    missing = [name for name in sorted(expected) if name not in checkpoint]
    surplus = [
        name
        for name in sorted(set(checkpoint) - expected)
        if not any(re.search(pattern, name) for pattern in ignore)
    ]
    misshapen = [
        f"{'+'.join(names)} {'+'.join(_shape(checkpoint[name].shape) for name in names)}"
        f" instead of {wanted}"
        for path, source in sources.items()
        for names, wanted in _misfits(source, params[path].shape, checkpoint)
    ]
    misfits = {"missing": missing, "surplus": surplus, "misshapen": misshapen}
    parts = [f"{len(names)} {kind}: {summarize(names)}" for kind, names in misfits.items() if names]
    if parts:
        where = getattr(checkpoint, "path", "weights")
        matching = len(expected) - len(missing)
        other = matching < min(len(missing), len(surplus))
        problem = "weights of another architecture" if other else "tensors do not fit"
        raise InputError(f"{where}: {problem}: {'; '.join(parts)}")


def _misfits(
    source: Source, shape: tuple[int, ...], checkpoint: Mapping[str, Tensor]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the tensors that exist but do not give the shape, and the shape they should have."""
    layers = _by_layer(source, shape)
    shape = shape[1:] if source.stacked else shape
    for names in layers:
        if any(name not in checkpoint for name in names):
            continue
        try:
            given = _join(source, [_ones(checkpoint[name].shape) for name in names]).shape
        except ValueError:  # NumPy raises it for incompatible axes or sizes.
            given = None
        if given != shape:
            if source.combine:
                yield names, f"what makes {_shape(shape)}"
            else:
                axes = range(len(shape)) if source.axes is None else np.argsort(source.axes)
                yield names, _shape(tuple(shape[axis] for axis in axes))


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def summarize(names: Iterable[str]) -> str:
    """Returns the first few names; those that differ in their layer's number alone count as one."""
    folded = _fold(names)
    return ", ".join([*folded[:_MAX_NAMED], *(["..."] if len(folded) > _MAX_NAMED else [])])


def _fold(descriptions: Iterable[str]) -> list[str]:
    """Descriptions, in which those that differ in their layer's number alone become one."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for description in descriptions:
        match = re.match(r"(.*?\.)(\d+)(\..*)", description)
        start, number, end = match.groups() if match else (description, "", "")
        numbers.setdefault((start, end), []).append(number)
    return [
        f"{start}{found[0] if len(found) == 1 else '{' + _layers(found) + '}'}{end}"
        for (start, end), found in numbers.items()
    ]


def _layers(numbers: Sequence[str]) -> str:
    few = len(numbers) <= _MAX_NAMED
    return ",".join(numbers if few else [*numbers[: _MAX_NAMED - 1], "...", numbers[-1]])


def _join(source: Source, tensors: list[np.ndarray]) -> np.ndarray:
    """Returns the value of one layer from its tensors."""
    if source.axes is not None:
        tensors = [tensor.transpose(source.axes) for tensor in tensors]
    return source.combine(tensors) if source.combine else tensors[0]


def _read(
    source: Source, checkpoint: Mapping[str, Tensor], names: tuple[str, ...], index: Index
) -> np.ndarray:
    """Reads a slice of the value of one layer."""
    if source.combine:
        return _join(source, [checkpoint[name][...] for name in names])[index]
    if source.axes is None:
        return checkpoint[names[0]][index]
    given = tuple(index[axis] for axis in np.argsort(source.axes))
    return checkpoint[names[0]][given].transpose(source.axes)


def _place(
    source: Source,
    checkpoint: Mapping[str, Tensor],
    names: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    memory: dict[Any, np.ndarray],
) -> jax.Array:
    """Places the value of one layer on its devices, each of which receives only its slice.

    The slices are written to `memory`, over those of the previous layer, and devices may continue
    to read them from it.
    """
    filled = set()

    def give(index: Any) -> np.ndarray:  # slices of the shape
        # Devices with the same slice share one reading.
        bounds = tuple((part.start, part.stop) for part in index)
        if bounds not in filled:
            value = _read(source, checkpoint, names, index)
            if bounds not in memory:
                memory[bounds] = _aligned(value.shape, dtype)
            # The one copy, which transposes and casts on its way out of the mapped file.
            with np.errstate(over="ignore"):  # Reported below.
                np.copyto(memory[bounds], value, casting="unsafe")
            if not _all_finite(memory[bounds]):
                raise InputError(
                    f"{getattr(checkpoint, 'path', 'weights')}: tensor {'+'.join(names)} has NaN "
                    f"or infinite values as {dtype}; allowed: finite weights"
                )
            filled.add(bounds)
        return memory[bounds]

    # Waiting keeps the host from reading ahead of the copies to the devices.
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, give))


def _all_finite(value: np.ndarray) -> bool:
    """Returns whether no value is NaN or infinite; in pieces that stay in the CPU's cache."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return True
    # The exponent's bits are all ones in NaN and infinity alone.
    bits = value.reshape(-1).view(f"u{value.dtype.itemsize}")
    exponent = np.asarray(np.inf, value.dtype).view(bits.dtype)
    return all(
        (piece & exponent).max() < exponent
        for start in range(0, bits.size, _PIECE)
        for piece in [bits[start : start + _PIECE]]
    )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array whose alignment lets CPU devices use it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _place_stack(
    source: Source,
    checkpoint: Mapping[str, Tensor],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
) -> jax.Array:
    """Places a stacked value on its devices and fills it layer by layer."""
    if isinstance(sharding, NamedSharding):
        of_layer: Sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    else:
        of_layer = sharding
    stack = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, dtype)
    memory: dict[Any, np.ndarray] = {}
    for layer, names in enumerate(_by_layer(source, shape)):
        value = _place(source, checkpoint, names, shape[1:], dtype, of_layer, memory)
        stack = _put_layer(sharding)(stack, value, layer)
        stack.block_until_ready()  # The next layer reuses this one's memory.
    return stack


@functools.lru_cache
def _put_layer(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    def put(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _shardings_of(shardings: Any, params: Mapping[str, nnx.Param]) -> dict[str, Sharding]:
    """Returns a sharding for every parameter."""
    if shardings is None:
        first = SingleDeviceSharding(jax.local_devices()[0])
        return {
            path: getattr(variable.get_value(), "sharding", None) or first
            for path, variable in params.items()
        }
    if isinstance(shardings, Sharding):
        return dict.fromkeys(params, shardings)
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    given = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    without = sorted(set(params) - set(given))
    if without:
        raise ValueError(f"no sharding for the parameters {without}")
    return {path: given[path] for path in params}
