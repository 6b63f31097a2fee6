"""Description of a training run in its work directory: config, model, data and versions.

A work directory belongs to one experiment: a resumed run must have the same data and, except for a
few fields such as the number of epochs, the same config. Training writes all its files to the work
directory. Evaluation, prediction and export read them. `checkpoint` writes the checkpoints.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mister_jax.console import parameter_table
from mister_jax.errors import InputError
from mister_jax.io import flatten, read_json, write_json, write_text
from mister_jax.moved_paths import find_moved, find_moved_encoder, location

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 4
"""Version of the work directory's format; increment it if config or parameter names change."""

_CONFIG, _MODEL, _DATA, _VERSIONS = "config.json", "model.json", "data.json", "versions.json"
# Config fields that a resumed run may change: the directory of the datasets, the length of
# training, logging, saving and parallelism. `check_config` does not allow fewer epochs.
_MUTABLE_ON_RESUME = (
    "data.data_dir",
    "train.epochs",
    "train.patience",
    "train.log_every",
    "train.save_every",
    "train.min_save_seconds",
    "parallel",
)
# Fields that all tasks need in the config of a work directory.
_REQUIRED_FIELDS = (
    "task",
    "seed",
    "data.name",
    "data.data_dir",
    "data.batch_size",
    "train.epochs",
)
# Fields of `encoder.options` that contain paths.
_ENCODER_PATHS = ("name", "whisper", "beats", "vicuna")
_PACKAGES = (
    "mister_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "ml-collections",
)


def config_path(workdir: epath.PathLike) -> epath.Path:
    """Returns the path of the config; a work directory with a config is complete."""
    return epath.Path(workdir) / _CONFIG


def write_description(
    workdir: epath.PathLike,
    config: ConfigDict,
    model: Mapping[str, Any],
    params: Any,
    data: Mapping[str, Any],
) -> None:
    """Writes the config, model description, parameter table, data fingerprint and versions.

    Args:
      workdir: Work directory; created if missing.
      config: Experiment config.
      model: Result of the task's `description()`.
      params: Parameters of one seed.
      data: Fingerprint of each split, and the training split's "steps_per_epoch" and
        "planned_epochs".
    """
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    versions = {
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "backend": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }
    write_json(workdir / _VERSIONS, versions)
    write_text(workdir / "parameters.txt", parameter_table(params))
    write_json(workdir / _MODEL, {"format": FORMAT, "location": location(workdir), **model})
    write_json(workdir / _DATA, data)
    # Written last; see `config_path`.
    write_json(config_path(workdir), _to_json(config))


def read_config(workdir: epath.PathLike) -> ConfigDict:
    """Reads the config of a work directory.

    If the datasets or encoders have moved together with the work directory, their paths are
    updated. If the directory of the datasets no longer exists, it is replaced by TFDS's default
    directory, so that TFDS looks up the dataset by name.

    Raises:
      InputError: The config is missing or damaged, or fields of the config are missing.
    """
    path = config_path(workdir)
    if not path.exists():
        raise InputError(
            f"{path}: no such file; the workdir must be a directory that `mister-jax train` has "
            "written"
        )
    try:
        values = read_json(path)
        fields = flatten(values)
        missing = [name for name in _REQUIRED_FIELDS if name not in fields]
        if "model_type" in fields:
            raise InputError(
                f"{path}: an encoder in the Hugging Face layout; needed: a directory that "
                "`mister-jax train` or `mister-jax export` has written"
            )
        if (epath.Path(workdir) / "model.stablehlo").exists():
            raise InputError(
                f"{workdir}: a StableHLO program, which JAX runs without this package (see its "
                "README.md); needed: a directory that `mister-jax train` has written, or a bundle"
            )
        if missing:
            raise InputError(
                f"{path}: {', '.join(missing)} missing; needed: the config that `mister-jax train` "
                "has written"
            )
        return _find_files(ConfigDict(values), workdir)
    except InputError:
        raise
    except ValueError as error:  # For example, a field name contains a dot.
        raise InputError(f"{path}: not a readable config ({error})") from error


