"""Checkpoint files: safetensors, single or sharded, read slice by slice and written, without torch.

The layout is that of the Hugging Face libraries: `model.safetensors`, or shards with
`model.safetensors.index.json`. PyTorch's own files are read too, where PyTorch is installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from mister_jax.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")

_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8  # the file starts with the header's length, little-endian
_LARGEST_HEADER = 100_000_000
_READABLE = (
    "a folder with model.safetensors or model.safetensors.index.json, a .safetensors file, or "
    f"with PyTorch installed a file ending in {', '.join(TORCH_SUFFIXES)}"
)


class Tensor(Protocol):
    """Array with shape and type that may still be in a file and is read by slicing."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file; slicing it gives a view that reads that slice alone.

    A view maps the file and so holds a file descriptor; who keeps values must copy them.
    """

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    def __getitem__(self, index: Any) -> np.ndarray:
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)[index]
        try:
            # Mapped for each reading: a checkpoint has thousands of tensors.
            mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.file}: cannot be read ({error})") from error
        return np.asarray(mapped[index])


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read when it is sliced.

    Args:
      path: of the file or folder, for messages.
      tensors: by name.
      metadata: what else is in the file; of a PyTorch file, all that is no tensor.
    """

    def __init__(
        self,
        path: pathlib.Path,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any] | None = None,
    ):
        self.path = path
        self.metadata = dict(metadata or {})
        self._tensors = tensors

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Reads the names, shapes and types in a checkpoint.

        Args:
          path: a folder as the Hugging Face libraries write it, a `.safetensors` file, an index
            (`.safetensors.index.json`), or a PyTorch file where PyTorch is installed, whose nested
            mappings give dotted names: {"model": {"weight": ...}} has "model.weight".

        Raises:
          InputError: there is no such file, or it is damaged, cut short or of an unknown kind.
        """
        path = pathlib.Path(path)
        if path.is_dir():
            return cls.open(_file_in(path))
        if not path.is_file():
            raise InputError(f"{path}: no such file or folder; allowed is {_READABLE}")
        if path.name.endswith(".index.json"):
            return cls(path, _read_index(path))
        if path.suffix == ".safetensors":
            return cls(path, *_read_header(path))
        if path.suffix in TORCH_SUFFIXES:
            return cls(path, *_read_torch(path))
        raise InputError(f"{path}: unknown kind of file; allowed is {_READABLE}")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def save(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Writes tensors as the Hugging Face libraries do, one tensor in memory at a time.

    Each file appears whole or not at all, the index last; weights of an earlier save are removed.

    Args:
      directory: made where it is missing.
      tensors: arrays, a `Checkpoint`, or what `save_params` gives.
      max_shard_size: in bytes; a single file is written where all tensors fit in one, and a tensor
        that is larger has a shard of its own.

    Raises:
      InputError: a type of number that the format lacks, or a file that cannot be written.
    """
    directory = pathlib.Path(directory)
    for name, tensor in tensors.items():
        if np.dtype(tensor.dtype) not in _NAMES:
            raise InputError(
                f"{directory}: tensor {name} has dtype {tensor.dtype}; allowed: "
                f"{', '.join(map(str, _NAMES))}"
            )
    shards = _shards(tensors, max_shard_size)
    files = [SINGLE]
    if len(shards) > 1:
        files = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as unfinished:
            for file, shard in zip(files, shards, strict=True):
                partial = directory / f".{file}.partial"
                unfinished.callback(partial.unlink, missing_ok=True)
                _write(partial, shard)
            for file in files:
                (directory / f".{file}.partial").replace(directory / file)
        if len(shards) > 1:
            places = {
                name: file for file, shard in zip(files, shards, strict=True) for name in shard
            }
            _write_index(directory, places, sum(map(_size, tensors.values())))
        _remove_others(directory, {*files, *([INDEX] if len(shards) > 1 else [])})
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error})") from error


def _file_in(directory: pathlib.Path) -> pathlib.Path:
    for name in (SINGLE, INDEX):
        if (directory / name).is_file():
            return directory / name
    torch_files = sorted(file.name for file in directory.iterdir() if file.suffix in TORCH_SUFFIXES)
    if torch_files:
        raise InputError(
            f"{directory}: weights are in PyTorch's format only ({', '.join(torch_files)}); where "
            "PyTorch is installed, convert them to safetensors with "
            f"transformers.AutoModel.from_pretrained({str(directory)!r})"
            f".save_pretrained({str(directory)!r})"
        )
    raise InputError(f"{directory}: no weights; allowed is {_READABLE}")


