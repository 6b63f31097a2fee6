"""Runs an ablation study, which trains variants of a config and compares their scores.

Each variant trains in a subfolder of the study's work directory. Validation scores select the best
epoch of each seed, and the best variant. Test scores are only reported.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mister_jax import multi_seed
from mister_jax.console import format_seconds
from mister_jax.errors import InputError
from mister_jax.evaluation.figures import plot_grouped_bars
from mister_jax.evaluation.results import evaluate
from mister_jax.io import read_json, write_json, write_text
from mister_jax.metrics import SCORE_NAMES
from mister_jax.tasks.config import config_seeds
from mister_jax.training.loop import train
from mister_jax.workdir import check_config

SPLITS = ("validation", "test")
_SELECTION_SCORE = "weighted_f1"
_ROW_FILE = "ablation.json"  # exists in the work directory of each completed variant


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant in the study, and a row in its table.

    Attributes:
      name: Name of the variant and of its work directory.
      change: Short description of the difference from the first variant.
      config: Config to train.
    """

    name: str
    change: str
    config: ConfigDict


def run_ablation(
    variants: Sequence[Variant],
    workdir: epath.PathLike,
    *,
    names: Sequence[str] = (),
    quiet: bool = False,
) -> list[dict[str, Any]] | None:
    """Trains and scores variants, and writes `ablation.md`, `ablation.csv` and `ablation.png`.

    Completed variants are skipped, and interrupted variants resume. The table lists all completed
    variants, including variants from earlier calls.

    Args:
      variants: Variants in the study, in the order of the table.
      workdir: Work directory of the study, created if it does not exist.
      names: Names of the variants to run; all if empty.
      quiet: Whether to hide progress.

    Returns:
      The rows of the table, or None if SIGTERM interrupted the study. Each row has
      "variant", "change" and "seeds". For each split in `SPLITS`, it also has the "mean" and the
      "deviation" of the scores over the seeds, and the scores of the "ensemble" of the seeds.

    Raises:
      InputError: A name is unknown, a config is invalid, or the directory belongs to a study with
        another config.
    """
    workdir = epath.Path(workdir)
    allowed = [variant.name for variant in variants]
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise InputError(f"variants: unknown {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    for variant in variants:
        check_config(variant.config, workdir / variant.name)
    pending = [
        variant
        for variant in variants
        if (not names or variant.name in names)
        and not (workdir / variant.name / _ROW_FILE).exists()
    ]
    started = time.perf_counter()
    for index, variant in enumerate(pending):
        remaining = ""
        if index:
            seconds = (time.perf_counter() - started) / index * (len(pending) - index)
            remaining = f", about {format_seconds(seconds)} left"
        title = f"variant {index + 1} of {len(pending)}, {variant.name}: {variant.change}"
        _print(title + remaining, quiet)
        row = _run_variant(variant, workdir / variant.name, quiet)
        if row is None:
            return None
        scores = ", ".join(f"{split} {_mean_and_deviation(row, split)}" for split in SPLITS)
        _print(f"{variant.name}: {scores}", quiet)
        _write_table(variants, workdir)
    return _write_table(variants, workdir)


def _print(line: str, quiet: bool) -> None:
    if not quiet and jax.process_index() == 0:
        print(line, flush=True)


def _run_variant(variant: Variant, workdir: epath.Path, quiet: bool) -> dict[str, Any] | None:
    """Trains and scores a variant. Returns None if SIGTERM interrupted training."""
    if not train(variant.config, workdir, quiet=quiet).finished:
        return None
    seeds = config_seeds(variant.config)
    row: dict[str, Any] = {"variant": variant.name, "change": variant.change, "seeds": [*seeds]}
    for split in SPLITS:
        scores = evaluate(workdir, split, quiet=True)
        summary = scores.get("seeds") or multi_seed.summarize_seeds(seeds, [scores])
        row[split] = {**summary, "ensemble": {name: scores[name] for name in SCORE_NAMES}}
    if jax.process_index() == 0:
        write_json(workdir / _ROW_FILE, row)
    return row


def _write_table(variants: Sequence[Variant], workdir: epath.Path) -> list[dict[str, Any]]:
    """Writes the study's files and returns the rows of the completed variants."""
    paths = [workdir / variant.name / _ROW_FILE for variant in variants]
    rows = [read_json(path) for path in paths if path.exists()]
    if rows and jax.process_index() == 0:
        dataset = variants[0].config.data.name
        write_text(workdir / "ablation.md", ablation_markdown(rows, dataset))
        write_text(workdir / "ablation.csv", ablation_csv(rows))
        bars = {
            split: {row["variant"]: _selection_score(row, split) for row in rows}
            for split in SPLITS
        }
        plot_grouped_bars(bars, "weighted F1", workdir / "ablation.png")
    return rows


def _selection_score(row: Mapping[str, Any], split: str) -> tuple[float, float]:
    """Returns the mean and standard deviation of the score that selects the best variant."""
    return row[split]["mean"][_SELECTION_SCORE], row[split]["deviation"][_SELECTION_SCORE]


def _mean_and_deviation(row: Mapping[str, Any], split: str) -> str:
    mean, deviation = _selection_score(row, split)
    return f"{mean:.3f} ± {deviation:.3f}"


def ablation_markdown(rows: Sequence[Mapping[str, Any]], dataset: str) -> str:
    """Returns a Markdown table with each variant's weighted F1. The best variant is bold."""
    seeds = ", ".join(map(str, rows[0]["seeds"]))
    best = max(rows, key=lambda row: _selection_score(row, "validation")[0])["variant"]
    lines = [
        f"Weighted F1 on {dataset}: mean ± standard deviation over the seeds {seeds}. Each seed is "
        "scored at its best epoch on validation, and the best variant on validation is bold. The "
        "ensemble averages the probabilities of the seeds.",
        "",
        "| variant | change | validation | test | test, ensemble |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"**{row['variant']}**" if row["variant"] == best else row["variant"]
        ensemble = f"{row['test']['ensemble'][_SELECTION_SCORE]:.3f}"
        scores = (_mean_and_deviation(row, split) for split in SPLITS)
        lines.append(f"| {' | '.join((name, row['change'], *scores, ensemble))} |")
    return "\n".join(lines) + "\n"


def ablation_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns all scores on both splits as CSV, one variant per row."""
    columns = [
        (split, score, kind)
        for split in SPLITS
        for score in SCORE_NAMES
        for kind in ("mean", "deviation", "ensemble")
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "change", "seeds", *("_".join(column) for column in columns)])
    for row in rows:
        values = [row[split][kind][score] for split, score, kind in columns]
        writer.writerow([row["variant"], row["change"], len(row["seeds"]), *values])
    return text.getvalue()
