"""Makes utterances from the segments of a transcript.

A segment, such as a subtitle or a recognized word, is not always an utterance: a sentence may span
several segments, and a segment may contain several sentences.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

from mister_jax.data.transcripts.parsing import Notes
from mister_jax.data.transcripts.segments import Segment, count_letters, word_offsets
from mister_jax.errors import InputError

_ABBREVIATIONS = (
    *("mr", "mrs", "ms", "dr", "prof", "st", "gen", "col", "capt", "lt", "sgt", "rev", "vs", "fig"),
    *("vol", "nr", "hr", "fr", "mme", "mlle", "sra", "cf", "bzw"),
)
# Abbreviations after which a sentence ends, unless a word in lower case follows.
_MAY_END_SENTENCE = ("etc", "inc", "ltd", "co", "corp", "jr", "sr", "usw", "approx")

# Longest overlap in seconds of consecutive segments of one speaker. Times that are rounded to
# hundredths of a second or to video frames overlap by up to 0.04 s. Speech overlaps by a syllable
# or more, which lasts at least 0.1 s.
_OVERLAP_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class UtteranceRules:
    """Rules of `make_utterances`.

    Attributes:
      join_gap: Length in seconds of a silence that separates segments. Shorter silences do not
        separate the segments of a sentence. If 0, no segments are joined.
      utterance_seconds: Length in seconds of the longest utterance that joining may create. Longer
        segments are split where possible.
      min_seconds: Length in seconds of the shortest utterance that splitting may create.
      sentence_ends: Characters that end a sentence.
      closing: Quotation marks and brackets that may follow the end of a sentence.
      abbreviations: Words in lower case whose period does not end a sentence. Initials, such as
        "J." and "U.S.", need not be listed.
    """

    join_gap: float = 0.8
    utterance_seconds: float = 20.0
    min_seconds: float = 0.3
    sentence_ends: str = ".!?…。！？؟।۔"  # noqa: RUF001
    closing: str = "\"'”’»›)]}」』"  # noqa: RUF001
    abbreviations: tuple[str, ...] = _ABBREVIATIONS

    def __post_init__(self) -> None:
        for name in ("join_gap", "utterance_seconds", "min_seconds"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"{name}={value}; allowed: finite, 0 or more seconds")
        if self.min_seconds >= self.utterance_seconds:
            raise InputError(
                f"min_seconds={self.min_seconds} is not below "
                f"utterance_seconds={self.utterance_seconds}"
            )


def make_utterances(
    segments: Sequence[Segment],
    rules: UtteranceRules | None = None,
    notes: Notes | None = None,
) -> tuple[Segment, ...]:
    """Splits segments at the ends of sentences, then joins the segments of each sentence.

    A segment with word times is split at the end of each sentence. Parts that are still longer than
    `utterance_seconds` are split at their longest pauses. A segment without word times is split
    only if it is longer than `utterance_seconds`. Such a segment is split at the ends of sentences
    into as few parts as possible, and the time of each split is estimated from the number of
    characters before the split.

    A segment that does not end a sentence is joined with the next segment of the same speaker and
    channel if the two segments have equal labels, the gap between them is shorter than `join_gap`,
    and the joined segment lasts at most `utterance_seconds`. Other speakers' segments may come
    between the two. Segments of unknown speakers that overlap are not joined, because two people
    speak. Segments without text are neither split nor joined.

    Args:
      segments: Segments.
      rules: Rules for joining and splitting.
      notes: Receives a note with the number of joined segments, if any.

    Returns:
      The utterances, sorted by start time. Utterances of different speakers may overlap.
    """
    rules = rules or UtteranceRules()
    utterances: list[Segment] = []
    sources: list[set[int]] = []
    last: dict[tuple, int] = {}
    for number, segment in enumerate(sorted(segments, key=lambda segment: segment.start)):
        for part in _split(segment, rules):
            voice = (part.speaker, part.channel)
            previous = last.get(voice)
            if previous is not None and _belongs(utterances[previous], part, rules):
                utterances[previous] = _join(utterances[previous], part)
                sources[previous].add(number)
                continue
            # If an unknown speaker interrupts another, the next segment continues the longer one.
            is_within = previous is not None and part.end < utterances[previous].end
            if part.speaker is not None or not is_within:
                last[voice] = len(utterances)
            utterances.append(part)
            sources.append({number})
    joined = [numbers for numbers in sources if len(numbers) > 1]
    if joined and notes is not None:
        count, plural = len(set().union(*joined)), "s" * (len(joined) > 1)
        notes.add(
            f"{count} segments are joined into {len(joined)} utterance{plural}; "
            "--join_gap=0 joins none"
        )
    return tuple(sorted(utterances, key=lambda utterance: utterance.start))


def ends_sentence(text: str, following: str, rules: UtteranceRules) -> bool:
    """Returns whether a sentence ends between a text and the text that follows it."""
    bare = text.rstrip().rstrip(rules.closing)
    if not bare or bare[-1] not in rules.sentence_ends:
        return False
    continues = following.lstrip("-–—.…" + rules.closing + " ")[:1].islower()  # noqa: RUF001
    is_ellipsis = bare.endswith(("...", "…"))
    is_quoted = len(bare) < len(text.rstrip())
    if is_ellipsis or is_quoted:
        return not continues  # "Stop!" he said.
    if bare[-1] != ".":
        return True
    word = bare.split()[-1].strip(rules.closing + "“‘«([{„")[:-1]  # noqa: RUF001
    # "J." and "U.S.", but not "So do I."
    is_initial = re.fullmatch(r"(?:[^\W\d_]\.)+[^\W\d_]", word) or (
        len(word) == 1 and word.isupper() and word != "I"
    )
    word = word.lower()
    is_abbreviation = is_initial or word in rules.abbreviations
    return not (is_abbreviation or (continues and word in _MAY_END_SENTENCE))


def _belongs(first: Segment, second: Segment, rules: UtteranceRules) -> bool:
    gap = second.start - first.end
    are_simultaneous = first.speaker is None and gap < -_OVERLAP_TOLERANCE
    return (
        bool(first.text and second.text)
        and first.label == second.label
        and not are_simultaneous
        and max(gap, 0.0) < rules.join_gap
        and max(first.end, second.end) - first.start <= rules.utterance_seconds
        and not ends_sentence(first.text, second.text, rules)
    )


def _join(first: Segment, second: Segment) -> Segment:
    # Chinese and Japanese have no spaces between words.
    has_no_spaces = all("\u3000" <= c <= "\u9fff" for c in (first.text[-1], second.text[0]))
    return dataclasses.replace(
        first,
        end=max(first.end, second.end),
        text=first.text + ("" if has_no_spaces else " ") + second.text,
        words=first.words + second.words if first.words and second.words else (),
    )


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A point at which a segment can be split.

    Attributes:
      offset: Number of characters of the text before the split.
      end: End of the part before the split, in seconds.
      start: Start of the part after the split, in seconds.
      word: Number of words before the split.
    """

    offset: int
    end: float
    start: float
    word: int = 0


