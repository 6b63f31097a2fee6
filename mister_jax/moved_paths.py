"""Locates files after the folder that refers to them has moved.

The metadata of a work directory or dataset contain paths of other files, such as encoders, and the
location of the folder itself. A path that no longer exists is looked up at the same position
relative to the folder: if `project/` moves, `project/runs/first` finds `project/encoders/roberta`.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath


def location(folder: epath.PathLike) -> dict[str, str]:
    """Returns the JSON values that `find_moved` needs: a folder and the current directory."""
    current = str(pathlib.Path.cwd())
    return {"folder": _absolute(folder, current), "current_directory": current}


def find_moved(path: str, stored_location: Mapping[str, str], folder: epath.PathLike) -> str:
    """Returns the current path of a file or folder.

    Args:
      path: Path, absolute or relative to the current directory in `stored_location`.
      stored_location: Result of `location` when the path was stored.
      folder: Current path of the folder in `stored_location`.

    Returns:
      The first of these paths that exists: the unchanged path, the path relative to the current
      directory at the time of storage, and the path at the same position relative to the folder. If
      none of these paths exists, for example because `path` is a name on the Hugging Face Hub, the
      result is `path`.
    """
    if not path or "://" in path or epath.Path(path).exists():
        return path
    old_path = _absolute(path, stored_location["current_directory"])
    if epath.Path(old_path).exists():
        return old_path
    old_folder = stored_location["folder"]
    new_folder = _absolute(folder, str(pathlib.Path.cwd()))
    if "://" in old_folder or "://" in new_folder:
        return path
    moved = _absolute(os.path.relpath(old_path, old_folder), new_folder)
    return moved if epath.Path(moved).exists() else path


def find_moved_encoder(
    metadata: Mapping[str, Any], stored_location: Mapping[str, str], folder: epath.PathLike
) -> dict[str, Any]:
    """Returns an encoder's metadata with the current paths of its files; see `find_moved`.

    Args:
      metadata: Metadata that includes `Encoder.metadata`. All paths in the metadata are absolute.
      stored_location: Result of `location` when the metadata were stored.
      folder: Current path of the folder in `stored_location`.
    """

    def find(value: Any) -> Any:
        is_path = isinstance(value, str) and pathlib.Path(value).is_absolute()
        return find_moved(value, stored_location, folder) if is_path else value

    options = {name: find(value) for name, value in metadata.get("options", {}).items()}
    return {**metadata, "name": find(metadata.get("name")), "options": options}


def _absolute(path: epath.PathLike, directory: str) -> str:
    """Returns an absolute path without ".."; a URL is returned unchanged."""
    path = os.fspath(path)
    return path if "://" in path else os.path.normpath(pathlib.Path(directory, path))
