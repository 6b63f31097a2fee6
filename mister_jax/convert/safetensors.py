"""Reads and writes safetensors checkpoints slice by slice and without PyTorch.

As in the Hugging Face libraries, a checkpoint is `model.safetensors`, or shards with an index
`model.safetensors.index.json`. If PyTorch is installed, PyTorch files can also be read.
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

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
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
_LENGTH_BYTES = 8  # A file starts with the header's length, little-endian.
_MAX_HEADER_BYTES = 100_000_000
_ALLOWED = (
    "a folder with model.safetensors or model.safetensors.index.json, a .safetensors file, or, if "
    f"PyTorch is installed, a file with suffix {', '.join(TORCH_SUFFIXES)}"
)


class Tensor(Protocol):
    """Array that is read by slicing and may still be in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the tensor."""

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """Tensor in a safetensors file. Slicing returns a view that reads only the slice.

    A view maps the file and keeps a file descriptor open, so copy values that you keep.
    """

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # position of the data in the file, in bytes

    def __getitem__(self, index: Any) -> np.ndarray:
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)[index]
        try:
            # Map the file at each read: permanent maps of thousands of tensors need too many
            # file descriptors.
            mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.file}: cannot be read ({error})") from error
        return np.asarray(mapped[index])


class Checkpoint(Mapping[str, Tensor]):
    """Mapping from names to the tensors of a checkpoint, which are read when they are sliced.

    Args:
      path: File or folder, for error messages.
      tensors: Tensors by name.
      metadata: Metadata in the file; for a PyTorch file, everything except tensors.
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
        """Opens a checkpoint and reads the names, shapes and dtypes of its tensors.

        Args:
          path: Folder in the Hugging Face layout, `.safetensors` file, index
            (`.safetensors.index.json`), or PyTorch file. Nested mappings in a PyTorch file become
            dotted names: {"model": {"weight": ...}} becomes "model.weight".

        Raises:
          InputError: The file does not exist, is damaged or truncated, or has an unknown format.
        """
        path = pathlib.Path(path)
        if path.is_dir():
            return cls.open(_find_file(path))
        if not path.is_file():
            raise InputError(f"{path}: no such file or folder; allowed: {_ALLOWED}")
        if path.name.endswith(".index.json"):
            return cls(path, _read_index(path))
        if path.suffix == ".safetensors":
            return cls(path, *_read_header(path))
        if path.suffix in TORCH_SUFFIXES:
            return cls(path, *_read_torch(path))
        raise InputError(f"{path}: unknown file type; allowed: {_ALLOWED}")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def save_tensors(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Saves tensors in the Hugging Face layout, with one tensor in memory at a time.

    Each file is written atomically, and the index is written last. Weights from an earlier save
    are removed.

    Args:
      directory: Output folder; created if missing.
      tensors: Arrays, a `Checkpoint`, or the result of `save_params`.
      max_shard_size: Maximum size of a file in bytes. A larger tensor gets a separate shard.

    Raises:
      InputError: The format does not support a dtype, or a file cannot be written.
    """
    directory = pathlib.Path(directory)
    for name, tensor in tensors.items():
        if np.dtype(tensor.dtype) not in _NAMES:
            raise InputError(
                f"{directory}: tensor {name} has dtype {tensor.dtype}; allowed: "
                f"{', '.join(map(str, _NAMES))}"
            )
    shards = _shards(tensors, max_shard_size)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as cleanup:
            for file, shard in zip(files, shards, strict=True):
                partial = directory / f".{file}.partial"
                cleanup.callback(partial.unlink, missing_ok=True)
                _write(partial, shard)
            for file in files:
                (directory / f".{file}.partial").replace(directory / file)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(map(_num_bytes, tensors.values()))},
                "weight_map": {
                    name: file for file, shard in zip(files, shards, strict=True) for name in shard
                },
            }
            write_atomically(directory / INDEX_FILE, f"{json.dumps(index, indent=2)}\n".encode())
            files.append(INDEX_FILE)
        # Remove all other weight files, because readers might load weights from an earlier save.
        for pattern in (SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors"):
            for path in directory.glob(pattern):
                if path.name not in files:
                    path.unlink()
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error})") from error


def _find_file(directory: pathlib.Path) -> pathlib.Path:
    for name in (SINGLE_FILE, INDEX_FILE):
        if (directory / name).is_file():
            return directory / name
    torch_files = sorted(file.name for file in directory.iterdir() if file.suffix in TORCH_SUFFIXES)
    if torch_files:
        raise InputError(
            f"{directory}: has weights only in PyTorch's format ({', '.join(torch_files)}); "
            "on a machine with PyTorch, convert them to safetensors with "
            f"transformers.AutoModel.from_pretrained({str(directory)!r})"
            f".save_pretrained({str(directory)!r})"
        )
    raise InputError(f"{directory}: no weights; allowed: {_ALLOWED}")


def parse_json_object(data: bytes, where: str | os.PathLike[str]) -> dict[str, Any]:
    """Parses a JSON object; `where` names the file in error messages.

    Raises:
      InputError: The text is not a JSON object.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InputError(f"{where}: damaged (invalid JSON: {error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: damaged (not a JSON object)")
    return value


def _read_header(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the metadata in a safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            start = _LENGTH_BYTES + length
            if size < _LENGTH_BYTES or length > _MAX_HEADER_BYTES:
                raise InputError(f"{path}: not a safetensors file, or its header is damaged")
            if size < start:
                raise InputError(
                    f"{path}: truncated: the header has {start} bytes, but the file has only {size}"
                )
            header = parse_json_object(file.read(length), f"{path}: header")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    metadata = header.pop("__metadata__", {})
    tensors: dict[str, Tensor] = {}
    end = start
    for name, entry in header.items():
        tensors[name], tensor_end = _read_entry(path, name, entry, start)
        end = max(end, tensor_end)
    if size != end:
        problem = "truncated" if size < end else "damaged"
        raise InputError(f"{path}: {problem}: it has {size} bytes instead of {end}")
    return tensors, metadata


def _read_entry(path: pathlib.Path, name: str, entry: Any, start: int) -> tuple[FileTensor, int]:
    """Returns the tensor for a header entry, and the end of its data in the file."""
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
    return FileTensor(path, shape, _DTYPES[kind], start + begin), start + end


def _read_index(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns the tensors of all shards in an index."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    weight_map = parse_json_object(text, path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise InputError(f"{path}: the index is damaged (no weight_map from tensors to files)")
    files = sorted(set(weight_map.values()))
    # All shards must be in the same folder as the index.
    missing = [
        file
        for file in files
        if pathlib.PurePath(file).name != file or not path.with_name(file).is_file()
    ]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(files)} shards missing: {missing}")
    shards = {file: _read_header(path.with_name(file))[0] for file in files}
    absent = [f"{name} ({file})" for name, file in weight_map.items() if name not in shards[file]]
    if absent:
        raise InputError(f"{path}: tensors missing from their shards: {', '.join(sorted(absent))}")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _read_torch(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors in a PyTorch file, with dotted names, and all other content."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: reading {path.suffix} needs PyTorch, which is not installed; install it, or "
            "convert the file to .safetensors"
        ) from error
    try:
        # Only PyTorch's newer file format, a zip archive, can be mapped.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises many exception types for a damaged file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable PyTorch file ({reason})") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: not a state_dict; allowed: a mapping of names to tensors")
    tensors: dict[str, Tensor] = {}

    def collect_tensors(mapping: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Adds the tensors in a mapping to `tensors` and returns all other content."""
        metadata: dict[str, Any] = {}
        for name, value in mapping.items():
            if torch.is_tensor(value):
                tensors[f"{prefix}{name}"] = _to_numpy(value)
            elif isinstance(value, Mapping):
                metadata[name] = collect_tensors(value, f"{prefix}{name}.")
            else:
                metadata[name] = value
        return metadata

    metadata = collect_tensors(content, "")
    return tensors, metadata


def _to_numpy(tensor: Any) -> np.ndarray:
    """Returns an array that shares a PyTorch tensor's memory, which may be a mapped file."""
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _num_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _shards(tensors: Mapping[str, Tensor], max_shard_size: int) -> list[dict[str, Tensor]]:
    """Divides the tensors into shards without changing their order."""
    shards: list[dict[str, Tensor]] = [{}]
    shard_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and shard_bytes + _num_bytes(tensor) > max_shard_size:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += _num_bytes(tensor)
    return shards


def _write(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Larger dtypes come first, as in the safetensors library, so that all data are aligned.
    order = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    for name in order:
        tensor, begin = tensors[name], end
        end += _num_bytes(tensor)
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


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file atomically, so that other processes never see an incomplete file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
