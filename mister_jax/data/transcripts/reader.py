"""Reads a transcript of any supported format, and finds the transcript of a recording."""

from __future__ import annotations

import bisect
import codecs
import dataclasses
import itertools
import math
import os
import pathlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from absl import logging

from mister_jax.data.audio_source import existing_path
from mister_jax.data.transcripts.annotations import (
    Annotation,
    detect_annotations,
    is_emotion_tier,
    parse_annotation,
)
from mister_jax.data.transcripts.parsing import (
    DetectedFormat,
    Notes,
    Selection,
    keep_speaker,
    one_line,
)
from mister_jax.data.transcripts.segments import Segment, Transcript, Word
from mister_jax.data.transcripts.speech_json import detect_json
from mister_jax.data.transcripts.subtitles import detect_subtitles
from mister_jax.data.transcripts.tables import detect_table
from mister_jax.errors import InputError

MAX_BYTES = 200 * 2**20
"""Maximum size of a transcript file in bytes."""

FORMATS = (
    "SRT, WebVTT, ASS, SSA, TTML, SAMI, JSON of Whisper and WhisperX, Amazon Transcribe, Google, "
    "Azure, Deepgram, AssemblyAI and batchalign, Praat TextGrid, ELAN EAF, CHAT, STM, CTM, RTTM, "
    "CSV and TSV with start and end"
)
"""The supported formats, named in error messages."""

SUFFIXES = (
    *(".eaf", ".textgrid", ".cha", ".json", ".vtt", ".srt", ".ass", ".ssa", ".ttml", ".dfxp"),
    *(".smi", ".stm", ".tsv", ".csv", ".ctm", ".rttm"),
)
"""Extensions of transcripts next to a recording, in order of preference.

Manual annotations come first, then JSON files, which often have word times, then subtitles and
tables. CTM, which has no sentences, and RTTM, which has no text, come last.
"""

# Control characters, lone surrogates, and the noncharacters U+FFFE and U+FFFF.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

# Byte order marks. UTF-32 comes before UTF-16, because the little-endian mark of UTF-32 begins with
# the little-endian mark of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_transcript(
    path: str | os.PathLike[str],
    *,
    tier: str | None = None,
    speaker: str | None = None,
    label_tier: str | None = None,
    label_column: str | None = None,
    recording: str | None = None,
    ignore_emotion_tiers: bool = False,
    strict: bool = True,
) -> Transcript:
    """Reads a transcript, whose format is detected from its content.

    Args:
      path: Path of the transcript.
      tier: Name of the TextGrid or EAF tier to read, or several comma-separated names, one for each
        speaker. Not needed if only one tier has content, apart from the label tiers.
      speaker: Speaker whose segments are read; by default, all speakers.
      label_tier: Tier of a TextGrid, EAF or CHAT file that contains the emotions. In a TextGrid or
        EAF, a segment gets the label of the interval that covers at least half of the segment.
      label_column: Column of a CSV or TSV file that contains the emotions; by default `label` or
        `emotion`.
      recording: Name of the recording without its extension. The name selects rows if an STM, CTM,
        RTTM, CSV or TSV file contains several recordings.
      ignore_emotion_tiers: Whether to ignore the emotion tiers of a TextGrid or EAF that
        `mister-jax predict` has written. If false, a file with several tiers needs `tier`.
      strict: Whether to raise an error for an option that the format does not support. If false,
        the option is ignored.

    Returns:
      The transcript. Its segments are sorted by start time. Each segment has a positive length and
      starts at 0 or later.

    Raises:
      InputError: The file cannot be read with these options.
      MissingExtraError: The format needs a package of the extra `predict`.
    """
    name = os.fspath(path)
    notes = Notes()
    selection = Selection(tier, speaker, label_tier, label_column, recording, ignore_emotion_tiers)
    try:
        detected = _detect(existing_path(path), notes)
        for option in ("tier", "label_tier", "label_column"):
            if getattr(selection, option) is None or option in detected.options:
                continue
            if strict:
                what = option.replace("_", " ")
                raise InputError(f"{detected.name} has no {what}s; leave out --{option}")
            selection = dataclasses.replace(selection, **{option: None})  # type: ignore[arg-type]
        transcript = detected.read(selection, notes)
        segments = keep_speaker(_checked(transcript.segments, notes), speaker)
        if not segments:
            raise InputError("; ".join((f"is {detected.name} without segments", *notes.messages())))
    except InputError as error:
        raise InputError(f"{name}: {one_line(str(error))}") from None
    return dataclasses.replace(transcript, segments=tuple(segments), notes=notes.messages())


