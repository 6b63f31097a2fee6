"""Loads and saves the parameters of a module, which a key table maps to checkpoint tensors."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mister_jax.convert.key_table import KeyTable, NameRules, Source, split_checkpoint
from mister_jax.convert.safetensors import Checkpoint, Tensor
from mister_jax.errors import InputError

AnyModule = TypeVar("AnyModule", bound=nnx.Module)
Index = tuple[slice, ...]
_MAX_NAMES = 3  # Maximum number of tensors, or of layers per tensor, that a message lists.
_ALIGNMENT = 64  # bytes
_CHUNK_SIZE = 1 << 16  # values


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
    """Fills a module's parameters from a checkpoint.

    Tensors (or the layers of stacked parameters) are read, cast and placed one after another. Only
    the slices that this process's devices need are read, or whole tensors for `combine`. Apart from
    the placed values and the results of `combine`, the host needs less memory than twice the
    largest tensor (or layer).

    If tensors do not match the module, nothing changes. Non-finite values raise an error only when
    they are read, after earlier parameters have been filled.

    Args:
      module: Concrete module, or abstract module from `nnx.eval_shape`, which uses no memory.
      table: Key table for all parameters of the module that are not skipped.
      checkpoint: `Checkpoint`, or mapping from names to arrays.
      ignore: Regular expressions for additional tensors in the checkpoint that are allowed.
      prefix: Prefix of all the table's names in the checkpoint, such as "model.".
      shardings: `jax.sharding.Sharding` for all parameters, or a nested dictionary with a sharding
        for each parameter, for example from `parallel.sharding.shardings`. By default,
        concrete parameters keep their shardings, and abstract parameters are placed on the first
        device.
      dtype: Dtype of the floating-point parameters; by default, they keep their dtypes.
      skip: NNX filter for variables that have no source and keep their values.

    Returns:
      The module.

    Raises:
      InputError: Tensors are missing, unexpected or mismatched, or a tensor is not finite. The
        one-line message names the first tensors of each kind and says how many there are.
      ValueError: The table does not match the module.
    """
    state, sources, params = _match_params(module, table, prefix, skip)
    _check_tensors(params, sources, checkpoint, ignore)
    sharding_by_path = _expand_shardings(shardings, params)
    for path, variable in params.items():
        gc.collect(0)  # Frees host arrays that have already been copied to devices.
        param_dtype = variable.dtype
        if dtype is not None and jnp.issubdtype(param_dtype, jnp.floating):
            param_dtype = dtype
        source = sources[path]
        target = variable.shape, np.dtype(param_dtype), sharding_by_path[path]
        if source.stacked:
            value = _place_stack(source, checkpoint, *target)
        else:
            value = _place(source, checkpoint, source.names, *target, buffers={})
        variable.set_value(value)
    nnx.update(module, state)
    return module


def load_backbone(
    module: nnx.Module,
    table: KeyTable,
    checkpoint: Mapping[str, Tensor],
    rules: NameRules,
    **options: Any,
) -> Checkpoint:
    """Fills a module from a checkpoint of a bare backbone or a task model.

    The head of a task model is ignored, and a message is logged. The table has the names of the
    bare backbone. For the further arguments, see `load_params`.

    Returns:
      Tensors of the head, which have not been read yet.

    Raises:
      InputError: Tensors of the backbone are missing, unexpected, mismatched or not finite.
    """
    expected = [name for source in table.values() for name in source.names]
    parts = split_checkpoint(checkpoint, rules, expected)
    load_params(module, table, parts.backbone, prefix=parts.prefix, **options)
    log_ignored(parts.head.path, tuple(parts.head), "the head")
    return parts.head


@functools.cache  # A file that is read several times is reported once.
def log_ignored(path: pathlib.Path, names: tuple[str, ...], part: str) -> None:
    """Logs that a file's tensors for `part` of the model are ignored, if there are any."""
    if names:
        count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
        logging.info("%s: ignored %s (%s): %s", path, part, count, summarize(names))


def save_params(
    module: nnx.Module, table: KeyTable, *, prefix: str = "", skip: Any = nnx.LoRAParam
) -> Mapping[str, Tensor]:
    """Returns a module's parameters as tensors by name; for the arguments, see `load_params`.

    A tensor is copied to the host when it is sliced.

    Raises:
      ValueError: The table does not match the module, or has a `combine` without `split`.
    """
    tensors: dict[str, Tensor] = {}
    _, sources, params = _match_params(module, table, prefix, skip)
    for path, source in sources.items():
        value = params[path].get_value()
        if source.combine and not source.split:
            raise ValueError(
                f"{path} is combined from {source.names} and cannot be split back into them"
            )
        layer_shape = value.shape[1:] if source.stacked else value.shape
        for layer, names in enumerate(_names_by_layer(source, value.shape)):
            for part, name in enumerate(names):
                read = functools.partial(_read_saved, source, value, layer, part)
                shape = _split(source, _placeholder(layer_shape))[part].shape
                tensors[name] = _SavedTensor(read, shape, value.dtype)
    return tensors


