"""Reads and writes text, JSON and PNG files on local disks and in cloud buckets."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from mister_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FULLY_HASHED, _BLOCK, _NUM_BLOCKS = 2**26, 2**16, 64  # bytes, bytes, count; see `hash_file`


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a text file atomically."""
    path = epath.Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_png(path: epath.PathLike, figure: Figure) -> None:
    """Writes a Matplotlib figure as a PNG file."""
    # Matplotlib cannot write to a bucket.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    epath.Path(path).write_bytes(buffer.getvalue())


def hash_file(path: epath.PathLike) -> str:
    """Returns a hash of a file's size and content, as 16 hexadecimal digits.

    For files larger than 64 MiB, only 64 blocks of 64 KiB are read, so hashing a checkpoint of many
    gigabytes takes milliseconds. Training changes weights in all layers, so it changes the hash.
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        if size <= _FULLY_HASHED:
            digest.update(file.read())
        else:
            for index in range(_NUM_BLOCKS):
                file.seek(index * (size - _BLOCK) // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      InputError: The file does not exist or does not contain a JSON object.
    """
    text = _read_text(path, needed="a file that a mister_jax command has written")
    return _parse_object(text, f"{path}")


def read_json_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """Reads the objects in a JSON Lines file.

    Raises:
      InputError: The file does not exist or a line is not a JSON object.
    """
    # `splitlines` would also split at Unicode line separators, which JSON strings may contain.
    lines = _read_text(path, needed="JSON Lines").split("\n")
    return [
        _parse_object(line, f"{path}: line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings into one dict with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _read_text(path: epath.PathLike, needed: str) -> str:
    try:
        return epath.Path(path).read_text()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; needed: {needed}") from error
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); needed: {needed}") from error


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"it contains a {type(value).__name__}")
    except ValueError as error:
        raise InputError(f"{where}: damaged ({error}); needed: a JSON object") from error
    return value


def embedded_json(value: Any) -> str:
    """Returns compact JSON in which characters that could end a `script` element are escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
