"""What every task has: how a config becomes dataclasses, and what the training loop asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict, config_dict

from mister_jax.errors import InputError
from mister_jax.parallel.partitioning import Partitioner
from mister_jax.parallel.sharding import ShardingRules

Batch = Mapping[str, Any]
Dataclass = TypeVar("Dataclass")


def dataclass_from_config(
    cls: type[Dataclass], config: ConfigDict, where: str, **given: Any
) -> Dataclass:
    """A frozen dataclass from a part of the config.

    Args:
      cls: a dataclass.
      config: its fields, some or all.
      where: name of the part, for errors.
      **given: fields that do not come from the config.

    Raises:
      InputError: an unknown field, or a value the dataclass does not allow.
    """
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()}
    allowed = sorted({field.name for field in dataclasses.fields(cls)} - set(given))  # type: ignore[arg-type]
    unknown = sorted(set(fields) - set(allowed))
    if unknown:
        raise InputError(f"{where}: unknown {', '.join(unknown)}; allowed are {', '.join(allowed)}")
    try:
        return cls(**fields, **given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error


def config_from_dataclass(
    cls: type[Any], *, without: Sequence[str] = (), **changes: Any
) -> ConfigDict:
    """A part of the config with every field of a dataclass, so that a flag can set any.

    Args:
      cls: a dataclass.
      without: fields that do not come from the config.
      **changes: values other than the defaults.
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


def config_seeds(config: ConfigDict) -> tuple[int, ...]:
    """The seeds that one training trains side by side.

    `config.seed` and those that follow it, `config.num_seeds` of them. They differ in initial
    parameters and dropout, and share the order of batches, which `config.data.seed` decides; where
    that is None it is `config.seed`. So a training of one of the seeds alone, with the same
    `config.data.seed`, gives the same parameters.

    Raises:
      InputError: less than one, or several of a task that trains one at a time.
    """
    count = config.get("num_seeds", 1)
    if count < 1:
        raise InputError(f"config.num_seeds={count}; allowed: 1 or more")
    if count > 1 and config.task != "fusion":
        raise InputError(
            f"config.num_seeds={count}; allowed for the task {config.task} is 1: train an encoder "
            "once for each seed, each in a workdir of its own"
        )
    return tuple(range(config.seed, config.seed + count))


class Split(Protocol):
    """One split of a dataset, in batches that are a function of (seed, epoch, step, process)."""

    @property
    def steps(self) -> int:
        """Batches in an epoch."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The distinct rows and padded lengths of its global batches."""

    @property
    def padding_share(self) -> float:
        """Share of positions that hold no utterance."""

    def fingerprint(self) -> str:
        """Of what is in it: that of a dataset with other content is another."""

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of each batch of an epoch, from `start_step` on."""


class Task(Protocol):
    """A kind of training."""

    class_names: tuple[str, ...]
    oom_hint: str
    """What in the config makes a training take less memory."""
    notes: tuple[str, ...]
    """What the user should know of the choices made from the data, a line each."""

    def description(self) -> dict[str, Any]:
        """What `restore` needs beside the config, plain JSON values."""

    def split(self, name: str, *, num_shards: int, shuffle: bool) -> Split:
        """A split of the dataset, in batches whose rows are a multiple of `num_shards`.

        With `shuffle`, for training, what shares a batch does not hang on `num_shards`.
        """

    @property
    def trainable(self) -> Any:
        """The `nnx` filter of the parameters that are trained; the others are never saved."""

    @property
    def rules(self) -> ShardingRules:
        """How parameters are sharded over devices, see `parallel.partitioning.shardings`."""

    def init(self, key: jax.Array) -> nnx.Module:
        """The model with initial parameters; may be traced, reads no file."""

    def load(self, key: jax.Array, partitioner: Partitioner) -> nnx.Module:
        """The model a training starts from, with weights of a checkpoint where it has any."""

    def loss(
        self, model: Any, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """This device's share of the loss of a batch, and the shares of its parts."""

    def evaluate(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """This device's share of sums over a batch: "confusion" [C, C], "cross_entropy" []."""

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """What is predicted for each utterance of a batch."""
