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
    if not (directory / "dataset_info.json").exists():
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

    What killed processes of this machine have left of the same dataset is removed.

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
        raise InputError(f"{directory}: dataset exists; allowed: another name, or to overwrite it")
    root = _root(data_dir)
    prefix = f".incomplete.{name.replace('/', '.')}.{socket.gethostname()}."
    incomplete = root / f"{prefix}{os.getpid()}.{uuid.uuid4().hex}"
    try:
        incomplete.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{root}: cannot be written ({error.strerror})") from error
    try:
        for left in root.glob(f"{prefix}*"):
            process = left.name.removeprefix(prefix).partition(".")[0]
            if process.isdigit() and not _is_alive(int(process)):
                left.rmtree()
        yield incomplete, directory
        written = incomplete / name / VERSION
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists():
            directory.rename(incomplete / "replaced")
        written.rename(directory)
    finally:
        incomplete.rmtree()


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
