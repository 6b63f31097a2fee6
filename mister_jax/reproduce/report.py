"""Tables of a reproduction: our scores, the paper's scores, and the estimates of a dry run."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
from rich.markup import escape
from rich.table import Table

from mister_jax.console import format_seconds
from mister_jax.io import read_json, write_text
from mister_jax.reproduce import estimate
from mister_jax.reproduce.settings import Settings
from mister_jax.reproduce.stages import EXPERT_VARIANTS, RECIPES, experts_folder, fusion_folder

REPORT = "reproduce.md"
"""File with the scores, and the time and cost of each stage."""

# Published weighted F1 in percent by corpus and preset. The scores for `small` and `large` were
# published for encoders of about the same size as the preset's encoders.
_PUBLISHED = {
    ("iemocap", "llm"): 70.9,
    ("meld", "llm"): 69.5,
    ("mosi", "llm"): 87.9,
    ("iemocap", "large"): 71.1,
    ("meld", "large"): 68.4,
    ("iemocap", "small"): 69.5,
    ("meld", "small"): 66.4,
}
# Published F1 of MELD's classes in percent, with LLMs.
_PUBLISHED_CLASSES = {
    "anger": 62.5,
    "disgust": 42.9,
    "fear": 30.6,
    "joy": 65.4,
    "neutral": 81.3,
    "sadness": 50.3,
    "surprise": 61.5,
}
_NOT_REPORTED = "not reported"
_SCORE_COLUMNS = ("model", "recipe", "validation", "test", "ensemble", "published")

Row = tuple[str, ...]


def score_rows(settings: Settings) -> list[Row]:
    """Returns the rows of the score table, with weighted F1 in percent."""
    rows: list[Row] = []
    for recipe in RECIPES:
        metrics = read_json(fusion_folder(settings, recipe) / "metrics.json")
        validation, test = (_seed_score(metrics[split]) for split in ("validation", "test"))
        ensemble = _percent(metrics["test"]["weighted_f1"])
        rows.append(("MiSTER-E", recipe, validation, test, ensemble, _published(settings)))
        for expert, variant in EXPERT_VARIANTS.items():
            row = read_json(experts_folder(settings, recipe) / variant / "ablation.json")
            scores = (
                _mean_and_deviation(row[split]["mean"], row[split]["deviation"], len(row["seeds"]))
                for split in ("validation", "test")
            )
            ensemble = _percent(row["test"]["ensemble"]["weighted_f1"])
            rows.append((f"{expert} alone", recipe, *scores, ensemble, _NOT_REPORTED))
        for expert, scores_of_expert in metrics["test"].get("experts", {}).items():
            score = _percent(scores_of_expert["weighted_f1"])
            rows.append((f"{expert} in MiSTER-E", recipe, "", "", score, _NOT_REPORTED))
    return rows


def _published(settings: Settings) -> str:
    score = _PUBLISHED.get((settings.corpus, settings.preset))
    if score is None or settings.classes != "six":
        return _NOT_REPORTED
    return f"{score:.1f}"


def _seed_score(scores: Mapping[str, Any]) -> str:
    seeds = scores.get("seeds")
    if not seeds:
        return _percent(scores["weighted_f1"])
    return _mean_and_deviation(seeds["mean"], seeds["deviation"], len(seeds["of_each"]))


def _mean_and_deviation(
    mean: Mapping[str, float], deviation: Mapping[str, float], num_seeds: int
) -> str:
    text = _percent(mean["weighted_f1"])
    return f"{text} ± {_percent(deviation['weighted_f1'])}" if num_seeds > 1 else text


def _percent(score: float) -> str:
    return f"{100 * score:.1f}"


def class_rows(settings: Settings) -> list[Row]:
    """Returns one row per class: its name, its test F1 with each recipe, and the paper's F1.

    All scores are in percent.
    """
    metrics = {
        recipe: read_json(fusion_folder(settings, recipe) / "metrics.json")["test"]["per_class"]
        for recipe in RECIPES
    }
    published = {}
    if settings.corpus == "meld" and settings.preset == "llm":
        published = _PUBLISHED_CLASSES
    rows = []
    for name in next(iter(metrics.values())):
        paper = f"{published[name]:.1f}" if name in published else _NOT_REPORTED
        rows.append((name, *(_percent(metrics[recipe][name]["f1"]) for recipe in RECIPES), paper))
    return rows


def stage_rows(record: Mapping[str, Any], dollars_per_hour: float | None) -> list[Row]:
    """Returns each stage that was run, with its hardware, time and cost."""
    rows: list[Row] = []
    total = 0.0
    for name, stage in record["stages"].items():
        total += stage["seconds"]
        rows.append(
            (
                name,
                stage.get("hardware", ""),
                format_seconds(stage["seconds"]),
                *_cost(stage["seconds"], dollars_per_hour),
            )
        )
    return [*rows, ("total", "", format_seconds(total), *_cost(total, dollars_per_hour))]


def _cost(seconds: float, dollars_per_hour: float | None) -> tuple[str, ...]:
    return () if dollars_per_hour is None else (f"${seconds / 3600 * dollars_per_hour:.2f}",)


def write_report(
    settings: Settings, record: Mapping[str, Any], dollars_per_hour: float | None
) -> list[Table]:
    """Writes `reproduce.md` and returns its tables for the console."""
    scores, classes = score_rows(settings), class_rows(settings)
    stages = stage_rows(record, dollars_per_hour)
    class_columns = ("class", *RECIPES, "published")
    stage_columns = ("stage", "hardware", "time", *(() if dollars_per_hour is None else ("cost",)))
    encoders = f"{settings.text.name} and {settings.speech.name}"
    seeds = "1 seed" if settings.num_seeds == 1 else f"{settings.num_seeds} seeds"
    sections = [
        f"# MiSTER-E on {settings.dataset} with {encoders}",
        "",
        f"Weighted F1 in percent, {seeds}: mean ± standard deviation. The ensemble averages the "
        "probabilities of the seeds. The ensemble's score and the published score are for the test "
        "split. A single expert was trained without the other experts; fusion is the cross-modal "
        "expert. The epoch was chosen on the validation split; the paper's code chooses it on the "
        "test split.",
        *_notes(settings, record["settings"]["partial"]),
        "",
        _markdown(_SCORE_COLUMNS, scores),
        "Test F1 of each class, ensemble:",
        "",
        _markdown(class_columns, classes),
        "Time of each stage, including start-up and resumed runs:",
        "",
        _markdown(stage_columns, stages),
    ]
    write_text(pathlib.Path(settings.workdir, REPORT), "\n".join(sections))
    return [
        _table(f"{settings.dataset}: weighted F1, {seeds}", _SCORE_COLUMNS, scores),
        _table("test F1 of each class, ensemble", class_columns, classes),
        _table("stages", stage_columns, stages),
    ]


def _notes(settings: Settings, partial: bool) -> list[str]:
    """Returns lines about changed fields, an incomplete corpus and encoders not in the preset."""
    changes = [
        f"{name}: {', '.join(options)}"
        for name, options in (
            ("text encoder", settings.text_options),
            ("speech encoder", settings.speech_options),
            ("MiSTER-E", settings.fusion_options),
        )
        if options
    ]
    notes = [f"Changed fields of the configs: {'; '.join(changes)}."] if changes else []
    if partial:
        notes.append("The corpus may be incomplete (`--partial`).")
    if settings.text_encoder or settings.speech_encoder:
        notes.append("The encoders are not those of the preset; the paper's scores do not apply.")
    return [line for note in notes for line in ("", note)]


def _markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _table(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Table:
    table = Table(*columns, title=escape(title), box=rich.box.SIMPLE)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def estimate_lines(
    settings: Settings,
    estimates: Sequence[estimate.Estimate],
    device_name: str,
) -> list[str]:
    """Returns the lines that a dry run prints before its table."""
    device, corpus = estimate.DEVICES[device_name], estimate.corpus_size(settings)
    lines = []
    for modality, encoder in (("text", settings.text), ("speech", settings.speech)):
        size = _count(estimate.count_parameters(encoder))
        lines.append(f"{modality} encoder: {encoder.name}, {size} parameters")
    capacity = device.memory / 2**30
    lines += [f"device: {device.title}, {capacity:.0f} GiB each", "commands:"]
    lines += [f"  {row.command}" for row in estimates]
    lines += _fit_lines(estimates, capacity)
    return [
        *lines,
        "assumptions:",
        f"  {corpus.train} training and {corpus.validation} validation utterances, {corpus.total} "
        f"in all; on average {corpus.seconds:g} s and {corpus.tokens:g} tokens, padded by 30%",
        "  FLOPs per parameter and position: 6 in training, 4 with LoRA, 2 in a forward pass; "
        "attention in addition",
        "  start-up, downloads and compilation are not counted",
    ]


def _fit_lines(estimates: Sequence[estimate.Estimate], capacity: float) -> list[str]:
    return [
        f"WARNING: {row.stage} needs about {row.memory / 2**30:.0f} GiB per chip"
        for row in estimates
        if row.memory is not None and row.memory / 2**30 > capacity
    ]


def estimate_table(
    estimates: Sequence[estimate.Estimate], device_name: str, dollars_per_hour: float | None
) -> Table:
    """Returns the table of a dry run."""
    columns = ["stage", "hours", "GiB per chip", "based on"]
    if dollars_per_hour is not None:
        columns.insert(2, "cost")
    rows: list[Row] = []
    for row in estimates:
        memory = "" if row.memory is None else f"{row.memory / 2**30:.1f}"
        cost = _cost(row.hours * 3600, dollars_per_hour)
        hours = f"{row.hours:.2f}" if row.hours >= 0.01 else "< 0.01"
        rows.append((row.stage, hours, *cost, memory, row.basis))
    total = sum(row.hours for row in estimates)
    rows.append(("total", f"{total:.2f}", *_cost(total * 3600, dollars_per_hour), "", ""))
    return _table(f"predicted for {estimate.DEVICES[device_name].title}", columns, rows)


def _count(number: float) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.0f} million"
