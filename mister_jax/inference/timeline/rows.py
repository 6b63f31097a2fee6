"""Checks and prepares the prediction rows of one recording."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mister_jax.errors import InputError

Row = Mapping[str, Any]

# Characters that XML 1.0 forbids, even when escaped. Lone surrogates cannot be encoded in UTF-8.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def check_timeline_rows(path: epath.PathLike, rows: Sequence[Row]) -> list[Row]:
    """Returns the rows, sorted by start time.

    Args:
      path: Output file, for error messages.
      rows: Prediction rows; see `EmotionRecognizer.predict_recording`.

    Raises:
      InputError: There are no rows, a row has no times or does not end after its start, or the rows
        belong to several recordings.
    """
    recordings = {row.get("recording") for row in rows}
    if len(recordings) > 1:
        raise InputError(f"{path}: rows of {len(recordings)} recordings; needed: one recording")
    has_times = all(
        row.get("start") is not None and row.get("end") is not None and row["end"] > row["start"]
        for row in rows
    )
    if not rows or not has_times:
        raise InputError(f"{path}: needed: utterances of one recording, with start and end")
    return sorted(rows, key=lambda row: (row["start"], row["end"]))


def milliseconds(row: Row) -> tuple[int, int]:
    """Returns the start and end of an utterance in milliseconds, at least 1 ms apart."""
    start = round(1000 * row["start"])
    return start, max(start + 1, round(1000 * row["end"]))


def storable(text: str) -> str:
    """Returns a text in which characters that XML or UTF-8 cannot store are replaced."""
    return _FORBIDDEN.sub("\ufffd", text)


def one_line(text: object) -> str:
    """Returns the result of `storable` with each run of whitespace replaced by one space."""
    return " ".join(storable("" if text is None else str(text)).split())


def shown_emotion(row: Row) -> str:
    """Returns the emotion of a row, with a question mark if it is uncertain."""
    return one_line(row["emotion"]) + ("?" if row.get("uncertain") else "")


def recording_seconds(rows: Sequence[Row]) -> float:
    """Returns the recording's length if it is known, but at least the latest end of a row."""
    last_end = max(row["end"] for row in rows)
    if not rows[0].get("recording"):
        return last_end
    from mister_jax.data.audio import container_seconds
    from mister_jax.data.audio_source import AudioError

    try:
        return max(last_end, container_seconds(rows[0]["recording"]) or 0.0)
    except AudioError:
        return last_end
