r"""Reads linguistic annotations: Praat TextGrid, ELAN EAF and CHAT.

This module does not use the libraries praatio, pympi-ling and pylangacq. praatio fails on TextGrids
with comments and on labels such as "item [1]". pympi-ling gives no times to annotations whose time
slots have no value. pylangacq rejects an entire file because of one invalid time, and drops words
that a speaker repeats.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence

from mister_jax.data.transcripts.parsing import (
    DetectedFormat,
    Notes,
    Selection,
    describe_counts,
    one_line,
)
from mister_jax.data.transcripts.segments import Segment, Transcript, Word
from mister_jax.errors import InputError

_TIERS = frozenset({"tier", "label_tier"})


def detect_annotations(text: str) -> DetectedFormat | None:
    """Returns the annotation format of a text, or None."""
    start = text.lstrip()[:5000]
    if start.startswith("File type") and re.search('"TextGrid"', start):
        return DetectedFormat("Praat TextGrid", functools.partial(_read_textgrid, text), _TIERS)
    if "<ANNOTATION_DOCUMENT" in start:
        return DetectedFormat("ELAN EAF", functools.partial(_read_eaf, text), _TIERS)
    if re.search(r"^@(UTF8|Begin)\s*$", start, re.MULTILINE):
        read = functools.partial(_read_chat, text)
        return DetectedFormat("CHAT", read, frozenset({"label_tier"}))
    return None


@dataclasses.dataclass(eq=False)
class Tier:
    """A tier: one layer of an annotation, such as the turns of one speaker.

    Attributes:
      name: Name of the tier.
      intervals: Intervals with their texts as in the file. A text may be empty or have several
        lines. A point is an interval of length 0.
      participant: Speaker of the tier, if the format names one.
      is_points: Whether the tier contains points instead of intervals.
      span: Start and end of the tier, if the format states them.
      num_untimed: Number of nonempty texts whose times are unknown. `intervals` omits these texts.
    """

    name: str
    intervals: list[Segment]
    participant: str | None = None
    is_points: bool = False
    span: tuple[float, float] | None = None
    num_untimed: int = 0

    @functools.cached_property
    def filled(self) -> list[Segment]:
        """Intervals with nonempty text. Each text is joined into one line."""
        return [
            dataclasses.replace(interval, text=text)
            for interval in self.intervals
            if (text := one_line(interval.text))
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class Annotation:
    """Content of a TextGrid or EAF file.

    Attributes:
      path: Path of the file.
      tiers: Tiers in the file.
      span: Start and end of a TextGrid in seconds; None for an EAF.
      document: Root element of an EAF; None for a TextGrid.
    """

    path: str
    tiers: tuple[Tier, ...]
    span: tuple[float, float] | None = None
    document: ET.Element | None = None


def parse_annotation(path: str, text: str) -> Annotation | None:
    """Returns the tiers of a TextGrid or EAF, or None if the text has another format.

    Raises:
      InputError: The file is damaged.
    """
    detected = detect_annotations(text)
    if detected is None or "tier" not in detected.options:
        return None
    if detected.name == "ELAN EAF":
        document = _parse_xml(text)
        return Annotation(path, tuple(_eaf_tiers(document)), document=document)
    span, tiers = _parse_textgrid(text)
    return Annotation(path, tuple(tiers), span)


def _select(all_tiers: Sequence[Tier], selection: Selection) -> list[Segment]:
    """Returns the intervals of the selected tiers, with their labels and speakers."""
    points = [tier.name for tier in all_tiers if tier.is_points]
    tiers = [tier for tier in all_tiers if not tier.is_points]
    counts = collections.Counter({tier.name: 0 for tier in tiers})
    for tier in tiers:
        counts[tier.name] += len(tier.filled)
    listed = describe_counts(counts) or "none"
    if points:
        listed += f"; tiers of points, which have no length: {', '.join(points)}"
    label_tiers = _named(tiers, selection.label_tier, listed)
    if selection.tier is not None:
        chosen = _named(tiers, selection.tier, listed)
    else:
        candidates = [tier for tier in tiers if tier not in label_tiers]
        filled = [tier for tier in candidates if tier.filled]
        chosen = filled
        if len(filled) > 1 and selection.ignore_emotion_tiers:
            chosen = _without_predictions(candidates) or filled
        if len(chosen) > 1 and chosen is filled:
            raise InputError(f"has several tiers; choose one with --tier=NAME; tiers: {listed}")
    if not any(tier.filled for tier in chosen):
        raise InputError(f"has no intervals with text in its tiers; tiers: {listed}")
    if len(label_tiers) not in (0, 1, len(chosen)):
        raise InputError(
            f"{len(label_tiers)} label tiers for {len(chosen)} tiers; needed: one, or one per tier"
        )
    segments = []
    for position, tier in enumerate(chosen):
        speaker = tier.participant or (tier.name if len(chosen) > 1 else None)
        labels = label_tiers[position if len(label_tiers) > 1 else 0].filled if label_tiers else []
        for segment in _labeled(tier.filled, labels):
            segments.append(dataclasses.replace(segment, speaker=speaker))
    return segments


def _without_predictions(tiers: Sequence[Tier]) -> list[Tier]:
    """Returns the text tiers of a file to which `mister-jax predict` has written emotion tiers.

    Such a file has a single text tier, or an emotion tier for each text tier (see
    `timeline.tiers.split_tiers`). For all other files, returns an empty list.
    """
    emotion_tiers = {tier.name for tier in tiers if is_emotion_tier(tier.name)}
    texts = [tier for tier in tiers if tier.name not in emotion_tiers]
    unpaired = set(emotion_tiers)
    for tier in texts:
        # The emotion tier of a text tier "Ann 2" is "Ann emotion 2" if the speaker is "Ann", and
        # "Ann 2 emotion" if the speaker is "Ann 2". Without a speaker, the text tier is "text".
        number = re.search(r"(?: \d+)?$", tier.name)[0]  # type: ignore[index]
        name = tier.name.removesuffix(number)
        speaker = "" if name == "text" else name
        unpaired -= {f"{speaker} emotion{number}".strip(), f"{tier.name} emotion"}
    is_paired = len(emotion_tiers) == len(texts) and not unpaired
    has_predictions = bool(emotion_tiers) and (is_paired or len(texts) == 1)
    return [tier for tier in texts if tier.filled] if has_predictions else []


def is_emotion_tier(name: str) -> bool:
    """Returns whether a tier has the name of an emotion tier that `mister-jax predict` writes."""
    return bool(re.fullmatch(r"(?:.* )?emotion(?: \d+)?", name, re.DOTALL))


def _named(tiers: Sequence[Tier], names: str | None, listed: str) -> list[Tier]:
    """Returns the tiers named in a comma-separated list."""
    if names is None:
        return []
    by_name = {tier.name: tier for tier in reversed(tiers)}
    if names in by_name:  # A name may contain commas.
        return [by_name[names]]
    chosen = []
    for name in (name.strip() for name in names.split(",")):
        if name not in by_name:
            raise InputError(f"has no tier of intervals named {name!r}; tiers: {listed}")
        chosen.append(by_name[name])
    return list({id(tier): tier for tier in chosen}.values())


def _labeled(segments: Sequence[Segment], labels: Sequence[Segment]) -> Iterator[Segment]:
    """Labels each segment with the text of the label interval that overlaps most with the segment.

    If no interval covers at least half of a segment, the segment gets no label.
    """
    labels = sorted(labels, key=lambda label: label.start)
    ends = [label.end for label in labels]
    for segment in segments:
        covered, text = 0.0, None
        # Intervals of a tier do not overlap, so the ends of sorted intervals are sorted, too.
        for index in range(bisect.bisect_right(ends, segment.start), len(labels)):
            label = labels[index]
            if label.start >= segment.end:
                break
            overlap = min(label.end, segment.end) - max(label.start, segment.start)
            if overlap > covered:
                covered, text = overlap, label.text
        # The tolerance allows for rounded times.
        is_half = covered > 0 and covered >= (segment.end - segment.start) / 2 - 1e-6
        yield dataclasses.replace(segment, label=text if is_half else None)


# Like Praat, read only free-standing numbers, strings and flags. The same code can then read the
# long and the short text format of TextGrids.
_PRAAT_TOKEN = re.compile(
    r'(?<!\S)(?:"((?:[^"]|"")*)"|(<\w+>)|([-+]?[\d.]+(?:[eE][-+]?\d+)?)|!.*)(?!\S)'
)
_PRAAT_COMMENT = re.compile(r'(?<!\S)("(?:[^"]|"")*")(?!\S)|(?<!\S)!.*')


def _read_textgrid(text: str, selection: Selection, notes: Notes) -> Transcript:
    _, tiers = _parse_textgrid(text)
    return Transcript("Praat TextGrid", tuple(_select(tiers, selection)))


def _parse_textgrid(text: str) -> tuple[tuple[float, float], list[Tier]]:
    """Returns the start and end of a TextGrid, and its tiers."""
    # A comment may contain quotes, and a string may contain exclamation marks.
    text = _PRAAT_COMMENT.sub(lambda match: match[1] or "", text)
    tokens = iter(_PRAAT_TOKEN.findall(text))

    def string() -> str:
        return next(token[0] for token in tokens if not (token[1] or token[2])).replace('""', '"')

    def number() -> float:
        return float(next(token[2] for token in tokens if token[2]))

    def point() -> Segment:
        time = number()
        return Segment(time, time, string())

    tiers = []
    try:
        while string() != "TextGrid":
            pass
        span = number(), number()
        for _ in range(int(number())):
            is_points = string() != "IntervalTier"
            name, tier_span, size = string(), (number(), number()), int(number())
            intervals = [
                point() if is_points else Segment(number(), number(), string()) for _ in range(size)
            ]
            tiers.append(Tier(name, intervals, is_points=is_points, span=tier_span))
    except (StopIteration, OverflowError, ValueError):
        raise InputError("is damaged: this TextGrid ends before its last interval") from None
    return span, tiers


_EAF_UNITS = {"milliseconds": 1e-3, "PAL-frames": 0.04, "PAL-50-frames": 0.02}
_EAF_UNITS |= {"NTSC-frames": 1001 / 30000}


def eaf_unit(document: ET.Element) -> float:
    """Returns the length of an EAF's time unit in seconds."""
    header = document.find("HEADER")
    units = "milliseconds" if header is None else header.get("TIME_UNITS", "milliseconds")
    return _EAF_UNITS.get(units, 1e-3)


