"""Console output: progress bars and tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import rich.box
import rich.progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mister_jax.metrics import CALIBRATION_SCORES, SCORE_NAMES
from mister_jax.metrics import title as title_of

_WIDTH_OF_FILES = 160


def output_console() -> Console:
    """Returns a console that prints tables to standard output.

    For a file or a pipe, Rich would assume 80 columns and wrap the cells of wider tables. This
    console uses 160 columns instead, unless the environment variable COLUMNS sets the width.
    """
    console = Console(highlight=False)
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdigit():
        console.width = _WIDTH_OF_FILES
    return console


class ProgressReporter:
    """Prints lines and, on a terminal, a progress bar.

    Args:
      total: Number of units of work.
      completed: Number of units already completed, for example by an interrupted run.
      unit: Plural name of the units.
      quiet: Whether to print nothing. Only process 0 prints.
    """

    def __init__(self, total: int, *, completed: int = 0, unit: str = "steps", quiet: bool = False):
        # Bind the current stdout, because code that silences libraries replaces `sys.stdout`.
        self.console = Console(
            file=sys.stdout, quiet=quiet or jax.process_index() != 0, highlight=False
        )
        self._progress = rich.progress.Progress(
            "{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn(unit),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, completed=completed)

    def __enter__(self) -> ProgressReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, description: str | None = None, *, amount: int = 1) -> None:
        """Marks `amount` more units as completed and sets the text before the bar, if given."""
        self._progress.update(self._task, advance=amount, description=description)

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)


def format_seconds(seconds: float) -> str:
    """Formats an expected time, such as "45 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def parameter_table(params: Any) -> str:
    """Returns a text table with the path, shape, dtype and size of each parameter, and a total."""
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
    """Returns a table of the per-class and overall scores that `evaluate` computes for a split.

    With several seeds, the table shows the ensemble's scores, then the weighted F1 of each seed
    with the mean and standard deviation over the seeds.
    """
    seeds = scores.get("seeds")
    if seeds:
        title += f" ({len(seeds['of_each'])}-seed ensemble)"
    table = Table("class", "precision", "recall", "F1", "support", title=title, box=rich.box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in scores["per_class"].items():
        cells = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(name, *cells, str(row["support"]))
    table.add_section()
    for key in SCORE_NAMES:
        interval = scores.get("intervals", {}).get(key, {"low": None})
        text = title_of(key)
        if interval["low"] is not None:
            text += f" (95%: {interval['low']:.3f} to {interval['high']:.3f})"
        table.add_row(text, "", "", f"{scores[key]:.3f}", "")
    baselines = {"majority class": scores["majority"]}
    baselines |= {f"{name} expert alone": row for name, row in scores.get("experts", {}).items()}
    if len(scores.get("experts", {})) > 1:
        baselines["mean of the experts, without the gate"] = scores["without_gate"]
    baselines |= {
        f"{name} (reference)": row for name, row in scores.get("reference_scores", {}).items()
    }
    table.add_section()
    for name, row in baselines.items():
        table.add_row(f"weighted f1: {name}", "", "", f"{row['weighted_f1']:.3f}", "")
    if scores.get("regression", {}).get("utterances"):
        table.add_section()
        for name, value in regression_rows(scores["regression"]):
            table.add_row(f"score: {name}", "", "", value, "")
    if scores.get("raters", {}).get("utterances"):
        table.add_section()
        for name, value in rater_rows(scores["raters"]):
            table.add_row(name, "", "", value, "")
    calibration = scores.get("calibration", {})
    versions = [calibration[key] for key in ("uncalibrated", "calibrated") if key in calibration]
    if versions:
        table.add_section()
        if len(versions) > 1:
            table.caption = "A -> B: before and after calibration"
        for key in CALIBRATION_SCORES:
            name = key.replace("_", " ").replace("brier", "Brier")
            values = " -> ".join(f"{version[key]['value']:.3f}" for version in versions)
            table.add_row(name, "", "", values, "")
    if seeds:
        table.add_section()
        for seed, row in seeds["of_each"].items():
            table.add_row(f"weighted f1: seed {seed}", "", "", f"{row['weighted_f1']:.3f}", "")
        mean, deviation = seeds["mean"]["weighted_f1"], seeds["deviation"]["weighted_f1"]
        table.add_row("weighted f1: mean of the seeds", "", "", f"{mean:.3f} +- {deviation:.3f}")
    return table


def regression_rows(regression: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the names and values of `metrics.regression_scores` for a table."""
    correlation = regression["pearson_r"]
    rows = [
        ("mean absolute error", f"{regression['mae']:.3f}"),
        ("Pearson's r", "-" if correlation is None else f"{correlation:.3f}"),
        ("accuracy of 7 classes", f"{regression['accuracy_7']:.3f}"),
        ("accuracy of 5 classes", f"{regression['accuracy_5']:.3f}"),
    ]
    for name, binary in regression["binary"].items():
        value = f"{binary['accuracy']:.3f} / {binary['weighted_f1']:.3f}"
        rows.append((f"accuracy / F1, {name.replace('_', ' ')}", value))
    return rows


def rater_rows(raters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the names and values of `metrics.rater_scores` for a table."""
    names = {
        "kl_divergence": "KL divergence from the raters",
        "js_divergence": "Jensen-Shannon divergence",
        "any_rater_accuracy": "accuracy, any rater",
        "rater_agreement": "agreement of two raters",
        "fleiss_kappa": "Fleiss' kappa of the raters",
    }
    return [
        (text, "-" if raters[name] is None else f"{raters[name]:.3f}")
        for name, text in names.items()
    ]


def missing_modality_table(title: str, points: Iterable[Mapping[str, Any]]) -> Table:
    """Returns the results of `missing_modality_study`, with a row for each pair of rates."""
    head = ("drop speech", "drop text", "weighted F1", "loss", "95% interval")
    table = Table(*head, title=title, box=rich.box.SIMPLE)
    for point in points:
        loss = point["loss"]
        table.add_row(
            f"{point['drop_speech']:g}",
            f"{point['drop_text']:g}",
            f"{point['weighted_f1']:.3f} +- {point['deviation']:.3f}",
            f"{loss['value']:z.3f}",
            "" if loss["low"] is None else f"{loss['low']:z.3f} to {loss['high']:z.3f}",
        )
    return table


def prediction_table(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a table of one dialogue with each utterance's predicted emotion and text.

    The speaker, if known, is before the text. The experts' predictions and gate weights are below
    the text, so that the table fits into 80 columns. `rows` is the result of
    `EmotionRecognizer.predict`.
    """
    experts = [name for name in rows[0]["gate"] if any(row["experts"][name] for row in rows)]
    table = Table("", "emotion", "", "utterance", box=rich.box.SIMPLE)
    for column in table.columns[:3]:
        column.no_wrap = True
    table.columns[0].justify = table.columns[2].justify = "right"
    table.columns[3].max_width = 80
    for number, (text, row) in enumerate(zip(texts, rows, strict=True), start=1):
        speaker = f"[bold]{escape(row['speaker'])}:[/bold] " if row.get("speaker") else ""
        lines = [speaker + (escape(text) or "[dim](no text)[/dim]")]
        if len(experts) > 1:
            votes = ", ".join(
                f"{name} {row['experts'][name]} {row['gate'][name]:.0%}"
                for name in experts
                if row["experts"][name]
            )
            lines.append(f"[dim]{escape(votes)}[/dim]")
        lines += (f"[dim]{escape(note)}[/dim]" for note in row.get("notes", ()))
        emotion = row["emotion"]
        probability = f"{row['probabilities'][emotion]:.2f}"
        place = _clock(row["start"]) if "start" in row else str(number)
        mark = "?" if row.get("uncertain") else ""
        table.add_row(place, escape(emotion) + mark, probability, "\n".join(lines))
    captions = []
    if any(row.get("uncertain") for row in rows):
        captions.append("?: uncertain, the probability is below the minimum confidence")
    if len(experts) > 1:
        captions.append(
            "below each text: the prediction and the gate weight of each expert; the gate weighs "
            "logits, so a confident expert can outweigh an expert with a larger weight"
        )
    table.caption = "\n".join(captions) or None
    return table


def _clock(seconds: float) -> str:
    """Returns a time such as 3:07.2 or 1:02:45.0."""
    # Round down, as the HTML page of a recording does.
    minutes, tenths = divmod(int(10 * seconds + 1e-6), 600)
    hours, minutes = divmod(minutes, 60)
    rest = f"{tenths // 10:02}.{tenths % 10}"
    return f"{hours}:{minutes:02}:{rest}" if hours else f"{minutes}:{rest}"


def comparison_table(title: str, columns: Mapping[str, Mapping[str, str]]) -> Table:
    """Returns a table of `columns`, which maps each column name to its cells by row name."""
    table = Table("", *columns, title=escape(title), box=rich.box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in next(iter(columns.values())):
        table.add_row(escape(name), *(escape(cells[name]) for cells in columns.values()))
    return table


def corpus_table(report: Mapping[str, Any]) -> Table:
    """Returns a table of `prepare_corpus`'s report, with one column per split."""
    columns = {}
    for split, values in report["splits"].items():
        shortest, mean, longest = values["lengths"] or (0, 0, 0)
        columns[split] = {
            "dialogues": f"{values['dialogues']}",
            "utterances": f"{values['utterances']}",
            **{f"  {name}": f"{count}" for name, count in values["classes"].items()},
            "  unlabeled": f"{values['unlabeled']}",
            "hours of speech": f"{values['hours']:.2f}",
            "without speech": f"{values['without_speech']}",
            "without text": f"{values['without_text']}",
            "text also in train": f"{values['train_text_overlap']}",
            "length min / mean / max": f"{shortest} / {mean:.1f} / {longest}",
        }
    return comparison_table(report["dataset"], columns)
