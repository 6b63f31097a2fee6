"""Atomic writing and reading of text and JSON files, on disks and buckets."""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epath

from mister_jax.errors import InputError


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a file atomically."""
    path = epath.Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a value atomically as readable JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      InputError: The file does not exist, or does not hold a JSON object.
    """
    path = epath.Path(path)
    try:
        return _object(path.read_text())
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; needed: what a command has written there"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); needed: a JSON object") from error


def read_json_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """Reads the objects of a JSON Lines file.

    Raises:
      InputError: The file does not exist, or a line is not a JSON object.
    """
    path = epath.Path(path)
    try:
        # Not splitlines: JSON text may hold the other line separators of Unicode.
        lines = path.read_text().split("\n")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; needed: JSON Lines") from error
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); needed: JSON Lines") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(_object(line))
            except ValueError as error:
                raise InputError(
                    f"{path}: line {number}: damaged ({error}); needed: a JSON object"
                ) from error
    return rows


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}")
    return value
