"""Formats predictions as a Praat TextGrid."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from mister_jax.data.transcripts.annotations import Annotation, Tier
from mister_jax.inference.timeline.rows import Row, milliseconds, recording_seconds
from mister_jax.inference.timeline.tiers import Interval, interval_tiers, row_intervals, split_tiers

_ROUNDING = 0.5001e-3  # maximum rounding error of a time in seconds


@dataclasses.dataclass(frozen=True)
class _GridTier:
    name: str
    span: tuple[float, float]
    intervals: Sequence[Interval]
    is_points: bool = False


def to_textgrid(rows: Sequence[Row], given: Annotation | None = None) -> str:
    """Returns a Praat TextGrid in the long text format.

    Args:
      rows: Rows of one recording, sorted by start time.
      given: Annotation to which the emotion tiers are added. The tiers of a TextGrid are kept
        unchanged. The tiers of an EAF become interval tiers.
    """
    last_end = max(milliseconds(row)[1] for row in rows) / 1000
    start: float = 0
    end = max(round(1000 * recording_seconds(rows)) / 1000, last_end)
    tiers: list[_GridTier] = []
    if given is not None and given.span is not None:
        start, end = given.span
        if last_end > end + 2 * _ROUNDING:
            end = last_end
        tiers += (_unchanged(tier, given.span) for tier in given.tiers)
    elif given is not None:
        end = max([end, *(it.end for tier in given.tiers for it in tier.intervals)])
        for _, name, intervals in interval_tiers(given.tiers):
            tiers.append(_GridTier(name, (0, end), list(_fill_gaps(intervals, 0, end))))
    boundaries = sorted({time for tier in tiers for it in tier.intervals for time in it[:2]})
    names = None if given is None else [tier.name for tier in tiers]
    for pair in split_tiers(rows, names):
        keys = {pair.text_name: "text"} if given is None else {}
        for name, key in (keys | {pair.emotion_name: "emotion"}).items():
            intervals = [_snap(it, boundaries) for it in row_intervals(pair.rows, key)]
            tiers.append(_GridTier(name, (start, end), list(_fill_gaps(intervals, start, end))))
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        f"xmin = {start}",
        f"xmax = {end}",
        "tiers? <exists>",
        f"size = {len(tiers)}",
        "item []:",
    ]
    for number, tier in enumerate(tiers, start=1):
        lines += (f"    {line}" for line in _tier_lines(number, tier))
    return "\n".join(lines) + "\n"


def _unchanged(tier: Tier, span: tuple[float, float]) -> _GridTier:
    intervals = [(it.start, it.end, it.text) for it in tier.intervals]
    return _GridTier(tier.name, tier.span or span, intervals, tier.is_points)


def _snap(interval: Interval, boundaries: Sequence[float]) -> Interval:
    """Replaces rounded times with the annotation's exact boundaries if these are close enough."""

    def nearest(seconds: float) -> float:
        index = bisect.bisect(boundaries, seconds)
        near = min(boundaries[max(index - 1, 0) : index + 1], key=lambda it: abs(it - seconds))
        return near if abs(near - seconds) <= _ROUNDING else seconds

    if not boundaries:
        return interval
    start, end = map(nearest, interval[:2])
    return (start, end, interval[2]) if start < end else interval


def _fill_gaps(intervals: Iterable[Interval], start: float, end: float) -> Iterator[Interval]:
    """Yields the intervals of a tier, and empty intervals in the gaps, as Praat requires."""
    position = start
    for interval_start, interval_end, text in intervals:
        # Rounded times may be before the start or after the end of the annotation.
        first, last = max(interval_start, position), min(interval_end, end)
        if first > position:
            yield position, first, ""
        if last > first:
            yield first, last, text
            position = last
    if position < end:
        yield position, end, ""


def _tier_lines(number: int, tier: _GridTier) -> Iterator[str]:
    yield f"item [{number}]:"
    yield f'    class = "{"TextTier" if tier.is_points else "IntervalTier"}"'
    yield f'    name = "{_quoted(tier.name)}"'
    yield f"    xmin = {tier.span[0]}"
    yield f"    xmax = {tier.span[1]}"
    kind = "points" if tier.is_points else "intervals"
    yield f"    {kind}: size = {len(tier.intervals)}"
    for index, (start, end, text) in enumerate(tier.intervals, start=1):
        yield f"    {kind} [{index}]:"
        if tier.is_points:
            yield f"        number = {start}"
            yield f'        mark = "{_quoted(text)}"'
        else:
            yield f"        xmin = {start}"
            yield f"        xmax = {end}"
            yield f'        text = "{_quoted(text)}"'


def _quoted(text: str) -> str:
    return text.replace('"', '""')