def detect_format(path: str | os.PathLike[str]) -> str:
    """Returns the name of a transcript's format.

    Raises:
      InputError: The file cannot be read, or has no supported format.
    """
    try:
        return _detect(existing_path(path), Notes()).name
    except InputError as error:
        raise InputError(f"{os.fspath(path)}: {error}") from None


def read_annotation(path: str | os.PathLike[str]) -> Annotation | None:
    """Reads all tiers of a TextGrid or EAF unchanged, or returns None for another format.

    Raises:
      InputError: The file cannot be read.
    """
    name = os.fspath(path)
    try:
        text = _decode(_read_bytes(pathlib.Path(existing_path(path))), Notes())
        return parse_annotation(name, text)
    except InputError as error:
        raise InputError(f"{name}: {one_line(str(error))}") from None


def find_transcript(recording: str | os.PathLike[str]) -> pathlib.Path | None:
    """Returns the transcript next to a recording, or None if the recording has no transcript.

    The transcript of `x.wav` is named `x.srt`, `x.wav.srt` or `x.en.srt`, with any extension from
    `SUFFIXES` in upper or lower case. If several files match, the order of the extensions in
    `SUFFIXES` decides. For equal extensions, the order is `x.srt`, `x.wav.srt`, then all other
    names, from the shortest to the longest. The search skips JSON, CSV and TSV files that are not
    transcripts, and files that `mister-jax predict` has written: SRT, WebVTT, CSV and EAF files,
    and TextGrids without texts.
    """
    return TranscriptFinder().find(recording)


class TranscriptFinder:
    """Finds the transcripts of many recordings; see `find_transcript`. Lists each folder once."""

    def __init__(self) -> None:
        self._folders: dict[pathlib.Path, list[tuple[str, pathlib.Path]]] = {}

    def find(self, recording: str | os.PathLike[str]) -> pathlib.Path | None:
        """Returns the transcript next to a recording, or None if the recording has none."""
        path = pathlib.Path(existing_path(recording))
        stem = _normalized(path.stem)
        files = self._files_with_prefix(path.parent, f"{stem}.")
        # `x.1.srt` belongs to `x.1.wav` if there is such a recording.
        longer_stems = [
            name.removesuffix(path.suffix)
            for name in files
            if name.endswith(path.suffix) and name != _normalized(path.name)
        ]
        candidates = []
        for name in files:
            suffix = pathlib.PurePath(name).suffix
            is_other = any(name.startswith(f"{longer}.") for longer in longer_stems)
            if suffix.lower() in SUFFIXES and not is_other:
                is_variant = name.removesuffix(suffix) not in (stem, _normalized(path.name))
                candidates.append((SUFFIXES.index(suffix.lower()), is_variant, len(name), name))
        return next(
            (files[name] for *_, name in sorted(candidates) if _is_transcript(files[name])), None
        )

    def _files_with_prefix(self, folder: pathlib.Path, prefix: str) -> dict[str, pathlib.Path]:
        """Returns a folder's files whose normalized names start with `prefix`, by name."""
        if folder not in self._folders:
            try:
                self._folders[folder] = sorted(
                    (_normalized(it.name), it) for it in folder.iterdir()
                )
            except OSError:
                self._folders[folder] = []
        names = self._folders[folder]
        start = bisect.bisect_left(names, prefix, key=lambda it: it[0])
        rest = itertools.islice(names, start, None)
        return dict(itertools.takewhile(lambda it: it[0].startswith(prefix), rest))


def is_transcript_of(path: str | os.PathLike[str], recording: str | os.PathLike[str]) -> bool:
    """Returns whether a file is next to a recording, is named after it, and is its transcript.

    Output of `mister-jax predict` is not a transcript, nor is a TextGrid with a tier of emotions.
    """
    path, source = pathlib.Path(path), pathlib.Path(existing_path(recording))
    is_beside = os.path.realpath(path.parent) == os.path.realpath(source.parent)
    has_name = _normalized(path.name).startswith(f"{_normalized(source.stem)}.")
    if not (is_beside and has_name and path.suffix.lower() in SUFFIXES and path.is_file()):
        return False
    if path.suffix.lower() == ".textgrid":
        try:
            annotation = read_annotation(path)
        except InputError:
            return True
        return annotation is None or not any(is_emotion_tier(it.name) for it in annotation.tiers)
    return _is_transcript(path, quiet=True)


def _is_transcript(path: pathlib.Path, *, quiet: bool = False) -> bool:
    if _is_prediction(path, quiet=quiet):
        return False
    if path.suffix.lower() in (".json", ".csv", ".tsv"):
        try:
            detect_format(path)
        except InputError:
            return False
    return path.is_file()