def _read_eaf(text: str, selection: Selection, notes: Notes) -> Transcript:
    tiers = _eaf_tiers(_parse_xml(text))
    for tier in tiers:
        notes.leave_out(f"without times, in tier {tier.name}", tier.num_untimed)
    return Transcript("ELAN EAF", tuple(_select(tiers, selection)))


def _parse_xml(text: str) -> ET.Element:
    try:
        return ET.fromstring(text)
    except ET.ParseError as error:
        raise InputError(f"is damaged: this EAF is not XML ({error})") from None


def _eaf_tiers(root: ET.Element) -> list[Tier]:
    """Returns the tiers of an EAF with the times that ELAN shows."""
    scale = eaf_unit(root)
    tiers_of_file = root.findall("TIER")
    slots: dict[str, float] = {}
    try:
        for slot in root.iterfind("TIME_ORDER/TIME_SLOT"):
            if (value := slot.get("TIME_VALUE")) is not None:
                slots[slot.get("TIME_SLOT_ID", "")] = scale * float(value)
    except ValueError:
        raise InputError(
            f"is damaged: the time slot {value!r} of this EAF is not a number"
        ) from None
    for tier in tiers_of_file:
        _interpolate(tier, slots)
    intervals: dict[str, tuple[float, float]] = {}
    for annotation in root.iter("ALIGNABLE_ANNOTATION"):
        start, end = (annotation.get(f"TIME_SLOT_REF{side}", "") for side in (1, 2))
        if start in slots and end in slots:
            intervals[annotation.get("ANNOTATION_ID", "")] = (slots[start], slots[end])
    references = {tier: list(tier.iter("REF_ANNOTATION")) for tier in tiers_of_file}
    # An annotation may refer to an annotation of a tier that comes later in the file.
    remaining = [tier for tier, annotations in references.items() if annotations]
    while remaining:
        ready = [
            tier
            for tier in remaining
            if any(child.get("ANNOTATION_REF") in intervals for child in references[tier])
        ]
        if not ready:
            break
        for tier in ready:
            intervals |= _referring_intervals(references[tier], intervals)
        remaining = [tier for tier in remaining if tier not in ready]
    tiers = []
    for tier in tiers_of_file:
        tiers.append(Tier(tier.get("TIER_ID", ""), [], tier.get("PARTICIPANT") or None))
        for annotation in tier.iterfind("ANNOTATION/*"):
            value = annotation.findtext("ANNOTATION_VALUE") or ""
            times = intervals.get(annotation.get("ANNOTATION_ID", ""))
            if times is not None:
                tiers[-1].intervals.append(Segment(*times, value))
            else:
                tiers[-1].num_untimed += bool(one_line(value))
    return tiers


