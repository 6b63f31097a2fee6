"""Finds recordings in a folder whose layout differs from the paths in a corpus's metadata."""

import collections
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from mister_jax.data.audio_source import RECORDING_SUFFIXES
from mister_jax.errors import InputError


def list_recordings(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the recordings below a folder in sorted order, and follows links to folders.

    The search skips hidden files, hidden folders, and `__MACOSX`, which archive programs add.
    """
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        # A link to a parent folder would cause an endless loop.
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(
            name
            for name in folders
            if not _is_junk(name) and os.path.realpath(f"{parent}/{name}") not in visited
        )
        for name in sorted(files):
            path = pathlib.Path(parent, name)
            if not _is_junk(name) and path.suffix.lower() in RECORDING_SUFFIXES:
                yield path


def find_recordings(folder: pathlib.Path, paths: Iterable[str]) -> dict[str, pathlib.Path]:
    """Finds recordings by their paths in the metadata, in a folder of any layout.

    A path is matched by its last components, without the extension. For example,
    `downloads/urdu/Sad/SF1_S01.wav` matches `Sad/SF1_S01.flac` and `SF1_S01.flac`. A match is not
    used if another path in the metadata ends in the same components. For example, if the folder of
    a speaker is missing, `neutral/239.wav` of another speaker is not used instead.

    Args:
        folder: Folder of the recordings.
        paths: Paths in the metadata, with `/` between components.

    Returns:
        The file for each path whose recording was found.

    Raises:
        InputError: Several files match a path equally well.
    """
    keys = {path: _key(path) for path in paths}
    num_paths = collections.Counter(
        key[start:] for key in set(keys.values()) for start in range(len(key))
    )
    files = collections.defaultdict(list)
    for file in list_recordings(folder):
        key = _key(file.relative_to(folder).as_posix())
        files[key[-1]].append((key, file))
    recordings = {}
    for path, key in keys.items():
        matches = [(_num_common(key, other), file) for other, file in files.get(key[-1], ())]
        num_common = max((count for count, _ in matches), default=0)
        if not num_common or num_paths[key[-num_common:]] > 1:
            continue
        best = [file for count, file in matches if count == num_common]
        if len(best) > 1:
            best = [file for file in best if file.suffix == pathlib.Path(path).suffix] or best
        if len(best) > 1:
            raise InputError(
                f"{path}: matches {best[0]} and {best[1]}; needed: one file, or a folder that "
                "contains only one of them"
            )
        recordings[path] = best[0]
    return recordings


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _key(path: str) -> tuple[str, ...]:
    """Returns the components of a path without its extension."""
    suffix = pathlib.PurePosixPath(path).suffix
    if suffix.lower() in RECORDING_SUFFIXES:
        path = path.removesuffix(suffix)
    # macOS decomposes accented letters in file names.
    return tuple(unicodedata.normalize("NFC", path).replace("\\", "/").split("/"))


def _num_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Returns the number of equal components at the end of two paths."""
    count = 0
    for left, right in zip(reversed(first), reversed(second), strict=False):
        if left != right:
            break
        count += 1
    return count
