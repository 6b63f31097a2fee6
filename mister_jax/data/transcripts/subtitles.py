"""Reads subtitles: SRT, WebVTT, ASS, SSA, TTML and SAMI.

pysubs2 parses TTML files, SAMI files, and the markup in the texts of ASS and SSA events. This
module parses SRT and WebVTT cues itself, because pysubs2 treats cue identifiers and comments as
text, and reads 100:00:00 as 00:00:00. The module also parses the lines of ASS and SSA events
itself, because pysubs2 ignores the declared order of the events' fields.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import Any

from mister_jax.data.transcripts.parsing import (
    DetectedFormat,
    Notes,
    Selection,
    missing_library,
    one_line,
    parse_seconds,
)
from mister_jax.data.transcripts.segments import Segment, Transcript, Word
from mister_jax.errors import InputError

_TIME = r"-?(?:\d+:)?\d+:\d+(?:[.,]\d*)?"
_TIMING = re.compile(rf"^[ \t]*({_TIME})[ \t]*-{{1,2}}>[ \t]*({_TIME})(?:[ \t].*)?$", re.MULTILINE)
_VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+([^>]*)>")
_WORD_TIME = re.compile(rf"<({_TIME})>")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<\d[\d:.]*>|\{\\[^{}]*\}")
_MUSIC = re.compile("[♩♪♫♬♭♮♯]+")
# Marks that show a change of speaker.
_NEW_SPEAKER = re.compile(r"^(?:[-–—](?:\s+|(?=[^\W\d_]))|>{2,}\s*)")  # noqa: RUF001
# Prefixes that name the speaker: "[SPEAKER_00]: " as in WhisperX, and "Ann: "; see `_has_names`.
_BRACKETED_NAME = re.compile(r"\[([^\[\]]+)\]:\s*")
_NAME = re.compile(r"([^\W\d_](?:[^\s:：,;!?\[\]]|[ ](?![ ])){0,30})(?::(?:\s+|$)|：\s*)")  # noqa: RUF001

_TTML_PARAGRAPH = "{http://www.w3.org/ns/ttml}p"
_TTML_TIMES = "begin, and end or dur, as hh:mm:ss.fff, or as a number and h, m, s or ms"

# Minimum number of pairs of consecutive captions from which it can be seen that they roll up.
_MIN_ROLLING = 4


def detect_subtitles(text: str) -> DetectedFormat | None:
    """Returns the subtitle format of a text, or None."""
    start = text.lstrip()[:1000]
    if start.startswith("WEBVTT"):
        return DetectedFormat("WebVTT", functools.partial(_read_webvtt, text))
    if re.search(r"^\[(Script Info|Events)\]\s*$", text, re.MULTILINE | re.IGNORECASE):
        name = "SSA" if re.search(r"^\[V4 Styles\]", text, re.MULTILINE) else "ASS"
        return DetectedFormat(name, functools.partial(_read_ass, text, name))
    if "http://www.w3.org/ns/ttml" in start:
        return DetectedFormat("TTML", functools.partial(_read_with_pysubs2, text, "TTML"))
    if start[:6].upper() == "<SAMI>":
        return DetectedFormat("SAMI", functools.partial(_read_with_pysubs2, text, "SAMI"))
    if _TIMING.search(text):
        return DetectedFormat("SRT", functools.partial(_read_srt, text))
    return None


@dataclasses.dataclass(frozen=True)
class _Cue:
    start: float
    end: float
    lines: tuple[str, ...]


def _cues(text: str) -> Iterator[_Cue]:
    """Yields each cue with all lines up to the next timing line."""
    timings = list(_TIMING.finditer(text))
    for timing, following in itertools.zip_longest(timings, timings[1:]):
        end = following.start() if following else len(text)
        # Leave out the line break before the next timing line.
        lines = text[timing.end() : end].removesuffix("\n").split("\n")[1:]
        yield _Cue(parse_seconds(timing[1]), parse_seconds(timing[2]), tuple(lines))


def _read_srt(text: str, selection: Selection, notes: Notes) -> Transcript:
    first = _TIMING.search(text)
    assert first
    is_numbered = text[: first.start()].strip().isdecimal()
    segments = []
    cues = list(_cues(text))
    for position, cue in enumerate(cues):
        lines = [line.strip() for line in cue.lines]
        is_last = position == len(cues) - 1
        if is_numbered and not is_last and lines and lines[-1].isdecimal():
            lines.pop()  # The number of the next cue.
        segments.append(Segment(cue.start, cue.end, "\n".join(lines)))
    return Transcript("SRT", _cleaned(segments, notes))


def _read_webvtt(text: str, selection: Selection, notes: Notes) -> Transcript:
    segments: list[Segment] = []
    previous_line = ""
    # Comments may contain commented-out cues.
    text = re.sub(r"(?<=\n)[ \t]*\n(?:NOTE|STYLE|REGION)\b.*(?:\n.*\S.*)*", "\n", text)
    # Roll-up captions, such as those of YouTube, repeat the previous line.
    roll_up = bool(_WORD_TIME.search(text))
    for cue in _cues(text):
        lines = list(itertools.takewhile(bool, cue.lines))
        if roll_up:
            repeats = bool(lines) and _plain(lines[0]) == previous_line != ""
            previous_line = _plain(lines[-1]) if lines and _plain(lines[-1]) else previous_line
            if repeats:
                lines = lines[1:]
                if not any(_plain(line) for line in lines):
                    notes.leave_out("repeats the text above")
                    continue
        segments += _voices(cue, "\n".join(lines))
    return Transcript("WebVTT", _cleaned(segments, notes))


def _voices(cue: _Cue, text: str) -> Iterator[Segment]:
    """Yields a segment for each voice of a WebVTT cue."""
    before, *voices = _VOICE.split(text)
    parts = [(None, before), *zip(voices[::2], voices[1::2], strict=True)]
    parts = [(speaker, part) for speaker, part in parts if _plain(part)] or parts[:1]
    intervals = _divide(cue.start, cue.end, [len(_plain(part)) for _, part in parts])
    for (speaker, part), (start, end) in zip(parts, intervals, strict=True):
        name = one_line(html.unescape(speaker)) if speaker else None
        # The estimated times of several voices may not agree with the timestamps of the words.
        words = _timed_words(cue, part) if len(parts) == 1 else ()
        yield Segment(start, end, part, name, words=words)


def _divide(start: float, end: float, lengths: Sequence[int]) -> list[tuple[float, float]]:
    """Divides the time of a cue among its turns, in proportion to their numbers of characters."""
    total = sum(lengths) or 1
    inner = (start + (end - start) * length / total for length in itertools.accumulate(lengths))
    times = [start, *itertools.islice(inner, len(lengths) - 1), end]
    return list(itertools.pairwise(times))


def _timed_words(cue: _Cue, text: str) -> tuple[Word, ...]:
    """Returns the words of a WebVTT cue with timestamps, such as "All <00:01.500>right"."""
    first, *rest = _WORD_TIME.split(text)
    if not rest:
        return ()
    starts = [cue.start, *map(parse_seconds, rest[::2])]
    ends = [*starts[1:], cue.end]
    texts = [_plain(part) for part in (first, *rest[1::2])]
    words = zip(texts, starts, ends, strict=True)
    return tuple(Word(text, start, end) for text, start, end in words if text)


def _read_ass(text: str, name: str, selection: Selection, notes: Notes) -> Transcript:
    pysubs2 = _import_pysubs2(name)
    fields = ["layer", "start", "end", "style", "name", "marginl", "marginr", "marginv", "effect"]
    fields = [*fields, "text"]
    in_events = False
    segments = {}
    for line in text.split("\n"):
        kind, _, rest = line.strip().partition(":")
        if kind.startswith("["):
            in_events = kind.lower() == "[events]"
        elif in_events and kind.lower() == "format":
            fields = [field.strip().lower() for field in rest.split(",")]
        elif in_events and kind == "Dialogue":
            values = rest.strip().split(",", len(fields) - 1)
            row = dict(zip(fields, values, strict=False))
            try:
                start, end = parse_seconds(row["start"]), parse_seconds(row["end"])
                event = pysubs2.SSAEvent(text=row["text"])
            except (KeyError, ValueError):
                raise InputError(f"the event {line!r} of {name} cannot be read") from None
            if event.is_drawing:
                notes.leave_out("drawing")
                continue
            speaker = one_line(row.get("name", row.get("actor", ""))) or None
            # Effects consist of several layered events with the same text.
            key = (start, end, speaker, event.plaintext)
            segments[key] = Segment(start, end, event.plaintext, speaker)
    return Transcript(name, _cleaned(list(segments.values()), notes))


def _read_with_pysubs2(text: str, name: str, selection: Selection, notes: Notes) -> Transcript:
    pysubs2 = _import_pysubs2(name)
    try:
        if name == "TTML":
            text = _with_ends(text)
        events = pysubs2.SSAFile.from_string(text, format_=name.lower()).get_text_events()
    except InputError:
        raise
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        needed = f"; needed: {_TTML_TIMES}" if isinstance(error, NotImplementedError) else ""
        raise InputError(f"pysubs2 cannot read this {name} ({reason}){needed}") from None
    segments = [Segment(event.start / 1000, event.end / 1000, event.plaintext) for event in events]
    return Transcript(name, _cleaned(segments, notes))


def _with_ends(text: str) -> str:
    """Returns a TTML file in which each paragraph has an attribute that pysubs2 reads its end from.

    pysubs2 reads "duration" instead of "dur", the name in the TTML standard.

    Raises:
      InputError: A paragraph has neither an end nor a duration.
    """
    root = ET.fromstring(text)
    for paragraph in root.iterfind(f".//{_TTML_PARAGRAPH}"):
        if "end" in paragraph.attrib or "duration" in paragraph.attrib:
            continue
        if "dur" not in paragraph.attrib:
            content = one_line("".join(paragraph.itertext()))[:40]
            raise InputError(
                f"the paragraph {content!r} of this TTML has no end; needed: {_TTML_TIMES}"
            )
        paragraph.set("duration", paragraph.attrib["dur"])
    return ET.tostring(root, encoding="unicode")


def _cleaned(segments: list[Segment], notes: Notes) -> tuple[Segment, ...]:
    """Removes markup, and drops segments that contain only markup or music symbols.

    A segment that has neither a speaker nor word times is split into the turns that its lines mark.
    The turns get the speakers that the text names. If names differ only in their capital letters,
    the first spelling is used.
    """
    lines = [_plain_lines(segment.text) for segment in segments]
    has_names = _has_names(lines)
    cleaned: list[Segment] = []
    last_name: str | None = None
    spellings: dict[str, str] = {}
    for segment, segment_lines in zip(segments, lines, strict=True):
        if segment.speaker or segment.words:
            text = one_line(" ".join(_NEW_SPEAKER.sub("", line) for line in segment_lines))
            cleaned.append(dataclasses.replace(segment, text=text))
            last_name = segment.speaker
            continue
        turns = [
            (name and spellings.setdefault(name.casefold(), name), text)
            for name, text in _turns(segment_lines, has_names, last_name)
        ]
        last_name = turns[-1][0]
        intervals = _divide(segment.start, segment.end, [len(text) for _, text in turns])
        for (name, text), (start, end) in zip(turns, intervals, strict=True):
            cleaned.append(
                dataclasses.replace(segment, start=start, end=end, text=text, speaker=name)
            )
    notes.leave_out("without text", sum(not segment.text for segment in cleaned))
    return _without_rolling([segment for segment in cleaned if segment.text], notes)


def _without_rolling(segments: list[Segment], notes: Notes) -> tuple[Segment, ...]:
    """Ends each segment where the next one begins if the segments are captions that roll up.

    Automatic captions, such as those of YouTube, stay on the screen while the next caption is
    spoken. Such captions have no speakers, most of them overlap, and they end in the order in which
    they begin.
    """
    pairs = list(itertools.pairwise(segments))
    num_overlaps = sum(first.end > second.start for first, second in pairs)
    in_order = all(
        first.start < second.start and first.end <= second.end for first, second in pairs
    )
    is_plain = not any(segment.speaker or segment.words for segment in segments)
    if len(pairs) < _MIN_ROLLING or 2 * num_overlaps <= len(pairs) or not (in_order and is_plain):
        return tuple(segments)
    notes.add("captions that roll up end where the next caption begins")
    ends = [*(segment.start for segment in segments[1:]), segments[-1].end]
    return tuple(
        dataclasses.replace(segment, end=min(segment.end, end))
        for segment, end in zip(segments, ends, strict=True)
    )


def _has_names(lines_by_segment: list[list[str]]) -> bool:
    """Returns whether prefixes such as "Ann: " are speakers.

    At least half of the segments must have such a prefix, and at least one prefix must be repeated.
    """
    first_lines = [next(filter(None, lines), "") for lines in lines_by_segment]
    matches = [_NAME.match(_NEW_SPEAKER.sub("", line)) for line in first_lines if line]
    names = [match[1].casefold() for match in matches if match]
    return 2 * len(names) >= len(matches) and len(set(names)) < len(names)


def _turns(
    lines: list[str], has_names: bool, last_name: str | None
) -> list[tuple[str | None, str]]:
    """Returns the speaker, if known, and the text of each turn in the lines of a segment.

    Args:
      lines: Lines without markup.
      has_names: Whether "Ann: " before a text is a speaker.
      last_name: Speaker of the previous turn, who also speaks the first line if it names no speaker
        and has no mark of a new speaker.
    """
    turns: list[tuple[str | None, str]] = [(last_name if has_names else None, "")]
    lines = list(filter(None, lines))
    # A dash may also continue a sentence. It marks a turn only if the first line has a mark, too.
    has_dashes = bool(lines) and _NEW_SPEAKER.match(lines[0]) is not None
    for line in lines:
        text = _NEW_SPEAKER.sub("", line)
        match = _BRACKETED_NAME.match(text) or (_NAME.match(text) if has_names else None)
        if match:
            turns.append((one_line(match[1]), one_line(text[match.end() :])))
        elif text != line and (has_dashes or line.startswith(">")):
            turns.append((None, one_line(text)))
        else:
            turns[-1] = turns[-1][0], one_line(f"{turns[-1][1]} {text}")
    return [turn for turn in turns if turn[1]] or turns[-1:]


def _plain(text: str) -> str:
    """Returns the text of several lines without markup and without marks of a new speaker."""
    return one_line(" ".join(_NEW_SPEAKER.sub("", line) for line in _plain_lines(text)))


def _plain_lines(text: str) -> list[str]:
    """Returns the lines of a text without markup."""
    text = html.unescape(_TAG.sub("", text))
    # Zero-width spaces and direction marks would count as text.
    text = re.sub("[\u200b\u200e\u200f\u2060\ufeff]", "", _MUSIC.sub(" ", text))
    return [line.strip() for line in text.split("\n")]


def _import_pysubs2(name: str) -> Any:
    try:
        import pysubs2
    except ModuleNotFoundError:
        raise missing_library("pysubs2", f"Reading {name}") from None
    return pysubs2
