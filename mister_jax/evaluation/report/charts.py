"""Draws the charts in a report as SVG and HTML. `style.css` defines colors and fonts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from mister_jax.evaluation.confidence_intervals import Estimate
from mister_jax.evaluation.figures import missing_modality_lines
from mister_jax.evaluation.report.elements import coordinate, element
from mister_jax.evaluation.report.statistics import CalibrationBin

# Charts are about as wide as a phone's screen, so that phones do not shrink the charts' text.
_WIDTH, _HEIGHT = 360, 300
_MAX_POINTS = 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 30, 348, 30, 252


def whisker(score: Estimate, color: str, mark: float | None = None) -> str:
    """Draws a score from 0 to 1 as a dot on its interval, with a dashed line at `mark`.

    `color` is a CSS class. Screen readers skip the drawing, because the table contains the numbers.
    """
    width, height = 160, 22

    def x(value: float) -> float:
        return 5 + value * (width - 10)

    middle = height / 2
    parts = [_line("rule", x(value), 0, x(value), height) for value in (0, 0.5, 1)]
    if mark is not None:
        parts.append(_line("mark", x(mark), 0, x(mark), height))
    if score.low is not None and score.high is not None:
        parts.append(_line("span", x(score.low), middle, x(score.high), middle))
    parts.append(element("circle", class_="dot", cx=x(score.value), cy=middle, r=4))
    return element(
        "svg",
        "".join(parts),
        class_=f"whisker {color}",
        viewBox=f"0 0 {width} {height}",
        aria_hidden="true",
    )


def stacked_bar(names: Sequence[str], shares: np.ndarray) -> str:
    """Draws shares that add up to 1 as a bar with labels in percent."""
    percent = [100 * float(share) for share in shares]
    label = ", ".join(f"{name} {value:.0f}%" for name, value in zip(names, percent, strict=True))
    parts = [
        element(
            "span",
            f"{value:.0f}" if value >= 8 else "",
            class_=f"part {name}",
            style=f"width:{value:.2f}%",
        )
        for name, value in zip(names, percent, strict=True)
    ]
    return element("div", "".join(parts), class_="stack", role="img", aria_label=label, title=label)


def calibration_curve(bins: Sequence[CalibrationBin]) -> str:
    """Draws accuracy over confidence, the diagonal, and the number of utterances in each bin."""
    axes = _Axes(0, 1)
    parts = axes.frame("confidence", "accuracy")
    largest = max(part.utterances for part in bins)
    for part in bins:
        height = part.utterances / largest * 44
        left, right = axes.x(part.low) + 1, axes.x(part.high) - 1
        parts.append(
            element(
                "rect",
                element("title", f"{part.utterances} utterances"),
                class_="amount",
                x=left,
                y=_BOTTOM - height,
                width=right - left,
                height=height,
            )
        )
    parts.append(_line("mark", axes.x(0), axes.y(0), axes.x(1), axes.y(1)))
    for part in bins:
        if part.accuracy.low is not None and part.accuracy.high is not None:
            x = axes.x(part.confidence)
            parts.append(_line("span", x, axes.y(part.accuracy.low), x, axes.y(part.accuracy.high)))
    parts.append(axes.polyline((part.confidence, part.accuracy.value) for part in bins))
    for part in bins:
        label = (
            f"{part.utterances} utterances, confidence {part.confidence:.2f}, "
            f"accuracy {part.accuracy.value:.2f}"
        )
        parts.append(axes.dot(part.confidence, part.accuracy.value, label))
    return _chart("Accuracy over confidence; the table below has the numbers", parts)


def risk_coverage_curve(coverage: np.ndarray, risk: np.ndarray) -> str:
    """Draws the share of wrong predictions over the share of utterances that are kept."""
    error = float(risk[-1])
    axes = _Axes(0, min(1.0, math.ceil(max(float(risk.max()), 0.1) * 10) / 10))
    parts = axes.frame("share of utterances that are kept", "share of wrong predictions")
    parts.append(_line("mark", _LEFT, axes.y(error), _RIGHT, axes.y(error)))
    shown = np.unique(np.linspace(0, len(risk) - 1, _MAX_POINTS).round().astype(int))
    points = [(float(coverage[index]), float(risk[index])) for index in shown]
    parts.append(axes.polyline(points))
    parts.append(axes.dot(1.0, error, f"all utterances: {error:.3f}"))
    return _chart(
        "Share of wrong predictions over the share of kept utterances; the table has the numbers",
        parts,
    )


def missing_modality_curve(study: Mapping[str, Any]) -> str:
    """Draws weighted F1 over the share of utterances that lost speech, text, or both."""
    lines = missing_modality_lines(study)
    complete = study["complete"]
    values = [complete]
    for points in lines.values():
        for _, mean, deviation in points:
            values += [mean - deviation, mean + deviation]
    low = max(0.0, math.floor(min(values) * 10 - 0.2) / 10)
    high = min(1.0, math.ceil(max(values) * 10 + 0.2) / 10)
    if high - low > 0.5:
        low, high = 0.0, 1.0
    axes = _Axes(low, high)
    parts = axes.frame("share of utterances without the modality", "weighted F1")
    parts.append(_line("mark", _LEFT, axes.y(complete), _RIGHT, axes.y(complete)))
    for name, points in lines.items():
        line = [
            _line("span", x, axes.y(mean - deviation), x, axes.y(mean + deviation))
            for x, mean, deviation in ((axes.x(share), *score) for share, *score in points)
        ]
        line.append(axes.polyline([(0.0, complete), *((share, mean) for share, mean, _ in points)]))
        line += [
            axes.dot(share, mean, f"{name}, {share:g}: {mean:.3f} ± {deviation:.3f}")
            for share, mean, deviation in points
        ]
        share, mean, _ = points[-1]
        x, y = axes.x(share) - 4, axes.y(mean) - 9
        line.append(element("text", name, x=x, y=y, text_anchor="end"))
        parts.append(element("g", "".join(line), class_=name))
    return _chart(
        "Weighted F1 over the share of missing modalities; the table has the numbers", parts
    )


class _Axes:
    """Plot area with shares on the x axis, and values from `low` to `high` on the y axis."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def x(self, value: float) -> float:
        return _LEFT + value * (_RIGHT - _LEFT)

    def y(self, value: float) -> float:
        return _BOTTOM - (value - self.low) / (self.high - self.low) * (_BOTTOM - _TOP)

    def frame(self, x_title: str, y_title: str) -> list[str]:
        """Draws grid lines, tick labels and axis titles."""
        center = (_LEFT + _RIGHT) / 2
        parts = [
            element("text", escape(y_title), x=0, y=13),
            element("text", escape(x_title), x=center, y=_HEIGHT - 12, text_anchor="middle"),
        ]
        step = 0.2 if self.high - self.low > 0.5 else 0.1
        for tick in range(round((self.high - self.low) / step) + 1):
            value = self.low + tick * step
            y = self.y(value)
            parts.append(_line("rule", _LEFT, y, _RIGHT, y))
            label = coordinate(value)
            parts.append(element("text", label, x=_LEFT - 7, y=y + 4, text_anchor="end"))
        for tick in range(6):
            share = tick / 5
            label, x = coordinate(share), self.x(share)
            parts.append(element("text", label, x=x, y=_BOTTOM + 17, text_anchor="middle"))
        return parts

    def polyline(self, points: Iterable[tuple[float, float]]) -> str:
        path = " ".join(f"{coordinate(self.x(x))},{coordinate(self.y(y))}" for x, y in points)
        return element("polyline", class_="line", points=path)

    def dot(self, x: float, y: float, label: str) -> str:
        title = element("title", label)
        return element("circle", title, class_="dot", cx=self.x(x), cy=self.y(y), r=4)


def _line(class_: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return element("line", class_=class_, x1=x1, y1=y1, x2=x2, y2=y2)


def _chart(label: str, parts: Iterable[str]) -> str:
    return element(
        "svg",
        "".join(parts),
        class_="chart",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=label,
    )
