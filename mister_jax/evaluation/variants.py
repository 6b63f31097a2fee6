"""Trains and scores a list of named configs, such as the variants of an ablation or a sweep.

Each variant trains in a subfolder of the study's work directory. A study that runs again skips
completed variants and resumes interrupted variants.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mister_jax import multi_seed
from mister_jax.console import format_seconds
from mister_jax.errors import InputError
from mister_jax.evaluation.results import evaluate
from mister_jax.io import read_json, write_json
from mister_jax.metrics import SCORE_NAMES
from mister_jax.tasks.config import config_seeds
from mister_jax.training.loop import train, train_group
from mister_jax.training.runs import RunGroup, plan_groups, plan_run
from mister_jax.workdir import check_config, read_fingerprints

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant in a study, which is one row in the study's table.

    Attributes:
      name: Name of the variant and of its work directory.
      change: Short description of the difference from the other variants.
      config: Config to train.
    """

    name: str
    change: str
    config: ConfigDict


class Study:
    """Variants that are trained and scored, one after another or several at the same time.

    Args:
      variants: Variants to train and score, in the row order of the results table.
      workdir: Work directory of the study, created if it does not exist.
      splits: Splits on which every variant is scored.
      row_file: Name of the file for a completed variant's row, in the variant's work directory.
      kind: Word for a variant in messages.
      models_at_once: Maximum number of models that train at the same time if the configs differ
        only in the data; each seed of a variant is one model. See `training.runs.plan_groups`. By
        default, each variant is loaded and trained separately.
      quiet: Whether to hide progress.

    Raises:
      InputError: A config is invalid, `workdir` is a file, or a variant's directory belongs to
        another config.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        workdir: epath.PathLike,
        *,
        splits: Sequence[str],
        row_file: str,
        kind: str = "variant",
        models_at_once: int | None = None,
        quiet: bool = False,
    ):
        self.variants = tuple(variants)
        self.workdir = epath.Path(workdir)
        self._splits = tuple(splits)
        self._row_file = row_file
        self._kind = kind
        self._models_at_once = models_at_once
        self._quiet = quiet
        if self.workdir.exists() and not self.workdir.is_dir():
            raise InputError(f"{workdir} is a file; allowed: a directory, created if missing")
        for variant in self.variants:
            check_config(variant.config, self.folder(variant))

    def folder(self, variant: Variant) -> epath.Path:
        """Returns the work directory of a variant."""
        return self.workdir / variant.name

    def run(
        self,
        describe: Callable[[Row], str],
        on_completed: Callable[[], Any],
        names: Sequence[str] = (),
    ) -> bool:
        """Trains and scores all variants that are not complete.

        Args:
          describe: Function that describes a row's scores for the progress message.
          on_completed: Function called after each variant has been scored.
          names: Names of the variants to run; all if empty.

        Returns:
          Whether all of these variants are complete; False if SIGTERM interrupted the training.
        """
        pending = [
            variant
            for variant in self.variants
            if (not names or variant.name in names) and self._read_row(variant) is None
        ]
        if pending:
            self._check_data()
        started = time.perf_counter()
        completed = 0
        for variants, group in self._groups(pending):
            remaining = ""
            if completed:
                seconds = (time.perf_counter() - started) / completed * (len(pending) - completed)
                remaining = f", about {format_seconds(seconds)} left"
            self.print(f"{self._describe_group(variants, completed, len(pending))}{remaining}")
            if not self._train(variants, group):
                return False
            for variant in variants:
                row = self._score(variant)
                self.print(f"{variant.name}: {describe(row)}")
                on_completed()
            completed += len(variants)
        return True

    def _check_data(self) -> None:
        """Checks that the data have not changed since variants were completed.

        Scores on different data would not be comparable.
        """
        first_folders: dict[str, epath.Path] = {}
        for variant in self.variants:
            if self._read_row(variant) is None:
                continue
            folder = self.folder(variant)
            first = first_folders.setdefault(variant.config.data.to_json(), folder)
            if folder == first:
                if self._models_at_once is None:  # Otherwise, `plan_groups` checks all variants.
                    plan_run(variant.config, folder)  # compares the data with those of the training
                continue
            fingerprints, first_fingerprints = map(read_fingerprints, (folder, first))
            if fingerprints and first_fingerprints and fingerprints != first_fingerprints:
                raise InputError(
                    f"{folder}: trained on other data than {first}, so the scores cannot be "
                    "compared; use another workdir"
                )

    def _groups(
        self, pending: Sequence[Variant]
    ) -> Iterator[tuple[Sequence[Variant], RunGroup | None]]:
        """Yields variants that train at the same time, and their `RunGroup` if there is one."""
        if self._models_at_once is None:
            yield from (((variant,), None) for variant in pending)
            return
        if not pending:
            return
        names = {variant.name for variant in pending}
        groups = plan_groups(
            [variant.config for variant in self.variants],
            [self.folder(variant) for variant in self.variants],
            self._models_at_once,
            is_complete=lambda index: self.variants[index].name not in names,
        )
        start = 0
        for group in groups:
            end = start + len(group.configs)
            yield pending[start:end], group
            start = end

    def _train(self, variants: Sequence[Variant], group: RunGroup | None) -> bool:
        """Trains variants, and returns whether all of them are finished."""
        if group is not None:
            return all(progress.finished for progress in train_group(group, quiet=self._quiet))
        (variant,) = variants
        return train(variant.config, self.folder(variant), quiet=self._quiet).finished

    def _describe_group(self, variants: Sequence[Variant], completed: int, count: int) -> str:
        first = completed + 1
        if len(variants) > 1:
            names = ", ".join(variant.name for variant in variants)
            return f"{self._kind}s {first} to {completed + len(variants)} of {count}: {names}"
        (variant,) = variants
        title = variant.name + (f": {variant.change}" if variant.change else "")
        return f"{self._kind} {first} of {count}, {title}"

    def rows(self) -> list[Row]:
        """Returns the rows of all completed variants, including variants from earlier runs."""
        rows = (self._read_row(variant) for variant in self.variants)
        return [row for row in rows if row is not None]

    def print(self, line: str) -> None:
        """Prints a line about the progress."""
        if not self._quiet and jax.process_index() == 0:
            print(line, flush=True)

    def _read_row(self, variant: Variant) -> Row | None:
        """Returns a variant's row; None if there is no row or the training length has changed."""
        path = self.folder(variant) / self._row_file
        if not path.exists():
            return None
        row = read_json(path)
        length = _training_length(variant.config)
        return row if row.get("length", length) == length else None

    def _score(self, variant: Variant) -> Row:
        """Scores a trained variant and writes its row."""
        row: Row = {
            "variant": variant.name,
            "change": variant.change,
            "seeds": [*config_seeds(variant.config)],
            "length": _training_length(variant.config),
        }
        for split in self._splits:
            row[split] = score_seeds(variant.config, self.folder(variant), split)
        if jax.process_index() == 0:
            write_json(self.folder(variant) / self._row_file, row)
        return row


def score_seeds(config: ConfigDict, workdir: epath.PathLike, split: str) -> dict[str, Any]:
    """Evaluates a work directory on a split.

    Returns:
      A dict with the "mean" and the "deviation" of the scores over the seeds, the scores "of_each"
      seed, and the scores of the "ensemble" of the seeds.
    """
    scores = evaluate(workdir, split, quiet=True)
    summary = scores.get("seeds") or multi_seed.summarize_seeds(config_seeds(config), [scores])
    return {**summary, "ensemble": {name: scores[name] for name in SCORE_NAMES}}


def _training_length(config: ConfigDict) -> dict[str, int]:
    """Returns the config fields that determine the training length."""
    return {"epochs": config.train.epochs, "patience": config.train.get("patience", 0)}
