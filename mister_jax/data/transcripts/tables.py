"""Reads transcripts with one segment per line: STM, CTM, RTTM, CSV and TSV."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import pathlib
import re
import statistics
from collections.abc import Sequence

from mister_jax.data.transcripts.parsing import (
    DetectedFormat,
    Notes,
    Selection,
    channel_indices,
    one_line,
    parse_seconds,
    select_recording,
)
from mister_jax.data.transcripts.segments import Segment, Transcript, Word
from mister_jax.errors import InputError

_RTTM_TYPES = {
    *("SPEAKER", "LEXEME", "SEGMENT", "NOSCORE", "NO_RT_METADATA", "NON-LEX", "NON-SPEECH"),
    *("FILLER", "EDIT", "IP", "SU", "CB", "A/P", "SPKR-INFO"),
}
_NOT_SCORED = "ignore_time_segment_in_scoring"

_ALIASES = {
    "start": ("start", "begin", "starttime", "begintime", "from", "onset", "tmin", "xmin"),
    "end": ("end", "stop", "endtime", "stoptime", "to", "offset", "tmax", "xmax"),
    "duration": ("duration", "dur", "length"),
    "text": ("text", "transcript", "transcription", "utterance", "sentence", "word", "content"),
    "speaker": ("speaker", "spk", "speakerid", "speakername", "participant", "role"),
    "label": ("label", "emotion"),
    "recording": ("recording", "file", "filename", "path", "audio"),
}
_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "secs": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3}
_UNITS |= {"millis": 1e-3, "milliseconds": 1e-3}
# Maps a normalized column name, such as "startms", to the column and its unit in seconds.
_COLUMNS = {
    name + unit: (column, scale)
    for column, names in _ALIASES.items()
    for name in names
    for unit, scale in (_UNITS.items() if column in ("start", "end", "duration") else [("", 1.0)])
}


def detect_table(text: str, suffix: str) -> DetectedFormat | None:
    """Returns the format of a text with one segment per line, or None.

    Args:
      text: Content of the file.
      suffix: Lower-case extension of the file, used only if the text is valid both as an STM and as
        a CTM.
    """
    lines = [line.split() for line in text.split("\n")]
    rows = [row for row in lines if row and not row[0].startswith(";;")]
    if rows:
        if all(_is_rttm(row) for row in rows):
            return DetectedFormat(
                "RTTM", functools.partial(_read_rttm, rows), frozenset({"recording"})
            )
        is_stm, is_ctm = all(map(_is_stm, rows)), all(map(_is_ctm, rows))
        if is_stm and not (is_ctm and suffix != ".stm"):
            return DetectedFormat(
                "STM", functools.partial(_read_stm, rows), frozenset({"recording"})
            )
        if is_ctm:
            return DetectedFormat(
                "CTM", functools.partial(_read_ctm, rows), frozenset({"recording"})
            )
    for delimiter, name in (("\t", "TSV"), (",", "CSV"), (";", "CSV"), ("|", "CSV")):
        if table := _parse_table(text, delimiter):
            read = functools.partial(_read_table, table, name)
            return DetectedFormat(name, read, frozenset({"recording", "label_column"}))
    return None


def _is_time(text: str) -> bool:
    try:
        parse_seconds(text)
    except ValueError:
        return False
    return True


def _is_rttm(row: list[str]) -> bool:
    return row[0] in _RTTM_TYPES and len(row) >= 8


def _is_stm(row: list[str]) -> bool:
    times = row[3:5]
    return len(times) == 2 and all(map(_is_time, times))


def _is_ctm(row: list[str]) -> bool:
    return 5 <= len(row) <= 8 and all(map(_is_time, row[2:4]))


def _of_recording(
    rows: list[list[str]], column: int, recording: str | None
) -> tuple[list[list[str]], list]:
    """Returns the rows of a recording, and the channel of each row."""
    name = select_recording([row[column] for row in rows], recording)
    rows = [row for row in rows if row[column] == name]
    indices = channel_indices(row[column + 1] for row in rows)
    return rows, [indices[row[column + 1]] for row in rows]


def _read_rttm(rows: list[list[str]], selection: Selection, notes: Notes) -> Transcript:
    turns = [row for row in rows if row[0] == "SPEAKER"]
    if not turns:
        raise InputError("has no SPEAKER lines, which contain the turns of an RTTM")
    turns, channels = _of_recording(turns, 1, selection.recording)
    segments = []
    for row, channel in zip(turns, channels, strict=True):
        try:
            start, duration = map(parse_seconds, row[3:5])
        except ValueError:
            raise InputError(f"the line {' '.join(row)!r} of this RTTM has no times") from None
        speaker = None if row[7] == "<NA>" else row[7]
        segments.append(Segment(start, start + duration, speaker=speaker, channel=channel))
    return Transcript("RTTM", tuple(segments), has_text=False)


def _read_stm(rows: list[list[str]], selection: Selection, notes: Notes) -> Transcript:
    rows, channels = _of_recording(rows, 0, selection.recording)
    segments = []
    for row, channel in zip(rows, channels, strict=True):
        # The sixth field may hold categories, such as <o,f0,male>.
        words = row[6:] if len(row) > 5 and re.fullmatch("<.*>", row[5]) else row[5:]
        text = " ".join(words)
        if text.lower() == _NOT_SCORED:
            notes.leave_out(_NOT_SCORED)
            continue
        segments.append(
            Segment(parse_seconds(row[3]), parse_seconds(row[4]), text, row[2], channel)
        )
    return Transcript("STM", tuple(segments))


def _read_ctm(rows: list[list[str]], selection: Selection, notes: Notes) -> Transcript:
    rows, channels = _of_recording(rows, 0, selection.recording)
    segments = []
    for row, channel in zip(rows, channels, strict=True):
        start = parse_seconds(row[2])
        end = start + parse_seconds(row[3])
        speaker = row[7] if len(row) > 7 and row[7].lower() not in ("null", "<na>") else None
        words = (Word(row[4], start, end),)
        segments.append(Segment(start, end, row[4], speaker, channel, words))
    return Transcript("CTM", tuple(segments))


@dataclasses.dataclass(frozen=True)
class _Column:
    """Index of a column, and the factor that converts the column's times to seconds."""

    index: int
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Table:
    """A table with a column `start`, and a column `end` or `duration`.

    Attributes:
      candidates: Columns by field, which is a key of `_ALIASES`. A field has several columns if
        none has the name of the field, and several have one of the field's other names.
      header: Names of all columns as in the file; empty if the file has no header.
      rows: Fields of each row below the header.
    """

    candidates: dict[str, list[_Column]]
    header: tuple[str, ...]
    rows: tuple[list[str], ...]

    def column(self, field: str) -> _Column | None:
        """Returns the column of a field, or None if there is no such column.

        Raises:
          InputError: Several columns fit the field.
        """
        candidates = self.candidates.get(field, [])
        if len(candidates) > 1:
            names = " and ".join(repr(self.header[column.index]) for column in candidates)
            raise InputError(
                f"has several columns for the {field}, {names}; name exactly one of them {field!r}"
            )
        return candidates[0] if candidates else None


