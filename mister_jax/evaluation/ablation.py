"""The ablation study: variants of one training, each with its seeds, side by side in a table.

Each variant is a work directory of its own below the study's. Epochs are chosen on validation, and
so is the variant that the table calls the best; the test split is told, and chooses nothing.
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
from mister_jax.errors import InputError
from mister_jax.evaluation import figures
from mister_jax.evaluation.results import evaluate
from mister_jax.io import read_json, write_json, write_text
from mister_jax.metrics import SCORE_NAMES
from mister_jax.tasks import config_seeds
from mister_jax.training.loop import check_workdir, train

SPLITS = ("validation", "test")
CHOSEN_BY = "weighted_f1"

_RESULT = "ablation.json"  # in a variant's folder: it is done


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the study.

    Attributes:
      name: of its folder, too.
      change: what is other than in the first variant, in words.
      config: of its training.
    """

    name: str
    change: str
    config: ConfigDict


def ablate(
    variants: Sequence[Variant],
    workdir: epath.PathLike,
    *,
    chosen: Sequence[str] = (),
    quiet: bool = False,
) -> list[dict[str, Any]] | None:
    """Trains and scores variants, and writes `ablation.md`, `ablation.csv` and `ablation.png`.

    A variant that is done is not run again, one that was begun goes on. The table has all that are
    done, also in earlier calls.

    Args:
      variants: of the study, in the order of the table.
      workdir: of the study, made if it is not there.
      chosen: names of those to run now; all by default.
      quiet: show no progress.

    Returns:
      The rows of the table: "variant", "change", "seeds", and for each of `SPLITS` the "mean" and
      "deviation" over the seeds and the scores of the seeds "together". None after SIGTERM.

    Raises:
      InputError: an unknown name, a config that cannot be used, or a folder of another study.
    """
    workdir = epath.Path(workdir)
    names = [variant.name for variant in variants]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise InputError(f"variants: unknown {', '.join(unknown)}; allowed are {', '.join(names)}")
    for variant in variants:
        check_workdir(variant.config, workdir / variant.name)
    todo = [
        variant
        for variant in variants
        if (not chosen or variant.name in chosen) and not _done(workdir / variant.name)
    ]
    started = time.perf_counter()
    for place, variant in enumerate(todo):
        left = ""
        if place:
            minutes = (time.perf_counter() - started) / place * (len(todo) - place) / 60
            left = f", about {minutes:.0f} min left"
        _say(f"variant {place + 1} of {len(todo)}, {variant.name}: {variant.change}{left}", quiet)
        row = _run(variant, workdir / variant.name, quiet)
        if row is None:
            return None
        _say(f"{variant.name}: " + ", ".join(f"{s} {_score(row, s)}" for s in SPLITS), quiet)
        _write(_rows(variants, workdir), variants[0].config, workdir)
    rows = _rows(variants, workdir)
    _write(rows, variants[0].config, workdir)
    return rows


def _say(line: str, quiet: bool) -> None:
    if not quiet and jax.process_index() == 0:
        print(line, flush=True)


def _done(folder: epath.Path) -> bool:
    return (folder / _RESULT).exists()


def _run(variant: Variant, folder: epath.Path, quiet: bool) -> dict[str, Any] | None:
    """Trains a variant to its end and scores it; None if it was told to stop."""
    if not train(variant.config, folder, quiet=quiet).finished:
        return None
    trained = config_seeds(variant.config)
    row: dict[str, Any] = {"variant": variant.name, "change": variant.change}
    row["seeds"] = list(trained)
    for split in SPLITS:
        found = evaluate(folder, split, quiet=True)
        told = found.get("seeds") or multi_seed.summarize_seeds(trained, [found])
        row[split] = {**told, "together": {name: found[name] for name in SCORE_NAMES}}
    if jax.process_index() == 0:
        write_json(folder / _RESULT, row)
    return row


def _rows(variants: Sequence[Variant], workdir: epath.Path) -> list[dict[str, Any]]:
    """Of the variants that are done."""
    paths = [workdir / variant.name / _RESULT for variant in variants]
    return [read_json(path) for path in paths if path.exists()]


def _write(rows: Sequence[Mapping[str, Any]], config: ConfigDict, workdir: epath.Path) -> None:
    if not rows or jax.process_index() != 0:
        return
    write_text(workdir / "ablation.md", markdown(rows, config.data.name))
    write_text(workdir / "ablation.csv", table_of_values(rows))
    bars = {
        split: {
            row["variant"]: (row[split]["mean"][CHOSEN_BY], row[split]["deviation"][CHOSEN_BY])
            for row in rows
        }
        for split in SPLITS
    }
    figures.plot_grouped_bars(bars, "weighted F1", workdir / "ablation.png")


def _score(row: Mapping[str, Any], split: str) -> str:
    mean, deviation = row[split]["mean"][CHOSEN_BY], row[split]["deviation"][CHOSEN_BY]
    return f"{mean:.3f} ± {deviation:.3f}"


def markdown(rows: Sequence[Mapping[str, Any]], dataset: str) -> str:
    """The table for readers: weighted F1, the best on validation in bold.

    Args:
      rows: of `ablate`.
      dataset: its name.
    """
    told = ", ".join(map(str, rows[0]["seeds"]))
    best = max(rows, key=lambda row: row["validation"]["mean"][CHOSEN_BY])["variant"]
    lines = [
        f"Weighted F1 on {dataset}, mean ± standard deviation of the seeds {told}; the epoch of "
        "each seed is its best on validation, and bold is the variant that is best there. "
        "Together: the mean of the seeds' probabilities decides.",
        "",
        "| variant | change | validation | test | test, seeds together |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"**{row['variant']}**" if row["variant"] == best else row["variant"]
        together = f"{row['test']['together'][CHOSEN_BY]:.3f}"
        cells = (name, row["change"], *(_score(row, split) for split in SPLITS), together)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table_of_values(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for programs, as CSV: every score of both splits.

    Args:
      rows: of `ablate`.
    """
    kinds = ("mean", "deviation", "together")
    columns = [(split, score, kind) for split in SPLITS for score in SCORE_NAMES for kind in kinds]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "change", "seeds", *("_".join(column) for column in columns)])
    for row in rows:
        values = [row[split][kind][score] for split, score, kind in columns]
        writer.writerow([row["variant"], row["change"], len(row["seeds"]), *values])
    return text.getvalue()
