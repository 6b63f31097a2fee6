"""Timed segments of a recording, which transcript readers and speech recognizers produce."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from mister_jax.data.audio_source import Channel


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a segment. `start` and `end` are in seconds, or None if unknown."""

    text: str
    start: float | None = None
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a recording: a subtitle, an interval of a tier, a turn, or an utterance.

    Attributes:
      start: Start in seconds from the beginning of the recording.
      end: End in seconds from the beginning of the recording.
      text: Text, empty if there is none.
      speaker: Name of the speaker, if known.
      channel: Channel of the recording to read; None reads the default channel.
      words: Words with times, if known. The words joined with spaces may differ from `text`.
      label: Annotated emotion, if known.
    """

    start: float
    end: float
    text: str = ""
    speaker: str | None = None
    channel: Channel | None = None
    words: tuple[Word, ...] = ()
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Transcript:
    """The segments of a transcript file.

    Attributes:
      format: Name of the detected format, such as "SRT" or "Praat TextGrid".
      segments: Segments. `read_transcript` sorts the segments by start time.
      notes: Notes for the user, for example on segments that were left out.
      has_text: Whether the file contains text. For example, an RTTM contains only turns.
    """

    format: str
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()
    has_text: bool = True


def count_letters(text: str) -> int:
    """Returns the number of letters and digits in a text."""
    return sum(map(str.isalnum, text))


def word_offsets(text: str, words: Sequence[Word]) -> list[int]:
    """Returns the offset of each word in the text, by counting the letters before the word."""
    letters = [offset for offset, character in enumerate(text) if character.isalnum()]
    total = sum(count_letters(word.text) for word in words) or 1
    counts = itertools.accumulate((count_letters(word.text) for word in words), initial=0)
    offsets = []
    for count, _ in zip(counts, words, strict=False):
        position = round(count * len(letters) / total)
        offset = letters[position] if position < len(letters) else len(text)
        # Opening quotation marks and brackets belong to the word that follows them.
        while offset and not text[offset - 1].isspace() and not text[offset - 1].isalnum():
            offset -= 1
        offsets.append(offset)
    return offsets