def _is_prediction(path: pathlib.Path, *, quiet: bool) -> bool:
    """Returns whether a file is an output of `mister-jax predict`, with a warning if it may not."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(100_000)
    except OSError:
        return False
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return ",probabilities." in text.partition("\n")[0]
    if suffix == ".vtt":
        return bool(re.match(r"WEBVTT\n\nSTYLE\n::cue\(\.", text)) and "<c." in text
    if suffix == ".srt":
        # In predictions, the first line of every cue starts with the emotion in brackets.
        texts = re.findall(r"-->.*\n(.+)", text)
        is_labeled = bool(texts) and all(re.match(r"\[[^\]]+\](?: |$)", line) for line in texts)
        if is_labeled and not quiet:
            label = f"{texts[0].partition(']')[0]}]"
            _warn_of_skipped(path, f'every cue starts with a label, "{label}"')
        return is_labeled
    if suffix == ".textgrid":
        try:
            annotation = read_annotation(path)
        except InputError:
            return False  # Reading the transcript reports the error.
        tiers = [tier.name for tier in annotation.tiers if tier.filled] if annotation else []
        has_only_emotions = bool(tiers) and all(map(is_emotion_tier, tiers))
        if has_only_emotions and not quiet:
            _warn_of_skipped(path, f"it has no text, only {', '.join(tiers)}")
        return has_only_emotions
    return suffix == ".eaf" and 'AUTHOR="mister_jax"' in text


def _warn_of_skipped(path: pathlib.Path, reason: str) -> None:
    logging.warning(
        "%s: not used as a transcript, because %s, as in the output of mister-jax predict; if it "
        "is a transcript, pass its path",
        path,
        reason,
    )


def _normalized(name: str) -> str:
    """Returns a file name in NFC, the Unicode form that most systems use."""
    return unicodedata.normalize("NFC", name)


def _detect(path: str, notes: Notes) -> DetectedFormat:
    text = _decode(_read_bytes(pathlib.Path(path)), notes)
    if not text.strip():
        raise InputError("is empty")
    detected = (
        detect_json(text)
        or detect_annotations(text)
        or detect_subtitles(text)
        or detect_table(text, pathlib.Path(path).suffix.lower())
    )
    if detected is None:
        seen = "binary data" if "\0" in text else f"text that begins {text.strip()[:40]!r}"
        raise InputError(f"no supported transcript, but {seen}; supported: {FORMATS}")
    return detected


def _read_bytes(path: pathlib.Path) -> bytes:
    try:
        if path.is_dir():
            raise InputError("is a directory, not a transcript")
        if not path.exists():
            raise InputError("no such file")
        if not path.is_file():
            raise InputError("is not a file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"has {size} bytes; allowed: at most {MAX_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _decode(data: bytes, notes: Notes) -> str:
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        if encoding != "utf-8" or b"\0" in data:
            seen = "binary data" if encoding == "utf-8" else f"damaged {encoding.upper()}"
            raise InputError(f"no supported transcript, but {seen}; supported: {FORMATS}") from None
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError as error:
            raise InputError(
                f"byte {data[error.start]:#x} at position {error.start} is neither UTF-8 nor "
                "Windows-1252; convert the file to UTF-8"
            ) from None
        notes.add(
            "read as Windows-1252 because it is not UTF-8; convert a file in another encoding to "
            "UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _checked(segments: Sequence[Segment], notes: Notes) -> list[Segment]:
    """Checks and repairs the segments, and returns segments of positive length sorted by start."""
    checked = []
    for segment in segments:
        if not (math.isfinite(segment.start) and math.isfinite(segment.end)):
            raise InputError(
                f"has a segment from {segment.start} to {segment.end} s: {segment.text[:40]!r}"
            )
        # Converting milliseconds to seconds causes rounding errors, such as 2.7600000000000002.
        start, end = round(segment.start, 6), round(segment.end, 6)
        words = tuple(
            Word(word.text, _rounded(word.start), _rounded(word.end)) for word in segment.words
        )
        if end <= start:
            notes.leave_out("end not after start")
        elif end <= 0:
            notes.leave_out("before the beginning of the recording")
        else:
            if start < 0:
                notes.add("segments that start before 0 start at 0")
            start = max(start, 0.0)
            checked.append(
                dataclasses.replace(
                    segment,
                    start=start,
                    end=end,
                    words=words,
                    text=_storable(segment.text),
                    speaker=_storable(segment.speaker),
                    label=_storable(segment.label),
                )
            )
    return sorted(checked, key=lambda segment: segment.start)


def _storable(text: Any) -> Any:
    """Replaces characters that UTF-8 or XML cannot store. Returns None for None."""
    return None if text is None else _FORBIDDEN.sub("\ufffd", text)


def _rounded(time: float | None) -> float | None:
    return round(time, 6) if time is not None and math.isfinite(time) else None