def _interpolate(tier: ET.Element, slots: dict[str, float]) -> None:
    """Adds times for a tier's time slots that have no value in the file.

    As in ELAN, adjacent annotations evenly divide the time between the nearest slots with values.

    Args:
      tier: Tier of an EAF.
      slots: Time of each time slot in seconds. Missing times are added in place.
    """
    bounds = [
        (annotation.get("TIME_SLOT_REF1", ""), annotation.get("TIME_SLOT_REF2", ""))
        for annotation in tier.iter("ALIGNABLE_ANNOTATION")
    ]
    next_slot = dict(bounds)
    for start, end in bounds:
        if start not in slots or end in slots:
            continue
        chain = [end]
        while chain[-1] not in slots and chain[-1] in next_slot and len(chain) <= len(bounds):
            chain.append(next_slot[chain[-1]])
        if chain[-1] in slots:
            step = (slots[chain[-1]] - slots[start]) / len(chain)
            for position, slot in enumerate(chain[:-1], 1):
                slots[slot] = slots[start] + step * position


def _referring_intervals(
    annotations: Sequence[ET.Element], intervals: dict[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Returns the times of child annotations, which evenly divide the time of their parent."""
    children = collections.defaultdict(list)
    for annotation in annotations:
        children[annotation.get("ANNOTATION_REF", "")].append(annotation.get("ANNOTATION_ID", ""))
    times = {}
    for parent, ids in children.items():
        if parent in intervals:
            start, end = intervals[parent]
            step = (end - start) / len(ids)
            for position, id_ in enumerate(ids):
                times[id_] = (start + step * position, start + step * (position + 1))
    return times


# A bullet, the time mark of CHAT, contains a start and an end in milliseconds. In older files, it
# also contains the name of the media file: %snd:"file"_100_200.
_BULLET = re.compile('\x15\\s*(?:%\\w+:\\s*"[^"]*"_)?(\\d+)_(\\d+)\\s*\x15?')
_UNINTELLIGIBLE = re.compile(r"(?<![^\s<])(?:xxx?|yyy?|www)(?!\w)")
# CHAT codes and their replacements, in the order in which they are applied.
_CHAT_CODES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("\x15[^\x15]*\x15?", " "),
        # Remove codes of retracings, errors, overlaps and comments, but keep the marked words.
        (r"\[[^\]]*\]", " "),
        (r"[<>⌈⌉⌊⌋↑↓→↗↘⇗⇘∆∇°▁▔☺♋⁇∙≡ˈˌ]", ""),
        # Remove events (&=laughs), fragments (&+w) and interposed words of other speakers
        # (&*CHI:yes). The next rule keeps the words of fillers (&-um).
        (r"(?<!\S)&[=+~*{}]\S*", " "),
        (r"(?<!\S)&-?", ""),
        # Remove omitted words, which begin with 0.
        (r"(?<!\S)0(?:'?[a-z]\S*)?(?!\S)", " "),
        # The first rule removes pauses, such as (.) and (1.5). The second rule removes only the
        # parentheses around letters that are not spoken, as in (be)cause.
        (r"\((?:\.+|\d*:?\d*\.\d*)\)", " "),
        (r"[()]", ""),
        # The first two rules replace terminators for trailing off, interruptions and quotations.
        # The third rule removes linkers, CHAT's codes at the beginning of an utterance, such as +^.
        (r"\+\.\.\.?(\??)", r" ...\1"),
        (r"""\+(?:"?/{0,2}|"|!)([.?])""", r" \1"),
        (r"""(?<!\S)\+["^,+≈≋]?(?!\S)""", " "),
        # Remove markers of special forms, such as wug@n.
        (r"@\S+", ""),
        # The first rule removes marks of lengthened vowels (:), pauses within words (^), and
        # compounds (+). The second rule replaces the _ in compounds with a space.
        (r"(?<=\w)[:^]+(?=\w|\s|$)|(?<!\S)\^|(?<=\w)\+(?=\w)", ""),
        (r"(?<=\w)_(?=\w)", " "),
        (_UNINTELLIGIBLE.pattern, " "),
        (r"[‡„]", ","),
        (r"\s+([.?!,;])", r"\1"),
    )
)