def _parse_table(text: str, delimiter: str) -> _Table | None:
    rows = [row for row in _split_rows(text, delimiter) if any(field.strip() for field in row)]
    if not rows:
        return None
    header = tuple(name.strip() for name in rows[0])
    names = [_normalized(name) for name in header]
    candidates: dict[str, list[_Column]] = {}
    for index, name in enumerate(names):
        field, scale = _COLUMNS.get(name, (None, 1.0))
        # In a file with the columns `utterance` and `text`, the utterance is an id.
        if field and (name == field or field not in names):
            candidates.setdefault(field, []).append(_Column(index, scale))
    if "start" in candidates and ("end" in candidates or "duration" in candidates):
        return _Table(candidates, header, tuple(rows[1:]))
    # Without a header: whisper-timestamped writes text, start, end; Audacity start, end, text.
    for order in (("text", "start", "end"), ("start", "end", "text")):
        start, end = order.index("start"), order.index("end")
        if all(len(row) == 3 and _is_time(row[start]) and _is_time(row[end]) for row in rows):
            return _Table({name: [_Column(order.index(name))] for name in order}, (), tuple(rows))
    return None


def _normalized(name: str) -> str:
    """Normalizes a column name: "Start Time" and "start_time" both become "starttime"."""
    return re.sub(r"[\W_]+", "", name.lower())


