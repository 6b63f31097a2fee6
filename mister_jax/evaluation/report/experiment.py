"""Renders a report's header: config, checkpoint, versions and date of the training run."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from etils import epath

from mister_jax.checkpoint import BEST
from mister_jax.errors import InputError
from mister_jax.evaluation.report.elements import details, element, table
from mister_jax.evaluation.split_predictions import SplitPredictions
from mister_jax.io import flatten, read_json
from mister_jax.workdir import read_config

# Local paths are private and do not affect the experiment.
_HIDDEN_FIELDS = ("data.data_dir",)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training run and its evaluated checkpoint.

    Attributes:
      name: Name of the work directory.
      config: Config of the training run.
      epochs: Epoch of each seed's evaluated parameters, counted from 1.
      versions: Versions of packages, and the device.
      date: Date when the checkpoint was saved; None if unknown.
    """

    name: str
    config: Mapping[str, Any]
    epochs: Sequence[int]
    versions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: str | None = None

    @classmethod
    def from_workdir(cls, workdir: epath.PathLike, checkpoint: Mapping[str, Any]) -> Experiment:
        """Reads an experiment from its work directory.

        Args:
          workdir: Work directory of the training run.
          checkpoint: Entry "checkpoint" in the result of `evaluate`.

        Raises:
          InputError: The folder is not a work directory.
        """
        workdir = epath.Path(workdir)
        config = json.loads(read_config(workdir).to_json_best_effort())
        versions = workdir / "versions.json"
        return cls(
            name=workdir.name,
            config=config,
            # With several seeds, the entry is a list.
            epochs=np.ravel(checkpoint["epoch"]).tolist(),
            versions=read_json(versions) if versions.exists() else {},
            date=_checkpoint_date(workdir / "checkpoints" / BEST),
        )


def _checkpoint_date(folder: epath.Path) -> str | None:
    """Reads the newest checkpoint's date from its metadata, because copying changes file dates."""
    newest = 0
    for path in folder.glob("*/_CHECKPOINT_METADATA"):
        with contextlib.suppress(InputError):  # Unreadable metadata must not prevent a report.
            newest = max(newest, read_json(path).get("commit_timestamp_nsecs") or 0)
    if not newest:
        return None
    return f"{datetime.datetime.fromtimestamp(newest / 1e9, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def render_header(predictions: SplitPredictions, experiment: Experiment) -> str:
    """Renders the dataset, the split, and the config and other facts of the training run."""
    config = flatten(experiment.config)
    facts = "".join(
        element("dt", escape(name)) + element("dd", escape(value))
        for name, value in _facts(predictions, experiment, config).items()
        if value
    )
    rows = [
        (escape(name), escape(json.dumps(value, ensure_ascii=False)))
        for name, value in config.items()
        if name not in _HIDDEN_FIELDS
    ]
    task = str(config.get("task", "")).replace("_", " ")
    kicker = f"Evaluation report · {task}" if task else "Evaluation report"
    title = f"{escape(predictions.dataset)} <span>{escape(predictions.split)}</span>"
    return "\n".join(
        (
            element("p", escape(kicker), class_="kicker"),
            element("h1", title),
            element("p", escape(experiment.name), class_="experiment"),
            element("dl", facts, class_="facts"),
            details("Full config", table("Config", ("field", "value"), rows, "config")),
        )
    )


def _facts(
    predictions: SplitPredictions, experiment: Experiment, config: Mapping[str, Any]
) -> dict[str, str]:
    unlabeled = int((~predictions.labeled).sum())
    split = (
        f"{predictions.split}: {len(predictions.dialogue_ids):,} dialogues, "
        f"{len(predictions.label):,} utterances"
        + (f" ({unlabeled:,} unlabeled)" if unlabeled else "")
        + f", {len(predictions.class_names)} classes"
    )
    epochs = experiment.epochs
    checkpoint = f"{'epoch' if len(epochs) == 1 else 'epochs'} {', '.join(map(str, epochs))}"
    if "train.epochs" in config:
        checkpoint += f" of {config['train.epochs']}"
        if config.get("train.select_by") != "last":
            checkpoint += ", the best on validation"
    if experiment.date:
        checkpoint += f"; saved {experiment.date}"
    training = []
    if "optimizer.name" in config:
        training.append(str(config["optimizer.name"]))
    if "optimizer.learning_rate" in config:
        training.append(f"learning rate {config['optimizer.learning_rate']:g}")
    if "data.batch_size" in config:
        training.append(f"batch size {config['data.batch_size']}")
    if "seed" in config:
        seeds = ", ".join(str(config["seed"] + index) for index in range(len(epochs)))
        training.append(f"{'seed' if len(epochs) == 1 else 'seeds'} {seeds}")
    software = (
        f"{name} {experiment.versions[name]}"
        for name in ("mister_jax", "jax", "flax", "device")
        if name in experiment.versions
    )
    return {
        "Split": split,
        "Trained on": str(config.get("data.name", "")),
        "Training": ", ".join(training),
        "Checkpoint": checkpoint,
        "Software": ", ".join(software),
    }