@dataclasses.dataclass(frozen=True)
class _SavedTensor:
    """Tensor of a parameter, copied to the host each time it is sliced."""

    read: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.read()[index]


def _read_saved(source: Source, value: jax.Array, layer: int, part: int) -> np.ndarray:
    """Copies one tensor of a parameter to the host."""
    if source.stacked:
        value = jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
    if not value.is_fully_addressable:
        return _split(source, multihost_utils.process_allgather(value, tiled=True))[part]
    return _split(source, np.asarray(value))[part]


def _split(source: Source, value: np.ndarray) -> list[np.ndarray]:
    """Splits a layer's value into its tensors."""
    parts = source.split(value) if source.split else [value]
    if source.axes is not None:
        parts = [part.transpose(np.argsort(source.axes)) for part in parts]
    return parts


def _combine(source: Source, tensors: list[np.ndarray]) -> np.ndarray:
    """Computes a layer's value from its tensors."""
    if source.axes is not None:
        tensors = [tensor.transpose(source.axes) for tensor in tensors]
    return source.combine(tensors) if source.combine else tensors[0]


def _placeholder(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array for shape computations that uses no memory."""
    return np.broadcast_to(np.float32(1), shape)


def _match_params(
    module: nnx.Module, table: KeyTable, prefix: str, skip: Any
) -> tuple[nnx.State, dict[str, Source], dict[str, nnx.Param]]:
    """Returns the state of the table's parameters, and sources and variables by path."""
    state = nnx.state(module, nnx.All(nnx.Param, nnx.Not(skip)))
    params = {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}
    unmapped, unknown = sorted(set(params) - set(table)), sorted(set(table) - set(params))
    if unmapped or unknown:
        raise ValueError(
            f"key table: parameters without a source {unmapped}, sources without a parameter "
            f"{unknown}"
        )
    sources = {
        path: dataclasses.replace(
            table[path], names=tuple(prefix + name for name in table[path].names)
        )
        for path in params
    }
    return state, sources, params


def _names_by_layer(source: Source, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Returns the names of each layer's tensors; an unstacked source counts as one layer."""
    num_layers = shape[0] if source.stacked else 1
    size, remainder = divmod(len(source.names), num_layers)
    if remainder or not size or (size > 1 and not source.combine):
        raise ValueError(f"{len(source.names)} names {source.names} for {num_layers} layers")
    return [source.names[size * layer : size * (layer + 1)] for layer in range(num_layers)]


def _check_tensors(
    params: Mapping[str, nnx.Param],
    sources: Mapping[str, Source],
    checkpoint: Mapping[str, Tensor],
    ignore: Sequence[str],
) -> None:
    """Raises InputError if tensors are missing, unexpected or mismatched."""
    expected = {name for source in sources.values() for name in source.names}
    missing = [name for name in sorted(expected) if name not in checkpoint]
    unexpected = [
        name
        for name in sorted(set(checkpoint) - expected)
        if not any(re.search(pattern, name) for pattern in ignore)
    ]
    mismatched = [
        f"{'+'.join(names)} {'+'.join(_format_shape(checkpoint[name].shape) for name in names)}"
        f" instead of {expected_shape}"
        for path, source in sources.items()
        for names, expected_shape in _mismatched(source, params[path].shape, checkpoint)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    parts = [
        f"{len(names)} {kind}: {summarize(names)}" for kind, names in problems.items() if names
    ]
    if parts:
        reason = "tensors do not match the model"
        if len(expected) - len(missing) < min(len(missing), len(unexpected)):
            reason = "weights of another architecture"
        where = getattr(checkpoint, "path", "weights")
        raise InputError(f"{where}: {reason}: {'; '.join(parts)}")


def _mismatched(
    source: Source, shape: tuple[int, ...], checkpoint: Mapping[str, Tensor]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields tensors with the wrong shape, and the expected shape."""
    names_by_layer = _names_by_layer(source, shape)
    shape = shape[1:] if source.stacked else shape
    for names in names_by_layer:
        if any(name not in checkpoint for name in names):
            continue
        tensors = [_placeholder(checkpoint[name].shape) for name in names]
        try:
            tensor_shape = _combine(source, tensors).shape
        except ValueError:  # The axes or sizes are incompatible.
            tensor_shape = None
        if tensor_shape == shape:
            continue
        if source.combine:
            yield names, f"shapes that combine to {_format_shape(shape)}"
        else:
            axes = range(len(shape)) if source.axes is None else np.argsort(source.axes)
            yield names, _format_shape(tuple(shape[axis] for axis in axes))


def _format_shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def summarize(names: Iterable[str]) -> str:
    """Lists the first few names; names that differ only in the layer number are listed as one."""
    layers_by_name: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.match(r"(.*?\.)(\d+)(\..*)", name)
        start, layer, end = match.groups() if match else (name, "", "")
        layers_by_name.setdefault((start, end), []).append(layer)
    folded = []
    for (start, end), layers in layers_by_name.items():
        if len(layers) > _MAX_NAMES:
            layers = [*layers[: _MAX_NAMES - 1], "...", layers[-1]]
        numbers = layers[0] if len(layers) == 1 else f"{{{','.join(layers)}}}"
        folded.append(f"{start}{numbers}{end}")
    return ", ".join(folded[:_MAX_NAMES] + ["..."] * (len(folded) > _MAX_NAMES))


def _read(
    source: Source, checkpoint: Mapping[str, Tensor], names: tuple[str, ...], index: Index
) -> np.ndarray:
    """Reads a slice of a layer's value."""
    if source.combine:
        return _combine(source, [checkpoint[name][...] for name in names])[index]
    if source.axes is None:
        return checkpoint[names[0]][index]
    tensor_index = tuple(index[axis] for axis in np.argsort(source.axes))
    return checkpoint[names[0]][tensor_index].transpose(source.axes)


def _place(
    source: Source,
    checkpoint: Mapping[str, Tensor],
    names: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    buffers: dict[Any, np.ndarray],
) -> jax.Array:
    """Places a layer's value on the devices; each device gets only its slice.

    Slices are written to `buffers`, over the slices of the previous layer. The result may share
    memory with the buffers, so the caller must use the result before it reuses the buffers.
    """
    filled = set()

    def read_slice(index: Any) -> np.ndarray:
        # Devices with the same slice share one read.
        bounds = tuple((part.start, part.stop) for part in index)
        if bounds not in filled:
            value = _read(source, checkpoint, names, index)
            if bounds not in buffers:
                buffers[bounds] = _empty_aligned(value.shape, dtype)
            # This statement makes the only copy: it reads the mapped file, transposes and casts.
            with np.errstate(over="ignore"):  # Overflow is reported below.
                np.copyto(buffers[bounds], value, casting="unsafe")
            if not _all_finite(buffers[bounds]):
                raise InputError(
                    f"{getattr(checkpoint, 'path', 'weights')}: tensor {'+'.join(names)} has NaN "
                    f"or infinite values as {dtype}; allowed: finite weights"
                )
            filled.add(bounds)
        return buffers[bounds]

    # Wait, so that the host does not read the next tensor before this tensor is copied.
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read_slice))


def _all_finite(value: np.ndarray) -> bool:
    """Returns whether all values are finite; works in chunks that fit into the CPU's cache."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return True
    # Only NaN and infinity have an exponent with all bits set.
    bits = value.reshape(-1).view(f"u{value.dtype.itemsize}")
    exponent = np.asarray(np.inf, value.dtype).view(bits.dtype)
    return all(
        (bits[start : start + _CHUNK_SIZE] & exponent).max() < exponent
        for start in range(0, bits.size, _CHUNK_SIZE)
    )


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized array, aligned so that CPU devices can use it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _place_stack(
    source: Source,
    checkpoint: Mapping[str, Tensor],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
) -> jax.Array:
    """Allocates a stacked value on the devices and fills it layer by layer."""
    layer_sharding = sharding
    if isinstance(sharding, NamedSharding):
        layer_sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    stack = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, dtype)
    buffers: dict[Any, np.ndarray] = {}
    for layer, names in enumerate(_names_by_layer(source, shape)):
        value = _place(source, checkpoint, names, shape[1:], dtype, layer_sharding, buffers)
        stack = _compile_set_layer(sharding)(stack, value, layer)
        stack.block_until_ready()  # The next layer reuses the buffers.
    return stack


@functools.lru_cache
def _compile_set_layer(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    def set_layer(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=sharding)


def _expand_shardings(shardings: Any, params: Mapping[str, nnx.Param]) -> dict[str, Sharding]:
    """Returns the sharding of every parameter."""
    if shardings is None:
        first_device = SingleDeviceSharding(jax.local_devices()[0])
        return {
            path: getattr(variable.get_value(), "sharding", None) or first_device
            for path, variable in params.items()
        }
    if isinstance(shardings, Sharding):
        return dict.fromkeys(params, shardings)
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves
    }
    missing = sorted(set(params) - set(by_path))
    if missing:
        raise ValueError(f"no sharding for the parameters {missing}")
    return {path: by_path[path] for path in params}
