"""Plots confusion matrices, studies, sweeps, comparisons and datasets as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mister_jax.io import write_png


def plot_confusion(
    counts: Mapping[str, np.ndarray], class_names: Sequence[str], path: epath.PathLike
) -> None:
    """Plots titled confusion matrices [C, C] side by side as a PNG file. Rows are labels."""
    from matplotlib.figure import Figure

    size = 2.5 + 0.55 * len(class_names)
    figure = Figure(figsize=(size * len(counts), size), layout="constrained")
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
        axes.set(xlabel="predicted", ylabel="label", title=title)
    write_png(path, figure)


def missing_modality_lines(
    study: Mapping[str, Any],
) -> dict[str, list[tuple[float, float, float]]]:
    """Groups the points of a missing-modality study by the dropped modalities.

    Returns:
      Points for each kind of dropped modality: "speech", "text" and "both". A point contains the
      rate at which utterances lost the modality (for "both", the larger rate), and the mean and
      standard deviation of weighted F1. Points are sorted by rate. Empty kinds are omitted.
    """
    lines: dict[str, list[tuple[float, float, float]]] = {"speech": [], "text": [], "both": []}
    for point in study["points"]:
        speech, text = point["drop_speech"], point["drop_text"]
        kind = "both" if speech and text else "speech" if speech else "text" if text else None
        if kind:
            share = max(speech, text)
            lines[kind].append((share, point["weighted_f1"], point["deviation"]))
    return {name: sorted(points) for name, points in lines.items() if points}


def plot_missing_modality(study: Mapping[str, Any], path: epath.PathLike) -> None:
    """Plots a missing-modality study as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in missing_modality_lines(study).items():
        shares, scores, deviations = zip(*points, strict=True)
        axes.errorbar(shares, scores, deviations, marker="o", capsize=3, label=f"{name} dropped")
    axes.axhline(study["complete"], color="gray", linestyle="--", label="nothing dropped")
    axes.set(xlabel="share of utterances", ylabel="weighted F1", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    write_png(path, figure)


def plot_grouped_bars(
    values: Mapping[str, Mapping[str, tuple[float, float]]], label: str, path: epath.PathLike
) -> None:
    """Plots `values[series][group]`, a mean and a standard deviation, as bars in a PNG file."""
    from matplotlib.figure import Figure

    groups = list(next(iter(values.values())))
    centers, width = np.arange(len(groups)), 0.8 / len(values)
    figure = Figure(figsize=(2 + 1.1 * len(groups), 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (series, value_by_group) in enumerate(values.items()):
        means, deviations = zip(*(value_by_group[group] for group in groups), strict=True)
        x = centers + (index - (len(values) - 1) / 2) * width
        axes.bar(x, means, width, yerr=deviations, capsize=3, label=series)
    axes.set_xticks(centers, groups, rotation=30, ha="right")
    axes.set(ylabel=label, ylim=(0, 1))
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    write_png(path, figure)


def plot_dataset(
    class_counts: Mapping[str, Mapping[str, int]],
    lengths: Mapping[str, np.ndarray],
    seconds: Mapping[str, np.ndarray],
    path: epath.PathLike,
) -> None:
    """Plots the classes, dialogue lengths and recording durations of each split as a PNG file.

    Without recordings, the panel of durations is omitted.
    """
    from matplotlib.figure import Figure

    has_recordings = any(len(durations) for durations in seconds.values())
    columns = 3 if has_recordings else 2
    figure = Figure(figsize=(5 * columns, 4), layout="constrained")
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
    histograms = [(lengths, "utterances", "dialogue length")]
    if has_recordings:
        histograms.append((seconds, "seconds", "recording duration"))
    for axes, (values_by_split, unit, title) in zip(panels[1:], histograms, strict=True):
        bins = np.linspace(0, np.concatenate(list(values_by_split.values())).max(), 30)
        for split, values in values_by_split.items():
            if len(values):
                axes.hist(values, bins, density=True, histtype="step", label=split)
        axes.set(xlabel=unit, ylabel="density", title=title)
    write_png(path, figure)


def plot_sweep(
    axes: Mapping[str, Sequence[Any]],
    scores: Mapping[tuple[Any, ...], tuple[float, float]],
    label: str,
    path: epath.PathLike,
) -> None:
    """Plots the scores of a sweep as a PNG file.

    One varied field is shown as a line, or as bars if its values are not numbers. Two varied fields
    are shown as a heat map. With more varied fields, the best points are shown as bars.

    Args:
      axes: Values by field, in the order of the grid.
      scores: Mean and standard deviation of each point's score, by the point's values. The best
        point comes first.
      label: Name of the score.
      path: Path of the PNG file.
    """
    from matplotlib.figure import Figure

    varied = [(index, name) for index, name in enumerate(axes) if len(axes[name]) > 1]
    is_map = len(varied) == 2
    figure = Figure(figsize=(6, 4), layout="constrained")
    plot = figure.subplots()
    if is_map:
        (row, row_name), (column, column_name) = varied
        _plot_heat_map(
            plot,
            {(point[row], point[column]): mean for point, (mean, _) in scores.items()},
            axes[row_name],
            axes[column_name],
        )
        plot.set(xlabel=column_name, ylabel=row_name, title=label)
        figure.set_size_inches(
            2.5 + 0.9 * len(axes[column_name]), 1.5 + 0.5 * max(3, len(axes[row_name]))
        )
    elif len(varied) == 1 and all(_is_number(value) for value in axes[varied[0][1]]):
        ((index, name),) = varied
        line = sorted(
            (point[index], mean, deviation) for point, (mean, deviation) in scores.items()
        )
        values, means, deviations = zip(*line, strict=True)
        plot.errorbar(values, means, deviations, marker="o", capsize=3)
        # A linear scale would hide differences between values of different orders of magnitude.
        if values[0] > 0 and values[-1] / values[0] >= 8:
            plot.set_xscale("log")
        plot.set(xlabel=name, ylabel=label)
        plot.grid(alpha=0.3)
    else:
        best = list(scores.items())[:_MAX_BARS]
        shown = varied or list(enumerate(axes))[:1]
        names = [", ".join(f"{name}={point[index]}" for index, name in shown) for point, _ in best]
        means, deviations = zip(*(score for _, score in best), strict=True)
        plot.barh(np.arange(len(best)), means, xerr=deviations, capsize=3)
        plot.set_yticks(np.arange(len(best)), names, fontsize=8)
        plot.invert_yaxis()
        plot.set(xlabel=label)
        plot.grid(axis="x", alpha=0.3)
        figure.set_size_inches(8, 1.5 + 0.3 * len(best))
    write_png(path, figure)


_MAX_BARS = 30


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plot_heat_map(
    plot: Any,
    means: Mapping[tuple[Any, Any], float],
    row_values: Sequence[Any],
    column_values: Sequence[Any],
) -> None:
    """Plots a value for each pair of a row and a column; pairs without a value are blank."""
    table = np.array(
        [[means.get((row, column), np.nan) for column in column_values] for row in row_values]
    )
    plot.imshow(table, cmap="viridis", aspect="auto")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (row, column), mean in np.ndenumerate(table):
        if np.isfinite(mean):
            color = "white" if mean < middle else "black"
            plot.text(column, row, f"{mean:.3f}", ha="center", va="center", color=color, fontsize=8)
    plot.set_xticks(range(len(column_values)), [str(value) for value in column_values])
    plot.set_yticks(range(len(row_values)), [str(value) for value in row_values])


def plot_differences(
    differences: Mapping[str, Mapping[str, tuple[float, float | None, float | None]]],
    label: str,
    path: epath.PathLike,
) -> None:
    """Plots differences and their intervals by series and row as a PNG file.

    Args:
      differences: Difference with its lower and upper bound, by series and row. The bounds are None
        if there is no interval.
      label: Label of the axis of the differences.
      path: Path of the PNG file.
    """
    from matplotlib.figure import Figure

    rows = list(next(iter(differences.values())))
    figure = Figure(
        figsize=(7, 1.5 + (0.3 + 0.12 * (len(differences) - 1)) * len(rows)), layout="constrained"
    )
    plot = figure.subplots()
    step = 0.6 / len(differences)
    for index, (series, values) in enumerate(differences.items()):
        y = np.arange(len(rows)) + (index - (len(differences) - 1) / 2) * step
        centers = np.array([values[row][0] for row in rows])
        # On a very small split, a difference may be outside of its percentile interval, but error
        # bars must not be negative.
        below = [
            max(0, value - (value if low is None else low)) for value, low, _ in values.values()
        ]
        above = [
            max(0, (value if high is None else high) - value) for value, _, high in values.values()
        ]
        plot.errorbar(
            centers, y, xerr=[below, above], fmt="o", capsize=3, markersize=4, label=series
        )
    plot.axvline(0, color="gray", linewidth=1)
    plot.set_yticks(np.arange(len(rows)), rows)
    plot.invert_yaxis()
    plot.set(xlabel=label)
    plot.grid(axis="x", alpha=0.3)
    if len(differences) > 1:
        plot.legend()
    write_png(path, figure)
