"""Arranges predictions as tiers of annotations.

Every speaker has a text tier, named after the speaker, and an emotion tier, such as "Ann" and "Ann
emotion". Without speakers, the tiers are "text" and "emotion". Intervals in a tier must not
overlap, so overlapping utterances of a speaker are put in further tiers, such as "Ann 2".

If the transcript is an annotation file, its tiers are kept as far as the output format allows, and
the emotion tiers are added under names that the annotation does not use.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from mister_jax.data.transcripts.annotations import Tier
from mister_jax.inference.timeline.rows import Row, milliseconds, one_line, shown_emotion

Interval = tuple[float, float, str]
"""Start, end and text."""

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class TierPair:
    """A tier of texts and the tier of their emotions.

    Attributes:
      text_name: Name of the text tier.
      emotion_name: Name of the emotion tier.
      speaker: Speaker, empty if unknown.
      rows: Rows without overlaps, sorted by start time.
    """

    text_name: str
    emotion_name: str
    speaker: str
    rows: list[Row]


def split_tiers(rows: Sequence[Row], given: Iterable[str] | None = None) -> list[TierPair]:
    """Splits sorted rows into tiers: one per speaker, or more if a speaker's utterances overlap.

    Args:
      rows: Rows of one recording, sorted by start time.
      given: Names of the tiers in the annotation, or None. If names are given, no text tiers are
        added, so only the names of the emotion tiers must be new.
    """
    by_speaker: dict[str, list[Row]] = {}
    for row in rows:
        by_speaker.setdefault(one_line(row.get("speaker")), []).append(row)
    tiers: list[TierPair] = []
    names = set(given or ())
    for speaker, speaker_rows in by_speaker.items():
        for lane in split_overlaps(speaker_rows, milliseconds):
            # Take the first number whose names are free: the name of Ann's second tier, "Ann 2",
            # may also be the name of a speaker.
            for number in itertools.count(1):
                suffix = f" {number}" if number > 1 else ""
                pair = (speaker or "text") + suffix, f"{speaker} emotion{suffix}".strip()
                new_names = pair if given is None else pair[1:]
                if names.isdisjoint(new_names):
                    break
            names.update(new_names)
            tiers.append(TierPair(*pair, speaker, lane))
    return tiers


def row_intervals(rows: Iterable[Row], key: str) -> list[Interval]:
    """Returns each row's times in seconds, rounded to milliseconds, and the row's text for `key`.

    Uncertain emotions get a question mark.
    """
    intervals = []
    for row in rows:
        start, end = milliseconds(row)
        text = shown_emotion(row) if key == "emotion" else one_line(row.get(key))
        intervals.append((start / 1000, end / 1000, text))
    return intervals


def interval_tiers(given: Iterable[Tier]) -> Iterator[tuple[Tier, str, list[Interval]]]:
    """Yields each interval tier of an annotation, with a unique name and sorted intervals.

    Intervals that overlap other intervals of the tier are put in further tiers, such as "Ann 2".
    """
    tiers = [tier for tier in given if not tier.is_points]
    names: set[str] = set()  # A TextGrid may repeat names.
    given_names = {tier.name for tier in tiers}
    for tier in tiers:
        intervals = sorted((it.start, it.end, it.text) for it in tier.intervals)
        intervals = [(start, end, text) for start, end, text in intervals if end > start]
        lanes = split_overlaps(intervals, lambda interval: interval[:2])
        for number, lane in enumerate(lanes or [[]]):
            name = unique_name(tier.name, names if number == 0 else names | given_names)
            names.add(name)
            yield tier, name, lane


def unique_name(name: str, used: Collection[str]) -> str:
    """Returns the name, followed by a number if the name is already used."""
    numbered = (f"{name} {number}" for number in itertools.count(2))
    return next(it for it in itertools.chain([name], numbered) if it not in used)


def split_overlaps(
    items: Iterable[_T], times: Callable[[_T], tuple[float, float]]
) -> list[list[_T]]:
    """Divides items that are sorted by start time into lists without overlaps."""
    lanes: list[list[_T]] = []
    for item in items:
        start, _ = times(item)
        lane = next((it for it in lanes if times(it[-1])[1] <= start), None)
        if lane is None:
            lanes.append([item])
        else:
            lane.append(item)
    return lanes