def _split(segment: Segment, rules: UtteranceRules) -> list[Segment]:
    if not segment.text:
        return [segment]
    offsets = list(_sentence_offsets(segment.text, rules))
    if any(word.start is not None for word in segment.words):
        cuts = _cuts_between_words(segment, offsets)
        parts = _apply(segment, cuts, rules)
        return [piece for part in parts for piece in _split_at_pauses(part, rules)]
    duration = segment.end - segment.start
    if duration <= rules.utterance_seconds:
        return [segment]
    times = [segment.start + duration * offset / len(segment.text) for offset in offsets]
    cuts, part_start = [], segment.start
    for offset, time, after in zip(offsets, times, [*times[1:], segment.end], strict=False):
        # Without a split here, the current part would also contain the next sentence, and would be
        # too long.
        if after - part_start > rules.utterance_seconds:
            cuts.append(_Cut(offset, time, time))
            part_start = time
    return _apply(segment, cuts, rules)


def _sentence_offsets(text: str, rules: UtteranceRules) -> Iterator[int]:
    """Yields the offset after each sentence except the last."""
    ends, closing = re.escape(rules.sentence_ends), re.escape(rules.closing)
    # No space follows full-width punctuation.
    pattern = rf"[{ends}]+[{closing}]*(?:\s+|(?<=[。！？」』])(?!$))"  # noqa: RUF001
    for match in re.finditer(pattern, text):
        # Whether a sentence ends depends on the word before and the letter after the match.
        before = text[max(match.end() - 100, 0) : match.end()]
        after = text[match.end() : match.end() + 100]
        if after.strip() and ends_sentence(before, after, rules):
            yield match.end()