def clean_chat(text: str) -> str:
    """Removes the codes from a CHAT utterance; returns "" if no words are left."""
    for pattern, replacement in _CHAT_CODES:
        text = pattern.sub(replacement, text)
    return one_line(text) if re.search(r"\w", text) else ""


def _read_chat(text: str, selection: Selection, notes: Notes) -> Transcript:
    # A line that starts with a tab or a space continues the line above.
    lines = re.sub(r"\n[\t ]+", " ", text).split("\n")
    label_tier = selection.label_tier and "%" + selection.label_tier.lstrip("%")
    dependent_tiers: collections.Counter[str] = collections.Counter()
    segments: list[Segment] = []
    is_kept = False
    for line in lines:
        tier, _, content = line.partition(":")
        if tier.startswith("*"):
            segment = _chat_segment(content, tier[1:], notes)
            is_kept = segment is not None
            if segment:
                segments.append(segment)
        elif tier.startswith("%"):
            dependent_tiers[tier] += 1
            if is_kept and tier == label_tier:
                segments[-1] = dataclasses.replace(segments[-1], label=one_line(content) or None)
            elif is_kept and tier == "%wor":
                segments[-1] = dataclasses.replace(segments[-1], words=tuple(_chat_words(content)))
    if label_tier and label_tier not in dependent_tiers:
        raise InputError(
            f"has no tier {label_tier!r}; tiers: {describe_counts(dependent_tiers) or 'none'}"
        )
    return Transcript("CHAT", tuple(segments))


def _chat_segment(content: str, speaker: str, notes: Notes) -> Segment | None:
    bullets = _BULLET.findall(content)
    text = clean_chat(content)
    if not text and not _UNINTELLIGIBLE.search(content):
        notes.leave_out("without words")
        return None
    if not bullets:
        notes.leave_out("without times")
        return None
    # A long utterance may contain several bullets, each with the time of the words before it.
    start, end = bullets[0][0], bullets[-1][1]
    return Segment(int(start) / 1000, int(end) / 1000, text, speaker)


def _chat_words(content: str) -> Iterator[Word]:
    """Yields the words of a %wor tier, in which a bullet with the time follows each word."""
    position = 0
    for bullet in _BULLET.finditer(content):
        word = clean_chat(content[position : bullet.start()])
        position = bullet.end()
        if word:
            yield Word(word, int(bullet[1]) / 1000, int(bullet[2]) / 1000)
