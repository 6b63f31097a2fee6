"""Checks the fields of utterances in manifests, corpus metadata and inputs for prediction."""

import collections
import contextlib
import difflib
import json
import math
import os
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from mister_jax.data.audio import check_channel
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
    "ratings",
    "split",
    "speaker",
)
"""Names of an utterance's fields. The docstring of `reader` describes each field."""

Interval = tuple[float | None, float | None]
"""Start and end in seconds; None for the beginning or the end of the recording."""

_MISSPELLING_CUTOFF = 0.8  # difflib's similarity: 0.8 for "lable", 0.9 for "audio_strat"

# Null characters, and surrogates, which UTF-8 cannot encode.
_INVALID = re.compile("[\0\ud800-\udfff]")

# Numbers are stored as float32, where larger values become infinite.
_MAX_NUMBER = float(np.finfo(np.float32).max)


class Fields:
    """Fields of one utterance, with one method for each field type.

    If a value is invalid, the methods raise an `InputError` that names the location and the field.
    None and text that contains only white space count as absent.

    Args:
        location: Location of the fields, named at the start of all error messages.
        values: Values by field name. Numbers may be text, as in a CSV file.
    """

    def __init__(self, location: str, values: Mapping[str, Any]) -> None:
        self.location = location
        self.values = values

    def fail(self, field: str, message: str) -> NoReturn:
        """Raises a one-line `InputError` about a field."""
        # Values may contain line breaks.
        raise InputError(f"{self.location}: {' '.join(f'{field}: {message}'.split())}")

    def text(self, field: str) -> str | None:
        """Returns a text without surrounding white space, or None if it is absent or empty."""
        value = self.values.get(field)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fail(field, f"{value!r}; allowed: text")
        if _INVALID.search(value):
            self.fail(field, f"{value!r}; allowed: text without null or invalid characters")
        return value.strip() or None

    def line(self, field: str) -> str | None:
        """Returns a single line of text, or None if the text is absent or empty."""
        value = self.text(field)
        if value is not None and len(value.splitlines()) != 1:
            self.fail(field, f"{value!r}; allowed: one line")
        return value

    def audio_path(self) -> str | None:
        """Returns the path in `audio`, or None if the path is absent or empty."""
        return self.line("audio")

    def id(self, field: str) -> str:
        """Returns a required id as text."""
        value = self.values.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        name = self.line(field)
        if name is None:
            self.fail(field, "missing; needed: an id (text or a whole number)")
        return name

    def number(
        self, field: str, *, minimum: float = -_MAX_NUMBER, maximum: float = _MAX_NUMBER
    ) -> float | None:
        """Returns a finite number within a range, or None if the field is absent."""
        value = self.values.get(field)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, bool | np.bool_) or not isinstance(
            value, str | int | float | np.number
        ):
            self.fail(field, f"{value!r}; allowed: a number")
        try:
            value = float(value)
        except ValueError:
            self.fail(field, f"{value!r}; allowed: a number, with a point for decimals")
        except OverflowError:
            value = math.inf
        if not minimum <= value <= maximum:  # Also rejects NaN.
            self.fail(field, f"{value!r}; allowed: a finite number, {minimum:g} to {maximum:g}")
        return value

    def ratings(self, field: str) -> dict[str, float]:
        """Returns the number of raters by class, or an empty dict if the field is absent."""
        value = self.values.get(field)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = json.loads(value) if value.strip() else None
        if value is None:
            return {}
        allowed = 'allowed: an object that maps classes to numbers of raters, such as {"happy": 2}'
        if not isinstance(value, Mapping):
            self.fail(field, f"{value!r}; {allowed}")
        ratings = {}
        for name, count in value.items():
            valid = isinstance(count, int | float) and not isinstance(count, bool)
            if not str(name).strip() or not valid or not 0 <= count <= _MAX_NUMBER:
                self.fail(field, f"{name!r}: {count!r}; {allowed}")
            ratings[str(name).strip()] = float(count)
        return ratings

    def interval(self, start_field: str, end_field: str) -> Interval:
        """Returns a start and a later end in seconds. A time is None if its field is absent."""
        start, end = self.number(start_field, minimum=0), self.number(end_field, minimum=0)
        if end is not None and end <= (start or 0):
            self.fail(end_field, f"{end:g}; allowed: more than {start_field}")
        return start, end

    def channel(self) -> str | int:
        """Returns `audio_channel`, or "mix" if the field is absent."""
        value = self.values.get("audio_channel")
        if value is None or (isinstance(value, str) and not value.strip()):
            return "mix"
        try:
            return check_channel(value)
        except ValueError as error:
            self.fail("audio_channel", str(error))

    def audio_interval(self) -> Interval:
        """Returns `audio_start` and `audio_end`, which are only allowed together with `audio`."""
        start, end = self.interval("audio_start", "audio_end")
        if self.audio_path() is None and (start is not None or end is not None):
            self.fail("audio", "missing; audio_start and audio_end refer to it")
        return start, end


def audio_intervals(rows: Sequence[Fields]) -> list[Interval]:
    """Returns the time interval of each utterance within its recording.

    The interval is `audio_start` to `audio_end` if at least one of these fields is present.
    Otherwise, the interval is `start` to `end` if both fields are present and several utterances
    have the same recording. In all other cases, the interval is the whole recording.

    Raises:
        InputError: An utterance would get the whole recording, but other utterances have the same
            recording and channel.
    """
    # Different spellings of a path may refer to the same file.
    paths = [
        path and unicodedata.normalize("NFC", os.path.normpath(path))
        for path in (row.audio_path() for row in rows)
    ]
    channels = [(path, row.channel()) for path, row in zip(paths, rows, strict=True)]
    num_path_rows = collections.Counter(paths)
    num_channel_rows = collections.Counter(channels)
    intervals = []
    for row, path, channel in zip(rows, paths, channels, strict=True):
        interval = row.audio_interval()
        if path is not None and num_path_rows[path] > 1 and interval == (None, None):
            start, end = row.interval("start", "end")
            if start is not None and end is not None:
                interval = start, end
            elif num_channel_rows[channel] > 1:
                row.fail(
                    "start" if start is None else "end",
                    f"missing; {num_path_rows[path]} utterances have the recording {path!r}, "
                    "so each needs start and end, or audio_start and audio_end",
                )
        intervals.append(interval)
    return intervals


def check_extra_column(row: Fields, name: str, names: Collection[str]) -> None:
    """Checks the name of a column that is not in `FIELDS`.

    `names` contains the names of all columns in the row.

    Raises:
        InputError: The name is not printable, or looks like a misspelling of an absent field.
    """
    if not name.isprintable():
        row.fail(repr(name), "invalid name; allowed: printable text of one line")
    absent = [field for field in FIELDS if field not in names]
    close = difflib.get_close_matches(name.casefold(), absent, n=1, cutoff=_MISSPELLING_CUTOFF)
    if close:
        row.fail(
            repr(name),
            f"unknown, close to {close[0]!r}; allowed: {', '.join(FIELDS)}, and extra columns "
            "with names that are not close to these",
        )