def _read_json(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InputError(f"{where} is damaged (no JSON: {error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is damaged (JSON, but not of names and values)")
    return value


def _read_header(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of one safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            start = _LENGTH_BYTES + length
            if size < _LENGTH_BYTES or length > _LARGEST_HEADER:
                raise InputError(f"{path}: not a safetensors file, or its header is damaged")
            if size < start:
                raise InputError(
                    f"{path}: cut short, its header alone is {start} bytes and it has {size}"
                )
            header = _read_json(file.read(length), f"{path}: the header")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    metadata = header.pop("__metadata__", {})
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, entry in header.items():
        tensor, tensor_end = _tensor(path, name, entry, start)
        tensors[name] = tensor
        end = max(end, tensor_end)
    if size != start + end:
        what = "cut short" if size < start + end else "damaged"
        raise InputError(f"{path}: {what}, it should have {start + end} bytes and has {size}")
    return tensors, metadata


def _tensor(path: pathlib.Path, name: str, entry: Any, start: int) -> tuple[FileTensor, int]:
    """One tensor of a header, and where its data end."""
    damaged = InputError(f"{path}: the header is damaged at tensor {name}: {entry}")
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged from error
    if not isinstance(kind, str):
        raise damaged
    if kind not in _DTYPES:
        raise InputError(f"{path}: tensor {name} has dtype {kind}; allowed: {', '.join(_DTYPES)}")
    numbers = (*shape, begin, end)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise damaged
    if end - begin != math.prod(shape) * _DTYPES[kind].itemsize:
        raise damaged
    return FileTensor(path, shape, _DTYPES[kind], start + begin), end


def _read_index(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of all shards an index names."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    places = _read_json(text, f"{path}: the index").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{path}: the index is damaged (no weight_map of tensors to files)")
    files = sorted(set(places.values()))
    # An index names files beside it, and must not lead anywhere else.
    missing = [
        file
        for file in files
        if pathlib.PurePath(file).name != file or not path.with_name(file).is_file()
    ]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(files)} shards missing: {missing}")
    shards = {file: _read_header(path.with_name(file))[0] for file in files}
    absent = sorted(f"{name} ({file})" for name, file in places.items() if name not in shards[file])
    if absent:
        raise InputError(f"{path}: tensors missing from their shards: {', '.join(absent)}")
    return {name: shards[file][name] for name, file in places.items()}


def _read_torch(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a PyTorch file under dotted names, and what else is in it."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: reading {path.suffix} needs PyTorch, which is not installed; install it, or "
            "convert the file to .safetensors"
        ) from error
    try:
        # Only the newer of PyTorch's two formats, a zip archive, can be mapped.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable PyTorch file ({reason})") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: not a state_dict; allowed is a mapping of names to tensors")
    tensors: dict[str, Tensor] = {}

    def sort_out(mapping: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Puts tensors into `tensors` and gives back the rest."""
        rest: dict[str, Any] = {}
        for name, value in mapping.items():
            if torch.is_tensor(value):
                tensors[f"{prefix}{name}"] = _numpy(value)
            elif isinstance(value, Mapping):
                rest[name] = sort_out(value, f"{prefix}{name}.")
            else:
                rest[name] = value
        return rest

    metadata = sort_out(content, "")
    return tensors, metadata


def _numpy(tensor: Any) -> np.ndarray:
    """A PyTorch tensor as an array that shares its memory, which may be a mapped file."""
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _shards(tensors: Mapping[str, Tensor], max_shard_size: int) -> list[dict[str, Tensor]]:
    """The tensors in order, cut where a shard would grow too large."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + _size(tensor) > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += _size(tensor)
    return shards


def _write(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest types first, as the format's own library does, so that all data are aligned.
    order = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    for name in order:
        tensor, begin = tensors[name], end
        end += _size(tensor)
        header[name] = {
            "dtype": _NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for name in order:
            value = np.asarray(tensors[name][...])
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _write_index(directory: pathlib.Path, places: Mapping[str, str], size: int) -> None:
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2)
    partial = directory / f".{INDEX}.partial"
    partial.write_text(f"{text}\n")
    partial.replace(directory / INDEX)


def _remove_others(directory: pathlib.Path, files: set[str]) -> None:
    """Removes weights of an earlier save, which a reader might take for the new ones."""
    for pattern in (SINGLE, INDEX, "model-*-of-*.safetensors"):
        for path in directory.glob(pattern):
            if path.name not in files:
                path.unlink()