def _cuts_between_words(segment: Segment, offsets: Sequence[int]) -> list[_Cut]:
    """Returns split points between words, at the given offsets of the segment's text.

    Words are aligned with the text by counting letters, because spaces and punctuation in the text
    may differ from those in the words.
    """
    letters = [0, *itertools.accumulate(map(str.isalnum, segment.text))]
    word_letters = list(itertools.accumulate(count_letters(word.text) for word in segment.words))
    if not letters[-1] or not word_letters[-1]:
        return []
    cuts = []
    for offset in offsets:
        before = letters[offset] * word_letters[-1] / letters[-1]
        index = bisect.bisect_left(word_letters, before - 0.5) + 1
        if cut := _cut_at_word(segment, index, offset):
            cuts.append(cut)
    return cuts


def _cut_at_word(segment: Segment, index: int, offset: int) -> _Cut | None:
    if not 0 < index < len(segment.words):
        return None
    last, following = segment.words[index - 1], segment.words[index]
    start = following.start if following.start is not None else last.end
    end = last.end if last.end is not None else start
    if start is None or end is None:
        return None
    return _Cut(offset, min(end, start), start, index)


def _apply(segment: Segment, cuts: Sequence[_Cut], rules: UtteranceRules) -> list[Segment]:
    """Splits a segment, ignoring split points that would make a part too short."""
    kept = [_Cut(0, segment.start, segment.start)]
    for cut in cuts:
        is_long = cut.end - kept[-1].start >= rules.min_seconds
        if is_long and segment.end - cut.start >= rules.min_seconds:
            kept.append(cut)
    kept.append(_Cut(len(segment.text), segment.end, segment.end, len(segment.words)))
    return [
        dataclasses.replace(
            segment,
            start=before.start,
            end=after.end,
            text=segment.text[before.offset : after.offset].strip(),
            words=segment.words[before.word : after.word],
        )
        for before, after in itertools.pairwise(kept)
    ]


def _split_at_pauses(segment: Segment, rules: UtteranceRules) -> list[Segment]:
    """Recursively splits a segment longer than `utterance_seconds` at its longest pause."""
    if segment.end - segment.start <= rules.utterance_seconds:
        return [segment]
    middle = (segment.start + segment.end) / 2
    offsets = word_offsets(segment.text, segment.words)
    cuts = [
        cut for index, offset in enumerate(offsets) if (cut := _cut_at_word(segment, index, offset))
    ]
    # If pauses are equally long, for example all 0, the pause nearest to the middle is used.
    cuts.sort(key=lambda cut: (round(cut.start - cut.end, 2), -abs(cut.start - middle)))
    while cuts:
        parts = _apply(segment, [cuts.pop()], rules)
        if len(parts) > 1 and all(part.text for part in parts):
            return [piece for part in parts for piece in _split_at_pauses(part, rules)]
    return [segment]
