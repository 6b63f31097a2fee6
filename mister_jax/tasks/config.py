"""Conversion between `ml_collections` configs and frozen dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict, config_dict

from mister_jax.errors import InputError

Dataclass = TypeVar("Dataclass")


_SECTIONS = ("data", "loss", "optimizer", "train", "parallel")
_TOP_FIELDS = ("task", "seed", "num_seeds", "model", "encoder", "head")
_DATA_FIELDS = (
    *("name", "data_dir", "batch_size", "num_buckets", "standardize", "sampling", "seed"),
    *("folds", "fold", "fold_seed", "fold_splits", "validate_on_train"),
)
_REQUIRED = ("task", "seed", *_SECTIONS, "data.name", "data.data_dir", "data.batch_size")
_MAX_SEED = 2**31  # Seeds of NumPy and JAX also fit in 32 bits.


def dataclass_from_config(
    cls: type[Dataclass], config: ConfigDict, where: str, **other_fields: Any
) -> Dataclass:
    """Creates a dataclass instance from a config section.

    Args:
      cls: Dataclass.
      config: Section with some or all fields of the dataclass.
      where: Name of the section, for error messages.
      **other_fields: Fields that do not come from the config.

    Raises:
      InputError: The section has an unknown field or a value that the dataclass rejects.
    """
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.default is None and fields.get(field.name) == "None":  # from the command line
            fields[field.name] = None
    allowed = sorted({field.name for field in dataclasses.fields(cls)} - set(other_fields))  # type: ignore[arg-type]
    unknown = sorted(set(fields) - set(allowed))
    if unknown:
        raise InputError(f"{where}: unknown {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    try:
        return cls(**fields, **other_fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error


def config_from_dataclass(
    cls: type[Any], *, without: Sequence[str] = (), **changes: Any
) -> ConfigDict:
    """Creates a config section with all fields of a dataclass, so that flags can set them.

    Args:
      cls: Dataclass.
      without: Names of the fields to leave out.
      **changes: Values that replace the defaults.
    """
    config = ConfigDict()
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        value = changes.pop(field.name, field.default)
        config[field.name] = config_dict.placeholder(str) if value is None else value
    if changes:
        raise TypeError(f"{cls.__name__} has no {', '.join(changes)}")
    return config


def check_sections(config: Any) -> None:
    """Checks the names of an experiment's config sections, and of the fields in `config.data`.

    The fields of the other sections are checked by `dataclass_from_config`.

    Raises:
      InputError: A section or a field is unknown, or a required section is missing.
    """
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"config: a {type(config).__name__}; needed: an ml_collections.ConfigDict, which the "
            "file's get_config returns"
        )
    for name in _SECTIONS:
        if not isinstance(config.get(name, ConfigDict()), ConfigDict):
            raise InputError(f"config.{name}={config[name]!r}; needed: a section with fields")
    present = {*config, *(f"data.{name}" for name in config.get("data", ()))}
    missing = [name for name in _REQUIRED if name not in present]
    if missing:
        raise InputError(f"config: {', '.join(missing)} missing; needed in every experiment")
    for where, section, allowed in (
        ("config", config, (*_TOP_FIELDS, *_SECTIONS)),
        ("config.data", config.data, _DATA_FIELDS),
    ):
        unknown = [name for name in section if name not in allowed]
        if unknown:
            raise InputError(
                f"{where}: unknown {', '.join(unknown)}; allowed: {', '.join(sorted(allowed))}"
            )


def config_seeds(config: ConfigDict) -> tuple[int, ...]:
    """Returns the seeds that a run trains together.

    These are `config.num_seeds` consecutive seeds, starting at `config.seed`. Their models differ
    in initial parameters and dropout but share the batch order, which depends on
    `config.data.seed` (by default `config.seed`). Training one of the seeds alone with the same
    `config.data.seed` gives the same parameters up to rounding.

    Raises:
      InputError: The seed is out of range, or the number of seeds is below 1, or above 1 for a
        task that supports only one.
    """
    count = config.get("num_seeds", 1)
    if count < 1:
        raise InputError(f"config.num_seeds={count}; allowed: 1 or more")
    if not 0 <= config.seed <= _MAX_SEED - count:
        raise InputError(f"config.seed={config.seed}; allowed: 0 to {_MAX_SEED - count}")
    if count > 1 and config.task != "fusion":
        raise InputError(
            f"config.num_seeds={count}; the task {config.task} supports only 1: train each seed in "
            "a separate workdir"
        )
    return tuple(range(config.seed, config.seed + count))
