"""Description of a training run in its work directory: config, model, data and versions.

A work directory belongs to one experiment: a resumed run must have the same config and data.
Training writes all its files here, and the later stages read them.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mister_jax.console import parameter_table
from mister_jax.errors import InputError
from mister_jax.io import flatten, read_json, write_json, write_text

FORMAT = 4
"""Version of the work directory's format; increment it if config or parameter names change."""

_CONFIG, _MODEL, _DATA, _VERSIONS = "config.json", "model.json", "data.json", "versions.json"
# Config fields that a resumed run may change, because they do not affect the parameters.
_MUTABLE_ON_RESUME = ("data.data_dir", "train.log_every", "train.save_every", "parallel")
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
    """Returns the path of the config, which is written last when a work directory is created."""
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
      data: Fingerprint of each split, and the training split's "steps_per_epoch".
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
    write_json(workdir / _MODEL, {"format": FORMAT, **model})
    write_json(workdir / _DATA, data)
    # The config is last: a work directory that has one is complete.
    write_json(config_path(workdir), _to_json(config))


def read_config(workdir: epath.PathLike) -> ConfigDict:
    """Reads the config of a work directory.

    Raises:
      InputError: The config is missing or damaged.
    """
    path = config_path(workdir)
    if not path.exists():
        raise InputError(
            f"{path}: no such file; the workdir must be a directory that `mister-jax train` has "
            "written"
        )
    try:
        return ConfigDict(read_json(path))
    except InputError:
        raise
    except ValueError as error:  # For example, a field name contains a dot.
        raise InputError(f"{path}: not a readable config ({error})") from error


def read_model_description(workdir: epath.PathLike) -> dict[str, Any]:
    """Reads the model description of a work directory.

    Raises:
      InputError: The description is missing or damaged, or its format is older than `FORMAT`.
    """
    description = read_json(epath.Path(workdir) / _MODEL)
    if description.get("format") != FORMAT:
        raise InputError(
            f"{workdir}: written by an older version of mister_jax; train it again, or use the "
            f"version in its {_VERSIONS}"
        )
    return description


def check_config(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Raises InputError if the work directory has another config or is from an older version."""
    if not config_path(workdir).exists():
        return
    read_model_description(workdir)
    changes = _list_changes(_to_json(read_config(workdir)), _to_json(config))
    if changes:
        raise InputError(
            f"{workdir}: created with another config ({changes}); use that config, or another "
            "workdir"
        )


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
    """Lists the differences, except in fields that a resumed run may change."""
    old, new = flatten(old), flatten(new)
    return ", ".join(
        f"{name} {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(_MUTABLE_ON_RESUME)
    )


def _to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the config's JSON values, which have lists instead of tuples."""
    values: dict[str, Any] = json.loads(config.to_json_best_effort())
    return values
