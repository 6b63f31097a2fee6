"""What a report says about the training run: config, checkpoint, versions and date."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mister_jax.checkpoint import BEST
from mister_jax.errors import InputError
from mister_jax.io import read_json
from mister_jax.workdir import read_config


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training run and its evaluated checkpoint.

    Attributes:
      name: Name of the work directory.
      config: Config of the run, nested.
      epochs: Best epoch of each seed, counted from 1.
      versions: Versions of packages, and the device.
      date: When the checkpoint was saved, None if unknown.
    """

    name: str
    config: Mapping[str, Any]
    epochs: Sequence[int]
    versions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: str | None = None

    @classmethod
    def from_workdir(cls, workdir: epath.PathLike, checkpoint: Mapping[str, Any]) -> Experiment:
        """Reads the experiment of a work directory.

        Args:
          workdir: Work directory of the training run.
          checkpoint: The "checkpoint" of `evaluate`'s result, with the best epoch or epochs.

        Raises:
          InputError: The folder is not a work directory.
        """
        workdir = epath.Path(workdir)
        config = json.loads(read_config(workdir).to_json_best_effort())
        versions = workdir / "versions.json"
        return cls(
            name=workdir.name,
            config=config,
            epochs=checkpoint.get("epochs") or (checkpoint["epoch"],),
            versions=read_json(versions) if versions.exists() else {},
            date=_checkpoint_date(workdir / "checkpoints" / BEST),
        )


def _checkpoint_date(folder: epath.Path) -> str | None:
    """Returns when the newest checkpoint was saved.

    The date comes from the checkpoint's metadata, which copying the folder does not change.
    """
    timestamps = []
    for path in folder.glob("*/_CHECKPOINT_METADATA"):
        with contextlib.suppress(InputError):  # The checkpoint can be read without its metadata.
            timestamp = read_json(path).get("commit_timestamp_nsecs")
            if timestamp:
                timestamps.append(timestamp)
    if not timestamps:
        return None
    date = datetime.datetime.fromtimestamp(max(timestamps) / 1e9, datetime.UTC)
    return f"{date:%Y-%m-%d %H:%M} UTC"
