"""Console output: progress bars and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import rich.box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class ProgressReporter:
    """Shows progress: a bar on a terminal, lines elsewhere.

    Args:
      total: Number of units of work.
      done: Number of units that are done already.
      unit: Name of the units.
      quiet: Show nothing. Only the first process shows anything.
    """

    def __init__(self, total: int, *, done: int = 0, unit: str = "steps", quiet: bool = False):
        # The stream of now: libraries that are kept quiet may not take it away.
        self.console = Console(
            file=sys.stdout, quiet=quiet or jax.process_index() != 0, highlight=False
        )
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, completed=done)

    def __enter__(self) -> ProgressReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, description: str | None = None, *, amount: int = 1) -> None:
        """Reports further units as done."""
        self._progress.update(self._task, advance=amount, description=description)

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)


def parameter_table(params: Any) -> str:
    """Returns the paths, shapes, types and counts of parameters, one per line, and the total."""
    rows = [("parameter", "shape", "dtype", "count")]
    total = 0
    for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = " x ".join(map(str, value.shape))
        rows.append((name, shape, str(value.dtype), f"{value.size:,}"))
        total += value.size
    rows.append(("total", "", "", f"{total:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
    return "\n".join(lines) + "\n"


def score_table(title: str, scores: Mapping[str, Any]) -> Table:
    """Returns the per-class table of `metrics.scores`, with the overall scores below it.

    For several seeds these are the scores of the ensemble; each seed, their mean and deviation
    follow.

    Args:
      title: Title of the table.
      scores: Scores of `metrics.scores`.
    """
    if "seeds" in scores:
        title += f": {len(scores['seeds']['of_each'])} seeds together"
    table = Table("class", "precision", "recall", "F1", "support", title=title, box=rich.box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in scores["per_class"].items():
        cells = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(name, *cells, str(row["support"]))
    table.add_section()
    for key in ("weighted_f1", "macro_f1", "accuracy", "balanced_accuracy"):
        table.add_row(key.replace("_", " "), "", "", f"{scores[key]:.3f}", "")
    compared = {"experts": "{} expert alone", "reference_scores": "{} (reference)"}
    others = {"majority class": scores["majority"]}
    for group, title_of in compared.items():
        others |= {title_of.format(name): row for name, row in scores.get(group, {}).items()}
    table.add_section()
    for name, row in others.items():
        table.add_row(f"weighted f1: {name}", "", "", f"{row['weighted_f1']:.3f}", "")
    if "seeds" in scores:
        found = scores["seeds"]
        table.add_section()
        for seed, row in found["of_each"].items():
            table.add_row(f"weighted f1: seed {seed}", "", "", f"{row['weighted_f1']:.3f}", "")
        told = f"{found['mean']['weighted_f1']:.3f} +- {found['deviation']['weighted_f1']:.3f}"
        table.add_row("weighted f1: mean of the seeds", "", "", told, "")
    return table


def missing_modality_table(title: str, points: Iterable[Mapping[str, float]]) -> Table:
    """Returns the table of a missing-modality study, whose points `evaluate` describes."""
    table = Table("drop speech", "drop text", "weighted F1", title=title, box=rich.box.SIMPLE)
    for point in points:
        score = f"{point['weighted_f1']:.3f} +- {point['deviation']:.3f}"
        table.add_row(f"{point['drop_speech']:g}", f"{point['drop_text']:g}", score)
    return table


def prediction_table(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of a dialogue: texts, and what is predicted for each of them.

    The choices and weights of the experts are below the text, so that all of it reads well on a
    terminal of 80 columns.

    Args:
      texts: Texts of the utterances.
      rows: Rows of `evaluate.predicted_rows`.
    """
    experts = [name for name in rows[0]["gate"] if any(row["experts"][name] for row in rows)]
    table = Table("", "emotion", "", "utterance", box=rich.box.SIMPLE)
    for column in table.columns[:3]:
        column.no_wrap = True
    table.columns[0].justify = table.columns[2].justify = "right"
    table.columns[3].max_width = 80
    for number, (text, row) in enumerate(zip(texts, rows, strict=True), start=1):
        choices = (
            f"{name} {row['experts'][name]} {row['gate'][name]:.0%}"
            for name in experts
            if row["experts"][name]
        )
        emotion = row["predicted"]
        lines = [escape(text) or "[dim](no text)[/dim]"]
        if len(experts) > 1:
            lines.append(f"[dim]{escape(', '.join(choices))}[/dim]")
        lines += (f"[dim]{escape(note)}[/dim]" for note in row.get("notes", ()))
        probability = f"{row['probabilities'][emotion]:.2f}"
        table.add_row(str(number), escape(emotion), probability, "\n".join(lines))
    if len(experts) > 1:
        table.caption = "below each text: the choice of each expert, and its weight in the mixture"
    return table


def comparison_table(title: str, values: Mapping[str, Mapping[str, str]]) -> Table:
    """Returns a table with a column per key of `values`, and a row per key of its values."""
    table = Table("", *values, title=escape(title), box=rich.box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in next(iter(values.values())):
        table.add_row(escape(name), *(escape(cells[name]) for cells in values.values()))
    return table


def corpus_table(report: Mapping[str, Any]) -> Table:
    """Returns the table of a report of `launch.prepare`."""
    cells = {}
    for split, values in report["splits"].items():
        least, mean, most = values["lengths"] or (0, 0, 0)
        cells[split] = {
            "dialogues": f"{values['dialogues']}",
            "utterances": f"{values['utterances']}",
            **{f"  {name}": f"{count}" for name, count in values["classes"].items()},
            "  unlabeled": f"{values['unlabeled']}",
            "hours of speech": f"{values['hours']:.2f}",
            "without speech": f"{values['without_speech']}",
            "without text": f"{values['without_text']}",
            "with a text of training": f"{values['train_text_overlap']}",
            "length min / mean / max": f"{least} / {mean:.1f} / {most}",
        }
    return comparison_table(report["dataset"], cells)