def _split_rows(text: str, delimiter: str) -> list[list[str]]:
    try:
        if delimiter != "\t":
            return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
        # Whisper does not quote texts in its TSV files, so a quotation mark may be part of a text.
        rows = csv.reader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
        return [[_unquoted(field) for field in row] for row in rows]
    except csv.Error:
        return []


def _unquoted(field: str) -> str:
    is_quoted = re.fullmatch('"(?:[^"]|"")*"', field.strip())
    return field.strip()[1:-1].replace('""', '"') if is_quoted else field


def _read_table(table: _Table, name: str, selection: Selection, notes: Notes) -> Transcript:
    if selection.label_column is None:
        label = table.column("label")
    else:
        headers = [_normalized(header) for header in table.header]
        if _normalized(selection.label_column) not in headers:
            listed = ", ".join(table.header) or "none, because the file has no header"
            raise InputError(f"has no column {selection.label_column!r}; columns: {listed}")
        label = _Column(headers.index(_normalized(selection.label_column)))
    rows = list(enumerate(table.rows, 1 + bool(table.header)))
    recording = table.column("recording")
    if recording is not None:
        names = [_recording_name(_field(row, recording)) for _, row in rows]
        if names:
            selected = select_recording(names, selection.recording)
            rows = [row for row, name in zip(rows, names, strict=True) if name == selected]
    scale = _scale_of_whisper(table, notes)
    time_columns = {name: table.column(name) for name in ("start", "end", "duration")}
    text, speaker = table.column("text"), table.column("speaker")
    segments = []
    for number, row in rows:
        try:
            times = [_time_of(row, column, name) for name, column in time_columns.items()]
        except ValueError as error:
            raise InputError(f"row {number}: {error}") from None
        start, end, duration = times
        if start is not None and end is None and duration is not None:
            end = start + duration
        if start is None or end is None:
            notes.leave_out("without times")
            continue
        segments.append(
            Segment(
                scale * start,
                scale * end,
                one_line(_field(row, text)),
                one_line(_field(row, speaker)) or None,
                label=_field(row, label).strip() or None,
            )
        )
    return Transcript(name, tuple(segments), has_text=text is not None)


def _recording_name(path: str) -> str:
    return pathlib.PurePosixPath(path.strip().replace("\\", "/")).stem


def _field(row: Sequence[str], column: _Column | None) -> str:
    return row[column.index] if column is not None and column.index < len(row) else ""


def _time_of(row: list[str], column: _Column | None, name: str) -> float | None:
    text = _field(row, column).strip()
    if column is None or not text:
        return None
    try:
        return column.scale * parse_seconds(text)
    except ValueError:
        raise ValueError(f"{name} {text!r} is not a time") from None


def _scale_of_whisper(table: _Table, notes: Notes) -> float:
    """Returns the factor that converts the times of a table to seconds.

    Whisper's TSV files have the columns start, end and text, and integer times. In such a table,
    the times are milliseconds if the median segment would otherwise last 100 s or longer.
    """
    if table.header != ("start", "end", "text") or not table.rows:
        return 1.0
    start, end = _Column(0), _Column(1)
    times = [(_field(row, start).strip(), _field(row, end).strip()) for row in table.rows]
    if not all(start.isdecimal() and end.isdecimal() for start, end in times):
        return 1.0
    if statistics.median(int(end) - int(start) for start, end in times) < 100:
        return 1.0
    notes.add("times are milliseconds, as in Whisper's TSV files")
    return 1e-3
