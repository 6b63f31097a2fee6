"""Runs an ablation study, which trains variants of a config and compares their scores.

Each variant trains in a subfolder of the study's work directory. Validation scores select the best
epoch of each seed, and the best variant. Test scores are only reported.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from mister_jax.errors import InputError
from mister_jax.evaluation.figures import plot_grouped_bars
from mister_jax.evaluation.variants import Study, Variant
from mister_jax.io import write_text
from mister_jax.metrics import SCORE_NAMES

SPLITS = ("validation", "test")
_SELECTION_SCORE = "weighted_f1"
_ROW_FILE = "ablation.json"  # exists in the work directory of each completed variant


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
      "variant", "change" and "seeds". For each split in `SPLITS`, a row also has a dict with the
      "mean" and standard "deviation" of the scores over the seeds, and the scores of the seeds'
      "ensemble".

    Raises:
      InputError: A name is not in `variants`, a config is invalid, or the directory belongs to a
        study with another config.
    """
    allowed = [variant.name for variant in variants]
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise InputError(
            f"variants: {', '.join(unknown)} unknown, or without effect on this config; "
            f"allowed: {', '.join(allowed)}"
        )
    study = Study(variants, workdir, splits=SPLITS, row_file=_ROW_FILE, quiet=quiet)
    if not study.run(_describe, lambda: _write_table(study), names):
        return None
    return _write_table(study)


def _describe(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{split} {_mean_and_deviation(row, split)}" for split in SPLITS)


def _write_table(study: Study) -> list[dict[str, Any]]:
    """Writes the study's files and returns the rows of the completed variants."""
    rows, workdir = study.rows(), study.workdir
    if rows and jax.process_index() == 0:
        dataset = study.variants[0].config.data.name
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
