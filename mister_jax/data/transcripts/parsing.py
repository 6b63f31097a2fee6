"""Types and functions shared by the readers of all transcript formats."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from mister_jax.data.audio_source import Channel
from mister_jax.data.transcripts.segments import Segment, Transcript
from mister_jax.errors import InputError, MissingExtraError

Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The part of a transcript to read; see `reader.read_transcript`."""

    tier: str | None = None
    speaker: str | None = None
    label_tier: str | None = None
    label_column: str | None = None
    recording: str | None = None
    ignore_emotion_tiers: bool = False


class Notes:
    """Collects the notes of a transcript and counts the segments that are left out."""

    def __init__(self) -> None:
        self._left_out: collections.Counter[str] = collections.Counter()
        self._messages: list[str] = []

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Counts segments that are left out for a reason, such as "without text"."""
        if count:
            self._left_out[reason] += count

    def add(self, message: str) -> None:
        """Adds a note, unless it was already added."""
        if message not in self._messages:
            self._messages.append(message)

    def messages(self) -> tuple[str, ...]:
        """Returns the notes for the user."""
        left_out = (
            f"left out {count} segment{'s' * (count > 1)}: {reason}"
            for reason, count in self._left_out.items()
        )
        return (*self._messages, *left_out)


@dataclasses.dataclass(frozen=True)
class DetectedFormat:
    """The format of a file, detected from its content.

    Attributes:
      name: Name of the format.
      read: Function that returns the transcript in the file. The segments of the transcript may be
        unsorted and have invalid times.
      options: Options of `Selection` that the format supports. All formats support `speaker`.
    """

    name: str
    read: Callable[[Selection, Notes], Transcript]
    options: frozenset[str] = frozenset()


_CLOCK = re.compile(r"(-?)(?:(?:(\d+):)?(\d+):)?(\d+)(?:[.,](\d*))?s?")
_ISO_DURATION = re.compile(r"PT(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?")


def parse_seconds(text: str) -> float:
    """Converts a time such as "12.5", "12,5", "12.5s", "1:02:03,450" or "PT1M2.5S" to seconds.

    Raises:
      ValueError: The text is not a time.
    """
    text = text.strip()
    if match := _CLOCK.fullmatch(text):
        sign, hours, minutes, seconds, fraction = match.groups()
        whole_minutes = 60 * int(hours or 0) + int(minutes or 0)
        value = 60 * whole_minutes + float(f"{seconds}.{fraction or 0}")
        return -value if sign else value
    if (match := _ISO_DURATION.fullmatch(text)) and len(text) > 2:
        hours, minutes, seconds = match.groups()
        return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds or 0)
    return float(text)


def one_line(text: str) -> str:
    """Returns a text without line breaks and repeated spaces."""
    return " ".join(text.split())


def describe_counts(counts: Mapping[str, int]) -> str:
    """Formats counts, such as "words (12), phones (40)"."""
    return ", ".join(f"{name or 'unnamed'} ({count})" for name, count in counts.items())


def channel_indices(names: Iterable[str]) -> dict[str, Channel | None]:
    """Maps the channel names in a file, such as "1" and "2", or "A" and "B", to channel indices.

    If the names have another form, all indices are None. If a file names only one channel, the
    index is also None: a single "1" or "A" may also stand for the mix of all channels.
    """
    names = sorted(set(names))
    for first in ("0", "1", "A", "a"):
        indices = [ord(name) - ord(first) if len(name) == 1 else -1 for name in names]
        if len(names) > 1 and indices[0] == 0 and all(0 < index < 10 for index in indices[1:]):
            return dict(zip(names, indices, strict=True))
    return dict.fromkeys(names)


def select_recording(names: Sequence[str], recording: str | None) -> str:
    """Returns the name of the recording to read from a file.

    Raises:
      InputError: The file names several recordings, and `recording` is not one of them.
    """
    distinct = dict.fromkeys(names)
    if len(distinct) == 1:
        return next(iter(distinct))
    for name in distinct:
        if recording and recording in (name, pathlib.PurePath(name).stem):
            return name
    listed = ", ".join(list(distinct)[:10]) + (", ..." if len(distinct) > 10 else "")
    raise InputError(
        f"has {len(distinct)} recordings, and none is named {recording!r}; recordings: {listed}"
        if recording
        else f"has {len(distinct)} recordings; choose one with recording=NAME: {listed}"
    )


def missing_library(library: str, feature: str) -> MissingExtraError:
    """Returns the error for a missing library that the extra `predict` installs."""
    return MissingExtraError(
        f'{feature} needs {library}; install it with pip install "mister_jax[predict]"'
    )


def keep_speaker(segments: Sequence[Segment], speaker: str | None) -> Sequence[Segment]:
    """Returns the segments of a speaker, or all segments if `speaker` is None.

    Raises:
      InputError: The transcript has no such speaker.
    """
    if speaker is None:
        return segments
    kept = [segment for segment in segments if segment.speaker == speaker]
    if not kept:
        counts = collections.Counter(segment.speaker or "unknown" for segment in segments)
        raise InputError(
            f"has no segments of speaker {speaker!r}; speakers: {describe_counts(counts)}"
        )
    return kept