def _find_files(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """Replaces paths in a config if they no longer exist; see `read_config`."""
    model = epath.Path(workdir) / _MODEL
    stored_location = read_json(model).get("location") if model.exists() else None
    if stored_location is None:
        return config
    data = config.get("data", {})
    if data.get("data_dir"):
        data_dir = find_moved(data.data_dir, stored_location, workdir)
        data.data_dir = data_dir if epath.Path(data_dir).exists() else None
    options = config.get("encoder", {}).get("options", {})
    for name in _ENCODER_PATHS:
        if options.get(name):
            options[name] = find_moved(options[name], stored_location, workdir)
    train = config.get("train", {})
    if train.get("init_from"):
        train.init_from = find_moved(train.init_from, stored_location, workdir)
    return config


def read_model_description(workdir: epath.PathLike) -> dict[str, Any]:
    """Reads the model description of a work directory, with the current paths of the encoders.

    Raises:
      InputError: The description is missing or damaged, or its format is not `FORMAT`.
    """
    description = read_json(epath.Path(workdir) / _MODEL)
    written_format = description.get("format")
    if isinstance(written_format, int) and written_format > FORMAT:
        raise InputError(f"{workdir}: written by a newer version of mister_jax; upgrade mister_jax")
    if written_format != FORMAT:
        raise InputError(
            f"{workdir}: written by an older version of mister_jax; train it again, or use the "
            f"version in its {_VERSIONS}"
        )
    stored_location = description.pop("location", None)
    if stored_location is not None and "encoders" in description:
        description["encoders"] = {
            modality: find_moved_encoder(metadata, stored_location, workdir)
            for modality, metadata in description["encoders"].items()
        }
    return description


@contextlib.contextmanager
def lock(workdir: epath.PathLike) -> Iterator[None]:
    """Creates a work directory, and keeps other processes from training in it at the same time.

    The operating system releases the lock when the process ends. File systems without locks, such
    as cloud storage, are not protected.

    Raises:
      InputError: Another process is training in the work directory.
    """
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if fcntl is not None and pathlib.Path(workdir).is_dir():
            directory = os.open(workdir, os.O_RDONLY)
            stack.callback(os.close, directory)
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"{workdir}: another process is training in this work directory; wait until it "
                    "has ended, or use another workdir"
                ) from error
            except OSError:
                pass  # Some network file systems cannot lock directories.
        yield


def check_config(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Checks that a config can resume the run in a work directory, if the directory has a run.

    Raises:
      InputError: The work directory has another config, was created with more epochs than this
        config has, or has another format than `FORMAT`.
    """
    if not config_path(workdir).exists():
        return
    read_model_description(workdir)
    old_config = read_config(workdir)
    changes = _list_changes(_to_json(old_config), _to_json(config))
    if changes:
        raise InputError(
            f"{workdir}: created with another config ({changes}); use that config, or another "
            "workdir"
        )
    if config.train.epochs < old_config.train.epochs:
        raise InputError(
            f"{workdir}: created with config.train.epochs={old_config.train.epochs}, got "
            f"{config.train.epochs}; allowed: at least as many, or another workdir"
        )


def read_planned_epochs(workdir: epath.PathLike) -> int | None:
    """Returns the number of epochs that batches are planned for; None without a work directory.

    This number is the value of `config.train.epochs` when training first started. Continuing for
    more epochs does not change the batches.
    """
    if not config_path(workdir).exists():
        return None
    train_data = read_json(epath.Path(workdir) / _DATA).get("train", {})
    planned_epochs: int | None = train_data.get("planned_epochs")
    return planned_epochs


def read_fingerprints(workdir: epath.PathLike) -> dict[str, str]:
    """Returns the hash of each split's content when training started; {} if it is unknown."""
    path = epath.Path(workdir) / _DATA
    data = read_json(path) if path.exists() else {}
    return {
        split: values["fingerprint"] for split, values in data.items() if "fingerprint" in values
    }


def check_data(data: Mapping[str, Any], dataset: str, workdir: epath.PathLike) -> None:
    """Checks that the data have not changed since the work directory was created.

    Args:
      data: Fingerprints of the splits; see `write_description`.
      dataset: Name of the dataset, used in the error message.
      workdir: Work directory of the training run.

    Raises:
      InputError: The data have changed.
    """
    path = epath.Path(workdir) / _DATA
    if not config_path(workdir).exists() or not path.exists():
        return
    changes = _list_changes(read_json(path), data)
    if changes:
        raise InputError(
            f"{workdir}: dataset {dataset} has changed since the workdir was created ({changes}); "
            "use the original data, or another workdir"
        )


def _list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Lists the changed values, except in config fields that a resumed run may change."""
    old, new = flatten(old), flatten(new)
    return ", ".join(
        f"{name} {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(_MUTABLE_ON_RESUME)
    )


def _to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as JSON values, with lists instead of tuples."""
    values: dict[str, Any] = json.loads(config.to_json_best_effort())
    return values
