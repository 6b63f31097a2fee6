"""Finds, opens and atomically writes datasets and directories."""

import contextlib
import io
import os
import re
import socket
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import logging
from etils import epath

from mister_jax.data.lazy import import_tensorflow, tfds
from mister_jax.data.split_guard import check_split_allowed
from mister_jax.data.tfrecord import read_records
from mister_jax.errors import InputError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

VERSION = "1.0.0"

REPORT = "report.json"
"""File in a dialogue dataset's directory with the report of `corpus_report.make_report`."""

# Name of the old directory during a replacement. No dataset can have this name.
_REPLACED = ".replaced"


def dataset_directory(name: str, data_dir: epath.PathLike | None) -> epath.Path:
    """Returns the directory of a dataset `DATASET` or `DATASET/CONFIG`. It need not exist.

    Raises:
        InputError: The name is not allowed.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)?", name):
        raise InputError(
            f"dataset name {name!r}; allowed: NAME or NAME/CONFIG, each of lower-case letters, "
            "digits and _, starting with a letter"
        )
    return _root(data_dir) / name / VERSION


def open_builder(name: str, data_dir: epath.PathLike | None) -> "DatasetBuilder":
    """Returns the TFDS builder of an existing dataset.

    Raises:
        InputError: The dataset does not exist.
    """
    directory = dataset_directory(name, data_dir)
    info = directory / "dataset_info.json"
    if not info.exists():
        recover(name, data_dir)
    if not info.exists():
        root = _root(data_dir)
        names = sorted(
            str(path.parent.parent.relative_to(root))
            for pattern in ("*", "*/*")
            for path in root.glob(f"{pattern}/{VERSION}/features.json")
        )
        raise InputError(f"{root}: no dataset {name!r}; available: {', '.join(names) or 'none'}")
    with silence_tfds():
        return tfds.builder_from_directory(directory)


def utterance_fields(builder: "DatasetBuilder") -> dict[str, Any]:
    """Returns each utterance field's TFDS feature, or {} if the dataset has no `utterances`."""
    return getattr(dict(builder.info.features.items()).get("utterances"), "feature", {})


def split_sizes(builder: "DatasetBuilder") -> dict[str, int]:
    """Returns the number of dialogues in each split that is not empty."""
    splits = builder.info.splits
    return {name: split.num_examples for name, split in splits.items() if split.num_examples}


def check_split(builder: "DatasetBuilder", split: str) -> None:
    """Checks that a split may be opened.

    Raises:
        InputError: The split does not exist, or is empty.
        RuntimeError: The test split is opened during training.
    """
    check_split_allowed(split)
    sizes = split_sizes(builder)
    if split not in sizes:
        raise InputError(f"{builder.data_dir}: no split {split!r}; allowed: {', '.join(sizes)}")


def read_split(builder: "DatasetBuilder", split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split in stored order, decoded with NumPy.

    Raises:
        InputError: The split does not exist, or a file is missing or damaged.
        RuntimeError: The test split is opened during training.
    """
    check_split(builder, split)
    info = builder.info.splits[split]
    records = read_records(info.filepaths, info.shard_lengths)
    return map(builder.info.features.deserialize_example_np, records)


@contextlib.contextmanager
def atomic_dataset(
    name: str, data_dir: epath.PathLike | None, *, overwrite: bool
) -> Iterator[epath.Path]:
    """Yields a temporary `data_dir` for a dataset, and moves the dataset into place on success.

    Raises:
        InputError: The dataset exists, or the directory cannot be written.
    """
    import_tensorflow()
    directory = dataset_directory(name, data_dir)
    if directory.exists() and not overwrite:
        raise InputError(f"{directory}: dataset exists; allowed: another name, or --overwrite")
    with atomic_directory(directory, _root(data_dir), overwrite=overwrite) as temporary:
        yield temporary


@contextlib.contextmanager
def atomic_directory(
    directory: epath.Path, root: epath.Path, *, overwrite: bool
) -> Iterator[epath.Path]:
    """Yields a temporary folder, and on success moves the new directory to `directory`.

    If the `with` block fails, `directory` does not change. If the process is killed, the temporary
    folder remains until the next call; see `recover_directory`.

    Yields:
        A temporary folder in `root`. The `with` block must write the new contents to the subfolder
        `directory.relative_to(root)`.

    Raises:
        InputError: The directory exists or cannot be written.
    """
    temporary = root / f"{_prefix(directory, root)}{os.getpid()}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        recover_directory(directory, root)
        if directory.exists() and not overwrite:
            raise InputError(f"{directory}: exists; allowed: another directory, or --overwrite")
        yield temporary
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists():
            directory.rename(temporary / _REPLACED)
        (temporary / directory.relative_to(root)).rename(directory)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{directory}: cannot be written ({reason})") from error
    finally:
        if temporary.exists():
            _rollback(temporary, directory)


def recover(name: str, data_dir: epath.PathLike | None) -> None:
    """Cleans up after processes that were killed while writing a dataset.

    See `recover_directory`.
    """
    directory = dataset_directory(name, data_dir)
    with contextlib.suppress(OSError):  # Readers may lack write permission.
        recover_directory(directory, _root(data_dir))


def recover_directory(directory: epath.Path, root: epath.Path) -> None:
    """Removes temporary folders for `directory` that killed processes on this machine left.

    If a process was killed after it moved the old directory away and before it moved the new
    directory into place, the old directory is restored.
    """
    if not root.exists():
        return
    prefix = _prefix(directory, root)
    for path in root.iterdir():
        process = path.name.removeprefix(prefix).partition(".")[0]
        if path.name.startswith(prefix) and process.isdigit() and not _is_alive(int(process)):
            with contextlib.suppress(FileNotFoundError):  # Another process may remove the folder.
                _rollback(path, directory)


def _prefix(directory: epath.Path, root: epath.Path) -> str:
    name = ".".join(directory.relative_to(root).parts)
    return f".incomplete.{name}.{socket.gethostname()}."


def _rollback(temporary: epath.Path, directory: epath.Path) -> None:
    replaced = temporary / _REPLACED
    if replaced.exists() and not directory.exists():
        replaced.rename(directory)
    temporary.rmtree()


@contextlib.contextmanager
def silence_tfds() -> Iterator[None]:
    """Hides TFDS's progress bars, and its messages, which contain temporary paths."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    discarded = io.StringIO()
    try:
        with contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _root(data_dir: epath.PathLike | None) -> epath.Path:
    return epath.Path(tfds.core.constants.DATA_DIR if data_dir is None else data_dir).expanduser()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
