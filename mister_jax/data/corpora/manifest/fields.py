"""Checks of an utterance's fields, shared by manifests and by `predict`."""

import collections
import difflib
import math
import os
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from mister_jax.data.audio import check_channel
from mister_jax.data.labels import MAX_SCORE, MIN_SCORE
from mister_jax.errors import InputError

FIELDS = (
    "dialogue",
    "utterance",
    "order",
    "start",
    "end",
    "audio",
    "audio_start",
    "audio_end",
    "audio_channel",
    "text",
    "label",
    "score",
    "split",
    "speaker",
)
"""Fields of an utterance; see `reader` for their meaning."""

Interval = tuple[float | None, float | None]
"""Start and end in seconds; None stands for the beginning and the end of a recording."""

_MISSPELLING_CUTOFF = 0.8  # Of difflib's similarity: "lable" has 0.8, "audio_strat" 0.9.

# Numbers are stored as float32, where larger values become infinite.
_MAX_NUMBER = float(np.finfo(np.float32).max)


class Fields:
    """The fields of one utterance, read by type.

    Every method raises an `InputError` that names the place and the field if the value is not
    allowed. Fields that are None, and texts that hold only white space, count as absent.

    Args:
        place: Where the fields come from, the beginning of every error message.
        values: Field names and values. Numbers may be given as text, as in a CSV file.
    """

    def __init__(self, place: str, values: Mapping[str, Any]) -> None:
        self.place = place
        self.values = values

    def fail(self, field: str, message: str) -> NoReturn:
        """Raises an `InputError` of one line."""
        # Values may hold line breaks.
        raise InputError(f"{self.place}: {' '.join(f'{field}: {message}'.split())}")

    def text(self, field: str) -> str | None:
        """Returns a text without surrounding white space, or None if it is absent."""
        value = self.values.get(field)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fail(field, f"{value!r}; allowed: text")
        if "\0" in value or not _is_encodable(value):
            self.fail(field, f"{value!r}; allowed: text without null or broken characters")
        return value.strip() or None

    def line(self, field: str) -> str | None:
        """Returns a text of one line, or None if it is absent."""
        value = self.text(field)
        if value is not None and len(value.splitlines()) != 1:
            self.fail(field, f"{value!r}; allowed: one line")
        return value

    def id(self, field: str) -> str:
        """Returns a required id as text."""
        value = self.values.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        name = self.line(field)
        if name is None:
            self.fail(field, "missing; needed: an id, text or a whole number")
        return name

    def number(
        self, field: str, *, minimum: float = -_MAX_NUMBER, maximum: float = _MAX_NUMBER
    ) -> float | None:
        """Returns a finite number within a range, or None if it is absent."""
        value = self.values.get(field)
        if value is None:
            return None
        if isinstance(value, str):
            if not value.strip():
                return None
            try:
                value = float(value)
            except ValueError:
                self.fail(field, f"{value!r}; allowed: a number, with a point for decimals")
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
            self.fail(field, f"{value!r}; allowed: a number")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not minimum <= value <= maximum:  # Also refuses NaN.
            self.fail(field, f"{value!r}; allowed: a finite number, {minimum:g} to {maximum:g}")
        return value

    def score(self) -> float | None:
        """Returns the sentiment score, or None if it is absent."""
        return self.number("score", minimum=MIN_SCORE, maximum=MAX_SCORE)

    def interval(self, first: str, last: str) -> Interval:
        """Returns two times in seconds, each None if it is absent; the second is the later one."""
        start, end = self.number(first, minimum=0), self.number(last, minimum=0)
        if end is not None and end <= (start or 0):
            self.fail(last, f"{end:g}; allowed: more than {first}")
        return start, end

    def channel(self) -> str | int:
        """Returns `audio_channel`, "mix" if it is absent."""
        value = self.values.get("audio_channel")
        if value is None or value == "":
            return "mix"
        try:
            return check_channel(value)
        except ValueError as error:
            self.fail("audio_channel", str(error))

    def audio_interval(self) -> Interval:
        """Returns `audio_start` and `audio_end`, which need a recording."""
        start, end = self.interval("audio_start", "audio_end")
        if self.line("audio") is None and (start is not None or end is not None):
            self.fail("audio", "missing; audio_start and audio_end are places in it")
        return start, end


def audio_intervals(rows: Sequence[Fields]) -> list[Interval]:
    """Returns the seconds of its recording that each utterance is cut from.

    These are `audio_start` and `audio_end`. An utterance without them that shares its recording
    with another one is cut by `start` and `end`; without these it would hear what the others say.

    Args:
        rows: Fields of N utterances.

    Raises:
        InputError: Several utterances would hear the whole of one recording.
    """
    paths = [row.line("audio") for row in rows]
    # The same file may be spelled differently.
    paths = [
        path if path is None else unicodedata.normalize("NFC", os.path.normpath(path))
        for path in paths
    ]
    sounds = [(path, row.channel()) for path, row in zip(paths, rows, strict=True)]
    num_rows, num_same_sound = collections.Counter(paths), collections.Counter(sounds)
    intervals = []
    for row, path, sound in zip(rows, paths, sounds, strict=True):
        interval = row.audio_interval()
        if path is not None and num_rows[path] > 1 and interval == (None, None):
            start, end = row.interval("start", "end")
            if start is not None and end is not None:
                interval = start, end
            elif num_same_sound[sound] > 1:
                row.fail(
                    "start" if start is None else "end",
                    f"missing; {num_rows[path]} utterances name the recording {path!r}, so each "
                    "needs start and end, or audio_start and audio_end, to be cut out of it",
                )
        intervals.append(interval)
    return intervals


def check_further_name(row: Fields, name: str, names: Collection[str]) -> None:
    """Checks the name of a further column, one that is not in `FIELDS`.

    Args:
        row: Where the name is, for the error.
        name: The name.
        names: All names of the row.

    Raises:
        InputError: The name is broken, or close to that of a field that is absent.
    """
    if not name.isprintable():
        row.fail(repr(name), "a broken name; allowed: printable text of one line")
    absent = [field for field in FIELDS if field not in names]
    close = difflib.get_close_matches(name.casefold(), absent, n=1, cutoff=_MISSPELLING_CUTOFF)
    if close:
        row.fail(
            repr(name),
            f"unknown, close to {close[0]!r}; allowed: {', '.join(FIELDS)}, and further columns "
            "whose names are not close to one of these",
        )


def _is_encodable(text: str) -> bool:
    """Returns whether a text is free of lone surrogates, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
