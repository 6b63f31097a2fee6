"""Pictures: training curves, confusion matrices, scores under missing modalities."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from mister_jax.io import read_json_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _new_figure(size: tuple[float, float]) -> Figure:
    # Imported here: predictions need no pictures, and Matplotlib takes a second to import.
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _save(figure: Figure, path: epath.PathLike) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    epath.Path(path).write_bytes(buffer.getvalue())


def curves(metrics: epath.PathLike, path: epath.PathLike) -> None:
    """Draws the loss and the validation scores of a training over its steps.

    Args:
      metrics: the training's `metrics.jsonl`.
      path: of the PNG.
    """
    rows = read_json_lines(metrics)
    figure = _new_figure((10, 4))
    left, right = figure.subplots(1, 2)
    lines = (
        (left, "train/loss", "loss"),
        (right, "validation/weighted_f1", "weighted F1"),
        (right, "validation/macro_f1", "macro F1"),
        (right, "validation/accuracy", "accuracy"),
    )
    for axes, name, label in lines:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=label)
    for axes, title in ((left, "training loss"), (right, "validation")):
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
    right.legend()
    _save(figure, path)


def plot_confusion(
    counts: Mapping[str, np.ndarray], class_names: Sequence[str], path: epath.PathLike
) -> None:
    """Draws confusion matrices side by side.

    Args:
      counts: title of each matrix to its [C, C] counts, labels down, predictions across.
      class_names: C names.
      path: of the PNG.
    """
    size = 2.5 + 0.55 * len(class_names)
    figure = _new_figure((size * len(counts), size))
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, (title, matrix) in zip(panels, counts.items(), strict=True):
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
        ticks = range(len(class_names))
        axes.set_xticks(ticks, class_names, rotation=45, ha="right")
        axes.set_yticks(ticks, class_names)
        axes.set(xlabel="predicted", ylabel="labeled", title=title)
    _save(figure, path)


def plot_missing_modality(
    points: Sequence[Mapping[str, Any]], complete: float, path: epath.PathLike
) -> None:
    """Draws weighted F1 over the share of utterances that lost a modality.

    Args:
      points: each with "drop_speech", "drop_text", "weighted_f1" and "deviation".
      complete: weighted F1 with nothing dropped.
      path: of the PNG.
    """
    figure = _new_figure((6, 4))
    axes = figure.subplots()
    kinds = {
        "speech dropped": lambda point: point["drop_speech"] > 0 == point["drop_text"],
        "text dropped": lambda point: point["drop_text"] > 0 == point["drop_speech"],
        "both dropped": lambda point: point["drop_speech"] > 0 and point["drop_text"] > 0,
    }
    for label, belongs in kinds.items():
        chosen = [point for point in points if belongs(point)]
        share = [max(point["drop_speech"], point["drop_text"]) for point in chosen]
        order = np.argsort(share)
        if len(order):
            axes.errorbar(
                np.array(share)[order],
                np.array([point["weighted_f1"] for point in chosen])[order],
                np.array([point["deviation"] for point in chosen])[order],
                marker="o",
                capsize=3,
                label=label,
            )
    axes.axhline(complete, color="gray", linestyle="--", label="nothing dropped")
    axes.set(xlabel="share of utterances", ylabel="weighted F1", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_grouped_bars(
    values: Mapping[str, Mapping[str, tuple[float, float]]], label: str, path: epath.PathLike
) -> None:
    """Draws numbers with their deviations as groups of bars.

    Args:
      values: name of a bar's colour -> name of its group -> mean and deviation.
      label: what the numbers are.
      path: of the PNG.
    """
    groups = list(next(iter(values.values())))
    places, width = np.arange(len(groups)), 0.8 / len(values)
    figure = _new_figure((2 + 1.1 * len(groups), 4.5))
    axes = figure.subplots()
    for index, (name, of_group) in enumerate(values.items()):
        means, deviations = zip(*(of_group[group] for group in groups), strict=True)
        x = places + (index - (len(values) - 1) / 2) * width
        axes.bar(x, means, width, yerr=deviations, capsize=3, label=name)
    axes.set_xticks(places, groups, rotation=30, ha="right")
    axes.set(ylabel=label, ylim=(0, 1))
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_dataset(
    class_counts: Mapping[str, Mapping[str, int]],
    lengths: Mapping[str, np.ndarray],
    seconds: Mapping[str, np.ndarray],
    path: epath.PathLike,
) -> None:
    """Draws what a dataset holds: classes, lengths of dialogues, durations of recordings.

    Args:
      class_counts: split -> class -> utterances.
      lengths: split -> utterances of its dialogues.
      seconds: split -> durations; no panel where there are none.
      path: of the PNG.
    """
    with_sound = any(len(values) for values in seconds.values())
    columns = 3 if with_sound else 2
    figure = _new_figure((5 * columns, 4))
    panels = figure.subplots(1, columns)
    names = list(dict.fromkeys(name for counts in class_counts.values() for name in counts))
    width = 0.8 / len(class_counts)
    for index, (split, counts) in enumerate(class_counts.items()):
        total = max(1, sum(counts.values()))
        shares = [counts.get(name, 0) / total for name in names]
        panels[0].bar(np.arange(len(names)) + index * width, shares, width, label=split)
    panels[0].set_xticks(np.arange(len(names)) + 0.4 - width / 2, names, rotation=45, ha="right")
    panels[0].set(ylabel="share of utterances", title="classes")
    panels[0].legend()
    measures = [(lengths, "utterances", "length of dialogues")]
    if with_sound:
        measures.append((seconds, "seconds", "duration of recordings"))
    for axes, (values, unit, title) in zip(panels[1:], measures, strict=True):
        every = np.concatenate(list(values.values()))
        bins = np.linspace(0, every.max(), 30)
        for split, numbers in values.items():
            if len(numbers):
                axes.hist(numbers, bins, density=True, histtype="step", label=split)
        axes.set(xlabel=unit, ylabel="density", title=title)
    _save(figure, path)
