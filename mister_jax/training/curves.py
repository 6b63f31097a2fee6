"""Plots of the training loss and the validation scores."""

from __future__ import annotations

from etils import epath

from mister_jax.io import read_json_lines, write_png


def plot_training_curves(metrics: epath.PathLike, path: epath.PathLike) -> None:
    """Plots a run's training loss and validation scores over its steps.

    Args:
      metrics: Path of the run's `metrics.jsonl`.
      path: Output path of the PNG file.
    """
    from matplotlib.figure import Figure

    rows = read_json_lines(metrics)
    figure = Figure(figsize=(10, 4))
    # Fixed margins are twice as fast as a computed layout.
    margins = {"left": 0.06, "right": 0.98, "bottom": 0.12, "top": 0.92, "wspace": 0.15}
    loss_axes, score_axes = figure.subplots(1, 2, gridspec_kw=margins)
    lines = (
        (loss_axes, "train/loss", "loss"),
        (score_axes, "validation/weighted_f1", "weighted F1"),
        (score_axes, "validation/macro_f1", "macro F1"),
        (score_axes, "validation/accuracy", "accuracy"),
    )
    for axes, name, label in lines:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=label)
    for axes, title in ((loss_axes, "training loss"), (score_axes, "validation")):
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
    score_axes.legend()
    write_png(path, figure)
