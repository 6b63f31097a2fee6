"""Where datasets lie, and how one comes to lie there: whole or not at all."""

import contextlib
import io
import os
import re
import socket
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import logging
from etils import epath

from mister_jax.data.lazy import tfds
from mister_jax.errors import InputError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

VERSION = "1.0.0"

REPORT = "report.json"
"""Beside a dataset of dialogues: what was written, see `builder.write_corpus`."""

# No dataset has such a name.
_REPLACED = ".replaced"


def dataset_directory(name: str, data_dir: epath.PathLike | None) -> epath.Path:
    """The place of a dataset, which need not exist.

    Args:
        name: `DATASET` or `DATASET/CONFIG`.
        data_dir: the directory that holds datasets; that of TFDS when None.

    Raises:
        InputError: the name is not legal.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)?", name):
        raise InputError(
            f"dataset name {name!r}; allowed: lower-case letters, digits and _, a letter first, "
            "and the same after a /"
        )
    return _root(data_dir) / name / VERSION


def stored(name: str, data_dir: epath.PathLike | None) -> "DatasetBuilder":
    """The TFDS builder of a dataset that is there.

    Raises:
        InputError: there is none of this name.
    """
    directory = dataset_directory(name, data_dir)
    info = directory / "dataset_info.json"
    if not info.exists():
        settle(name, data_dir)
    if not info.exists():
        root = _root(data_dir)
        there = sorted(
            str(info.parent.parent.relative_to(root))
            for pattern in ("*", "*/*")
            for info in root.glob(f"{pattern}/{VERSION}/features.json")
        )
        raise InputError(f"{root}: no dataset {name!r}; there are: {', '.join(there) or 'none'}")
    with quiet():
        return tfds.builder_from_directory(directory)


@contextlib.contextmanager
def staged(
    name: str, data_dir: epath.PathLike | None, *, overwrite: bool
) -> Iterator[tuple[epath.Path, epath.Path]]:
    """A place to write a dataset to, moved to where it belongs when the body ends well.

    Args:
        name: `DATASET` or `DATASET/CONFIG`.
        data_dir: see `dataset_directory`.
        overwrite: replace a dataset of this name.

    Yields:
        The `data_dir` to write under, and the directory the dataset will have.

    Raises:
        InputError: the dataset exists, or the directory cannot be written.
    """
    directory = dataset_directory(name, data_dir)
    if directory.exists() and not overwrite:
        raise InputError(f"{directory}: dataset exists; allowed: another name, or --overwrite")
    with whole_directory(directory, _root(data_dir), overwrite=overwrite) as place:
        yield place, directory


@contextlib.contextmanager
def whole_directory(
    directory: epath.Path, root: epath.Path, *, overwrite: bool
) -> Iterator[epath.Path]:
    """A place to write a directory in, which is there as a whole when the body ends well, or not.

    A process that is killed leaves its place behind; the next one cleans it up, see `clean_up`.

    Args:
        directory: to be made.
        root: a folder that holds it, at any depth; the place is made in it.
        overwrite: replace the directory if it exists.

    Yields:
        The place. What the body writes in it as `directory.relative_to(root)` becomes `directory`.

    Raises:
        InputError: the directory exists or cannot be written.
    """
    place = root / f"{_prefix(directory, root)}{os.getpid()}.{uuid.uuid4().hex}"
    try:
        place.mkdir(parents=True)
        clean_up(directory, root)
        if directory.exists() and not overwrite:
            raise InputError(f"{directory}: exists; allowed: another one, or --overwrite")
        yield place
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists():
            directory.rename(place / _REPLACED)
        (place / directory.relative_to(root)).rename(directory)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{directory}: cannot be written ({reason})") from error
    finally:
        if place.exists():
            _give_up(place, directory)


def settle(name: str, data_dir: epath.PathLike | None) -> None:
    """Does `clean_up` for a dataset, where its folder can be written.

    Raises:
        InputError: the name is not legal.
    """
    directory = dataset_directory(name, data_dir)
    with contextlib.suppress(OSError):  # A reader need not be able to write.
        clean_up(directory, _root(data_dir))


def clean_up(directory: epath.Path, root: epath.Path) -> None:
    """Removes what killed processes of this machine have left of a directory.

    One that was about to replace it may have been killed when the old one was put aside and the new
    one was not in its place. The old one then is put back.

    Args:
        directory: see `whole_directory`.
        root: the same as there.
    """
    if not root.exists():
        return
    prefix = _prefix(directory, root)
    for left in root.iterdir():
        if not left.name.startswith(prefix):
            continue
        process = left.name.removeprefix(prefix).partition(".")[0]
        if process.isdigit() and not _is_alive(int(process)):
            with contextlib.suppress(FileNotFoundError):  # Another process does the same.
                _give_up(left, directory)


def _prefix(directory: epath.Path, root: epath.Path) -> str:
    name = ".".join(directory.relative_to(root).parts)
    return f".incomplete.{name}.{socket.gethostname()}."


def _give_up(place: epath.Path, directory: epath.Path) -> None:
    replaced = place / _REPLACED
    if replaced.exists() and not directory.exists():
        replaced.rename(directory)
    place.rmtree()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS from telling of its progress and of the temporary places it works in."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    unread = io.StringIO()
    try:
        with contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _root(data_dir: epath.PathLike | None) -> epath.Path:
    return epath.Path(tfds.core.constants.DATA_DIR if data_dir is None else data_dir).expanduser()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
