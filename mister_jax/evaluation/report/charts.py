"""The drawings of a report, as SVG inside HTML; colours and fonts come from `style.css`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from mister_jax.evaluation.report.summary import Bin, Score

# Of the two curves: about as wide as a phone, so that their letters keep their size there.
WIDTH, HEIGHT = 360, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 30, 348, 30, 252


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def element(name: str, content: str = "", **attributes: Any) -> str:
    """An element; attributes' underscores stand for hyphens, `class_` for `class`."""
    said = "".join(
        f' {key.removesuffix("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{said}>{content}</{name}>"


def _text(value: Any) -> str:
    return _number(value) if isinstance(value, float) else str(value)


def _svg(label: str, parts: Iterable[str], *, class_: str = "chart") -> str:
    content = "".join(parts)
    return element(
        "svg", content, class_=class_, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label
    )


def whisker(score: Score, kind: str, mark: float | None = None) -> str:
    """A score between 0 and 1 as a dot on its interval; figures beside it say the same.

    Args:
      score: to draw.
      kind: CSS class of its colour.
      mark: a value that others are compared with, a line through all rows.
    """
    width, height = 160, 22

    def x(value: float) -> float:
        return 5 + value * (width - 10)

    middle = height / 2
    parts = [element("line", class_="rule", x1=x(v), x2=x(v), y1=0, y2=height) for v in (0, 0.5, 1)]
    if mark is not None:
        parts.append(element("line", class_="mark", x1=x(mark), x2=x(mark), y1=0, y2=height))
    if score.low is not None and score.high is not None:
        parts.append(
            element("line", class_="span", x1=x(score.low), x2=x(score.high), y1=middle, y2=middle)
        )
    parts.append(element("circle", class_="dot", cx=x(score.value), cy=middle, r=4))
    return element(
        "svg",
        "".join(parts),
        class_=f"whisker {kind}",
        viewBox=f"0 0 {width} {height}",
        aria_hidden="true",
    )


class _Axes:
    """A plot area with shares across, and values from `low` to `high` upwards."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def x(self, value: float) -> float:
        return _LEFT + value * (_RIGHT - _LEFT)

    def y(self, value: float) -> float:
        return _BOTTOM - (value - self.low) / (self.high - self.low) * (_BOTTOM - _TOP)

    def frame(self, across: str, upward: str) -> list[str]:
        """Grid, ticks and titles."""
        parts = [
            element("text", escape(upward), x=0, y=13),
            element(
                "text",
                escape(across),
                x=(_LEFT + _RIGHT) / 2,
                y=HEIGHT - 12,
                text_anchor="middle",
            ),
        ]
        step = 0.2 if self.high - self.low > 0.5 else 0.1
        for tick in range(round((self.high - self.low) / step) + 1):
            value = self.low + tick * step
            y = self.y(value)
            parts.append(element("line", class_="rule", x1=_LEFT, x2=_RIGHT, y1=y, y2=y))
            label = _number(value)
            parts.append(element("text", label, x=_LEFT - 7, y=y + 4, text_anchor="end"))
        for tick in range(6):
            share = tick / 5
            x = self.x(share)
            parts.append(element("text", _number(share), x=x, y=_BOTTOM + 17, text_anchor="middle"))
        return parts


def calibration_curve(bins: Sequence[Bin]) -> str:
    """Accuracy over confidence, with the diagonal and how many utterances each bin holds."""
    axes = _Axes(0, 1)
    most = max(part.count for part in bins)
    parts = axes.frame("confidence", "accuracy")
    for part in bins:
        height = part.count / most * 44
        left, right = axes.x(part.low) + 1, axes.x(part.high) - 1
        parts.append(
            element(
                "rect",
                element("title", f"{part.count} utterances"),
                class_="amount",
                x=left,
                y=_BOTTOM - height,
                width=right - left,
                height=height,
            )
        )
    parts.append(
        element("line", class_="mark", x1=axes.x(0), y1=axes.y(0), x2=axes.x(1), y2=axes.y(1))
    )
    for part in bins:
        x, score = axes.x(part.confidence), part.accuracy
        if score.low is not None and score.high is not None:
            parts.append(
                element(
                    "line", class_="span", x1=x, x2=x, y1=axes.y(score.low), y2=axes.y(score.high)
                )
            )
    points = " ".join(
        f"{_number(axes.x(part.confidence))},{_number(axes.y(part.accuracy.value))}"
        for part in bins
    )
    parts.append(element("polyline", class_="line", points=points))
    for part in bins:
        about = f"{part.count} utterances, confidence {part.confidence:.2f}, accuracy "
        parts.append(
            element(
                "circle",
                element("title", f"{about}{part.accuracy.value:.2f}"),
                class_="dot",
                cx=axes.x(part.confidence),
                cy=axes.y(part.accuracy.value),
                r=4,
            )
        )
    return _svg("Accuracy over confidence; the table below has the numbers", parts)


def missing_modality_curve(study: Mapping[str, Any]) -> str:
    """Weighted F1 over the share of utterances that lost their speech, their text, or either."""
    lines = missing_modality_lines(study)
    values = [study["complete"]]
    for points in lines.values():
        values += [
            end for _, mean, deviation in points for end in (mean - deviation, mean + deviation)
        ]
    low = max(0.0, math.floor(min(values) * 10 - 0.2) / 10)
    high = min(1.0, math.ceil(max(values) * 10 + 0.2) / 10)
    if high - low > 0.5:
        low, high = 0.0, 1.0
    axes = _Axes(low, high)
    parts = axes.frame("share of utterances without it", "weighted F1")
    y = axes.y(study["complete"])
    parts.append(element("line", class_="mark", x1=_LEFT, x2=_RIGHT, y1=y, y2=y))
    for name, points in lines.items():
        drawn = [
            element(
                "line",
                class_="span",
                x1=axes.x(share),
                x2=axes.x(share),
                y1=axes.y(mean - deviation),
                y2=axes.y(mean + deviation),
            )
            for share, mean, deviation in points
        ]
        path = " ".join(
            f"{_number(axes.x(share))},{_number(axes.y(mean))}"
            for share, mean, _ in [(0.0, study["complete"], 0.0), *points]
        )
        drawn.append(element("polyline", class_="line", points=path))
        drawn += [
            element(
                "circle",
                element("title", f"{name}, {share:g}: {mean:.3f} ± {deviation:.3f}"),
                class_="dot",
                cx=axes.x(share),
                cy=axes.y(mean),
                r=4,
            )
            for share, mean, deviation in points
        ]
        share, mean, _ = points[-1]
        x, y = axes.x(share), axes.y(mean) - 9
        drawn.append(element("text", name, x=x - 4, y=y, text_anchor="end"))
        parts.append(element("g", "".join(drawn), class_=name))
    return _svg(
        "Weighted F1 over the share of missing modalities; the table has the numbers", parts
    )


def missing_modality_lines(
    study: Mapping[str, Any],
) -> dict[str, list[tuple[float, float, float]]]:
    """The (share, mean, deviation) of each kind of loss, by share: speech, text, both."""
    lines: dict[str, list[tuple[float, float, float]]] = {"speech": [], "text": [], "both": []}
    for point in study["points"]:
        speech, text = point["drop_speech"], point["drop_text"]
        kind = "both" if speech and text else "speech" if speech else "text" if text else None
        if kind:
            share = max(speech, text)
            lines[kind].append((share, point["weighted_f1"], point["deviation"]))
    return {name: sorted(points) for name, points in lines.items() if points}


def stacked_bar(names: Sequence[str], shares: np.ndarray) -> str:
    """Shares that add to one, as a bar whose parts are labeled in percent."""
    percent = [100 * float(share) for share in shares]
    said = ", ".join(f"{name} {value:.0f} %" for name, value in zip(names, percent, strict=True))
    parts = [
        element(
            "span",
            f"{value:.0f}" if value >= 8 else "",
            class_=f"part {name}",
            style=f"width:{value:.2f}%",
        )
        for name, value in zip(names, percent, strict=True)
    ]
    return element("div", "".join(parts), class_="stack", role="img", aria_label=said, title=said)
