"""Reads the JSON transcripts of speech recognizers and cloud services."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mister_jax.data.timing import is_too_fast
from mister_jax.data.transcripts.annotations import clean_chat
from mister_jax.data.transcripts.parsing import (
    DetectedFormat,
    Notes,
    Selection,
    channel_indices,
    one_line,
    parse_seconds,
)
from mister_jax.data.transcripts.segments import (
    Segment,
    Transcript,
    Word,
    count_letters,
    word_offsets,
)
from mister_jax.errors import InputError

MAX_PAUSE = 1.0
"""Longest pause in seconds within a segment, for files that contain words but no segments."""

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Keys:
    """JSON keys of a format's segments or words.

    If a value has several keys, the first key that a record has is used.

    Attributes:
      scale: Length of the format's time unit in seconds.
      default_start: Start of a record that has only an end.
      words: Key of a segment's list of words.
      word: Keys of each word; if None, a word has the same keys as a segment.
    """

    text: tuple[str, ...]
    start: tuple[str, ...] = ("start",)
    end: tuple[str, ...] = ("end",)
    duration: tuple[str, ...] = ()
    speaker: tuple[str, ...] = ("speaker",)
    channel: tuple[str, ...] = ("channel",)
    scale: float = 1.0
    default_start: float | None = None
    words: str = "words"
    word: _Keys | None = None


_WORD = _Keys(text=("punctuated_word", "word", "text"))
_WHISPER = _Keys(text=("text",), word=_WORD)
_WHISPER_CPP = _Keys(text=("text",), start=("from",), end=("to",), scale=1e-3)
_DEEPGRAM = _Keys(text=("transcript",), word=_WORD)
_ASSEMBLYAI = _Keys(text=("text",), scale=1e-3)
_AMAZON_CALL = _Keys(
    text=("Content",),
    start=("BeginOffsetMillis",),
    end=("EndOffsetMillis",),
    speaker=("ParticipantRole", "ParticipantId"),
    scale=1e-3,
    words="Items",
)
_AMAZON_POST_CALL = _Keys(
    text=("DisplayText", "OriginalText"),
    start=("SegmentStartTime",),
    end=("SegmentEndTime",),
    speaker=("SegmentSpeaker",),
    words="WordConfidence",
    word=_Keys(text=("Text",), start=("StartTime",), end=("EndTime",)),
)
_AMAZON_ITEM = _Keys(
    text=("content",),
    start=("start_time",),
    end=("end_time",),
    speaker=("speaker_label",),
    channel=("channel_label",),
)
_AMAZON_SEGMENT = dataclasses.replace(_AMAZON_ITEM, text=("transcript",))
_GOOGLE_WORD = _Keys(
    text=("word",),
    start=("startTime", "start_time", "startOffset", "start_offset"),
    end=("endTime", "end_time", "endOffset", "end_offset"),
    speaker=("speakerTag", "speaker_tag", "speakerLabel", "speaker_label"),
    default_start=0.0,  # Google's libraries omit values of zero.
)
_AZURE_WORD = _Keys(
    text=("displayText", "word"),
    start=("offsetInTicks",),
    duration=("durationInTicks",),
    scale=1e-7,
)
_AZURE = dataclasses.replace(_AZURE_WORD, text=("display", "lexical"), word=_AZURE_WORD)
_AZURE_ISO_WORD = dataclasses.replace(
    _AZURE_WORD, start=("offset",), duration=("duration",), scale=1.0
)
_AZURE_ISO = dataclasses.replace(_AZURE_ISO_WORD, text=_AZURE.text, word=_AZURE_ISO_WORD)
_AZURE_FAST = _Keys(
    text=("text",),
    start=("offsetMilliseconds",),
    duration=("durationMilliseconds",),
    scale=1e-3,
)


def detect_json(text: str) -> DetectedFormat | None:
    """Returns the format of a JSON file, or None if the text is not JSON.

    Raises:
      InputError: The text is JSON, but not a supported transcript.
    """
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        data = _load(text)
    except (ValueError, RecursionError) as error:
        # Other formats may also begin with a bracket: ASS with "[Script Info]", and MicroDVD with
        # "{0}{25}".
        if not re.match(r'\s*\{\s*["}]', text):
            return None
        raise InputError(f"is damaged JSON ({one_line(str(error))})") from None
    if isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        data = {"segments": data} if "start" in data[0] else _join_responses(data)
    if isinstance(data, dict):
        data = _response(data)
    if isinstance(data, dict):
        for name, fits, read in _FORMATS:
            if fits(data):
                return DetectedFormat(name, functools.partial(_read, data, name, read))
    keys = ", ".join(list(data)[:8]) if isinstance(data, dict) else f"a {type(data).__name__}"
    raise InputError(f"is JSON with {keys or 'no keys'}, which is not a supported transcript")


def _response(data: Record) -> Record:
    """Returns the `response` of a Google Cloud operation, or `data` itself if it has none."""
    response = data.get("response")
    return response if isinstance(response, Mapping) else data


def _join_responses(responses: Sequence[Record]) -> Record:
    """Returns one response with the final results of a list of Google's streaming responses.

    A single response is returned unchanged.
    """
    if len(responses) == 1:
        return responses[0]
    if not any(map(_is_google, responses)):
        raise InputError(f"is JSON with a list of {len(responses)} objects; needed: one transcript")
    # Responses about events have no results.
    results = [result for response in responses for result in _records(response, "results")]
    # In a stream, results that are not final are repeated by later results.
    final = [result for result in results if _first(result, ("isFinal", "is_final"))]
    return {"results": final or results}


def _load(text: str) -> Any:
    """Parses JSON or JSON Lines, and returns a list for JSON Lines."""
    try:
        return json.loads(text)
    except ValueError:
        lines = text.split("\n")
        try:
            return [json.loads(line) for line in lines if line.strip()]
        except ValueError:
            pass
        raise


def _read(
    data: Record,
    name: str,
    read: Callable[[Record, Notes], Iterable[Segment]],
    selection: Selection,
    notes: Notes,
) -> Transcript:
    try:
        segments = tuple(read(data, notes))
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        reason = one_line(f"{type(error).__name__}: {error}")
        raise InputError(f"is damaged {name} ({reason})") from None
    # `channel_indices` needs the names of all channels, so indices are assigned after reading.
    names = [str(segment.channel) for segment in segments if segment.channel is not None]
    indices = channel_indices(name.removeprefix("ch_") for name in names)
    segments = tuple(
        dataclasses.replace(segment, channel=indices.get(str(segment.channel).removeprefix("ch_")))
        for segment in segments
    )
    return Transcript(name, segments)


def _first(record: Record, keys: Sequence[str]) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _seconds(value: Any, scale: float = 1.0) -> float | None:
    """Converts a number, a text, or Google's {"seconds": 1, "nanos": 500000000} to seconds."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return int(value.get("seconds") or 0) + int(value.get("nanos") or 0) / 1e9
    if isinstance(value, str):
        return scale * parse_seconds(value)
    return scale * float(value)


def _times(record: Record, keys: _Keys) -> tuple[float | None, float | None]:
    start = _seconds(_first(record, keys.start), keys.scale)
    end = _seconds(_first(record, keys.end), keys.scale)
    duration = _seconds(_first(record, keys.duration), keys.scale)
    if start is None and end is not None:
        start = keys.default_start
    if start is not None and end is None and duration is not None:
        end = start + duration
    return start, end


def _name(record: Record, keys: Sequence[str]) -> str | None:
    value = _first(record, keys)
    return None if value is None else str(value)


def _text(record: Record, keys: _Keys) -> str:
    return one_line(str(_first(record, keys.text) or ""))


def _word(record: Record, keys: _Keys) -> Word:
    start, end = _times(record, keys)
    # In the files of some services, a word may have zero length.
    has_length = start is not None and end is not None and end > start
    return Word(_text(record, keys), start, end if has_length else None)


def _segments(records: Iterable[Record], keys: _Keys, notes: Notes) -> Iterator[Segment]:
    """Yields a segment for each record with times, or one for each turn if its words have speakers.

    In the JSON of WhisperX, for example, each word has a speaker.
    """
    word_keys = keys.word or keys
    for record in records:
        start, end = _times(record, keys)
        items = [
            (word, _name(item, word_keys.speaker))
            for item in record.get(keys.words) or ()
            if (word := _word(item, word_keys)).text
        ]
        words = tuple(word for word, _ in items)
        text = _text(record, keys) or " ".join(word.text for word in words)
        if start is None or end is None:
            notes.leave_out("without times")
            continue
        speaker, channel = _name(record, keys.speaker), _name(record, keys.channel)
        segment = Segment(start, end, text, speaker, channel, words)
        yield from _split_at_speakers(segment, [speaker for _, speaker in items])


def _split_at_speakers(segment: Segment, speakers: Sequence[str | None]) -> list[Segment]:
    """Splits a segment where the speaker of its words changes.

    A word without a speaker or without letters has the speaker of the word before it. The first
    word then has the speaker of the segment.

    Args:
      segment: Segment with words.
      speakers: Speaker of each word.
    """
    words = segment.words
    known = [
        speaker if count_letters(word.text) else None
        for word, speaker in zip(words, speakers, strict=True)
    ]
    if not any(known):
        return [segment]
    speaker = segment.speaker or next(filter(None, known))
    filled = [speaker := name or speaker for name in known]
    firsts = [i for i in range(1, len(words)) if filled[i] != filled[i - 1]]
    offsets = word_offsets(segment.text, words)
    duration = segment.end - segment.start
    cuts = [(0, 0, segment.start, segment.start)]
    for first in firsts:
        times = [time for time in (words[first - 1].end, words[first].start) if time is not None]
        # Without times, the time of the split is estimated from the number of characters.
        times = times or [segment.start + duration * offsets[first] / len(segment.text)]
        cuts.append((first, offsets[first], min(times), times[-1]))
    cuts.append((len(words), len(segment.text), segment.end, segment.end))
    parts = [
        dataclasses.replace(
            segment,
            start=start,
            end=end,
            text=segment.text[offset:end_offset].strip(),
            speaker=filled[first],
            words=words[first:stop],
        )
        for (first, offset, _, start), (stop, end_offset, end, _) in itertools.pairwise(cuts)
    ]
    # Damaged times, or words that differ from the text, must not remove a part of the text.
    return parts if all(it.text and it.end > it.start for it in parts) else [segment]


def _turns(
    records: Iterable[Record], keys: _Keys, notes: Notes, channel: str | None = None
) -> Iterator[Segment]:
    """Groups consecutive words of one speaker and channel into segments.

    A pause longer than `MAX_PAUSE` also ends a segment. A word without times, such as punctuation,
    is appended to the previous word.
    """
    words: list[Word] = []
    speaker: str | None = None
    current: tuple[str | None, str | None] = (None, None)

    def turn() -> Iterator[Segment]:
        if words and words[0].start is not None:
            end = words[-1].end if words[-1].end is not None else words[-1].start
            text = " ".join(word.text for word in words)
            yield Segment(words[0].start, end or 0.0, text, *current, tuple(words))

    for record in records:
        word = _word(record, keys)
        if not word.text:
            continue
        if word.start is None:
            if not words:
                notes.leave_out("without times")
                continue
            separator = " " if any(map(str.isalnum, word.text)) else ""
            words[-1] = dataclasses.replace(words[-1], text=words[-1].text + separator + word.text)
            continue
        speaker = _name(record, keys.speaker)
        voice = (speaker, channel if channel is not None else _name(record, keys.channel))
        last_end = words[-1].end or words[-1].start if words else None
        is_pause = last_end is not None and word.start - last_end > MAX_PAUSE
        if voice != current or is_pause:
            yield from turn()
            words, current = [], voice
        words.append(word)
    yield from turn()


def _records(data: Record, *path: str) -> list:
    """Returns the list of objects at a path of keys, or an empty list."""
    value: Any = data
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    is_list = isinstance(value, list) and all(isinstance(record, Mapping) for record in value)
    return value if is_list else []


def _read_whisper(data: Record, notes: Notes) -> Iterable[Segment]:
    segments = list(_segments(data["segments"], _WHISPER, notes))
    # OpenAI's verbose JSON lists the words separately from the segments.
    words = [word for record in _records(data, "words") if (word := _word(record, _WORD)).text]
    if any(segment.words for segment in segments):
        return segments
    return _with_words(segments, words)


def _with_words(segments: Sequence[Segment], words: Sequence[Word]) -> list[Segment]:
    """Assigns each word with times to the segment that contains the midpoint of the word.

    A word whose midpoint is outside all segments is assigned to the nearest segment.
    """
    segments = sorted(segments, key=lambda segment: segment.start)
    starts = [segment.start for segment in segments]
    words_by_segment = collections.defaultdict(list)
    for word in words:
        if word.start is None or not segments:
            continue
        middle = word.start if word.end is None else (word.start + word.end) / 2
        index = max(bisect.bisect_right(starts, middle) - 1, 0)
        is_last = index + 1 == len(segments)
        if not is_last and middle - segments[index].end > starts[index + 1] - middle:
            index += 1
        words_by_segment[index].append(word)
    return [
        dataclasses.replace(segment, words=tuple(words_by_segment[index]))
        for index, segment in enumerate(segments)
    ]


def _read_words(data: Record, notes: Notes) -> Iterator[Segment]:
    return _turns(data["words"], _WORD, notes)


def _read_utterances(data: Record, notes: Notes) -> Iterator[Segment]:
    return _segments(data["utterances"], _WHISPER, notes)


def _read_whisper_cpp(data: Record, notes: Notes) -> Iterator[Segment]:
    records = [record["offsets"] | {"text": record["text"]} for record in data["transcription"]]
    return _segments(records, _WHISPER_CPP, notes)


def _read_amazon(data: Record, notes: Notes) -> Iterator[Segment]:
    results = data["results"]
    items = [_amazon_item(item) for item in results["items"]]
    # Older files have a separate list that maps the start of each word to its speaker.
    speakers = {
        item["start_time"]: item["speaker_label"]
        for segment in _records(results, "speaker_labels", "segments")
        for item in segment.get("items", ())
    }
    for item in items:
        if item.get("start_time") in speakers:
            item.setdefault("speaker_label", speakers[item["start_time"]])
    if segments := _records(results, "audio_segments"):
        by_id = {item.get("id"): item for item in items}
        for segment in segments:
            words = [by_id[id_] for id_ in segment.get("items", ()) if id_ in by_id]
            joined = [word for turn in _turns(words, _AMAZON_ITEM, notes) for word in turn.words]
            for timed in _segments([segment], _AMAZON_SEGMENT, notes):
                yield dataclasses.replace(timed, words=tuple(joined))
        return
    channels = _records(results, "channel_labels", "channels")
    for channel in channels:
        words = [_amazon_item(item) for item in channel["items"]]
        yield from _turns(words, _AMAZON_ITEM, notes, channel["channel_label"])
    if not channels:
        yield from _turns(items, _AMAZON_ITEM, notes)


def _amazon_item(item: Record) -> dict[str, Any]:
    return {**item, "content": item["alternatives"][0]["content"]}


def _read_amazon_call(data: Record, notes: Notes) -> Iterator[Segment]:
    return _segments(data["Transcript"], _AMAZON_CALL, notes)


def _read_amazon_post_call(data: Record, notes: Notes) -> Iterator[Segment]:
    labels = _records(data, "ConversationAnalytics", "SpeakerLabels")
    names = {label.get("Speaker"): label.get("DisplayText") for label in labels}
    if len(set(names.values())) < len(names) or None in names.values():
        names = {}
    for segment in _segments(data["SpeechSegments"], _AMAZON_POST_CALL, notes):
        yield dataclasses.replace(segment, speaker=names.get(segment.speaker, segment.speaker))


def _read_google(data: Record, notes: Notes) -> Iterator[Segment]:
    results = [result for result in data["results"] if result.get("alternatives")]
    best = [result["alternatives"][0] for result in results]
    # With speaker diarization, the last result repeats all earlier words and adds their speakers.
    if best and any(_first(word, _GOOGLE_WORD.speaker) for word in best[-1].get("words", ())):
        labeled = [word for word in best[-1]["words"] if _first(word, _GOOGLE_WORD.speaker)]
        if any(best[:-1]) and _repeats(labeled, best[:-1]):
            yield from _turns(labeled, _GOOGLE_WORD, notes)
            return
    previous_end: dict[Any, float] = collections.defaultdict(float)
    for result, alternative in zip(results, best, strict=True):
        tag = _first(result, ("channelTag", "channel_tag"))
        channel = None if tag is None else str(tag)
        words = alternative.get("words") or ()
        end = _seconds(_first(result, ("resultEndTime", "resultEndOffset", "result_end_time")))
        if words:
            yield from _turns(words, _GOOGLE_WORD, notes, channel)
        elif end is not None and alternative.get("transcript"):
            notes.add("results without words begin at the end of the result before them")
            text = one_line(alternative["transcript"])
            yield Segment(previous_end[channel], end, text, channel=channel)
        elif alternative.get("transcript"):
            notes.leave_out("without times")
        if end is not None:
            previous_end[channel] = end


def _repeats(words: Sequence[Record], alternatives: Sequence[Record]) -> bool:
    """Returns whether words repeat the words of earlier results, judged by the start times."""
    earlier = [word for alternative in alternatives for word in alternative.get("words") or ()]
    if not earlier:
        return len(words) > 0
    first, last_start = (_times(word, _GOOGLE_WORD)[0] or 0.0 for word in (words[0], earlier[-1]))
    return first <= last_start


def _read_azure(data: Record, notes: Notes) -> Iterator[Segment]:
    for phrase in data["recognizedPhrases"]:
        if phrase.get("recognitionStatus", "Success") != "Success" or not phrase.get("nBest"):
            notes.leave_out("not recognized")
            continue
        best = phrase["nBest"][0]
        keys = _AZURE if phrase.get("offsetInTicks") is not None else _AZURE_ISO
        words = best.get("displayWords") or best.get("words") or ()
        yield from _segments([{**best, **phrase, "words": words}], keys, notes)


def _read_azure_fast(data: Record, notes: Notes) -> Iterator[Segment]:
    return _segments(data["phrases"], _AZURE_FAST, notes)


def _read_deepgram(data: Record, notes: Notes) -> Iterator[Segment]:
    results = data["results"]
    if utterances := _records(results, "utterances"):
        yield from _segments(utterances, _DEEPGRAM, notes)
        return
    for index, channel in enumerate(results["channels"]):
        if channel.get("alternatives"):
            words = channel["alternatives"][0].get("words") or ()
            yield from _turns(words, _WORD, notes, str(index))


def _read_assemblyai(data: Record, notes: Notes) -> Iterator[Segment]:
    keys = _ASSEMBLYAI
    utterances, words = _records(data, "utterances"), data.get("words") or ()
    if not _is_named_assemblyai(data) and _are_seconds(utterances or words):
        notes.add("times are seconds, because speech cannot be so fast in milliseconds")
        keys = dataclasses.replace(keys, scale=1.0)
    if utterances:
        return _segments(utterances, keys, notes)
    return _turns(words, keys, notes)


def _are_seconds(records: Iterable[Record]) -> bool:
    """Returns whether the text of records is much too fast for times in milliseconds."""
    texts, duration = [], 0.0
    for record in records:
        start, end = _times(record, _ASSEMBLYAI)
        if start is not None and end is not None:
            texts.append(_text(record, _ASSEMBLYAI))
            duration += max(end - start, 0.0)
    # Speech with times in seconds seems 1000 times as fast. Times in milliseconds may be imprecise.
    return is_too_fast("".join(texts), 10 * duration)


def _read_batchalign(data: Record, notes: Notes) -> Iterator[Segment]:
    for record in data["content"]:
        if "content" not in record:  # A header or a comment.
            continue
        text = clean_chat(record.get("text") or "")
        times = record.get("alignment") or record.get("time")
        words = [_batchalign_word(item) for item in record["content"]]
        words = [word for word in words if word.text]
        if not text:
            notes.leave_out("without words")
        elif not times:
            notes.leave_out("without times")
        else:
            start, end = (time / 1000 for time in times)
            yield Segment(start, end, text, record["tier"].get("id"), words=tuple(words))


def _batchalign_word(item: Record) -> Word:
    start, end = (time / 1000 for time in item["time"]) if item.get("time") else (None, None)
    return Word(clean_chat(item.get("text") or ""), start, end)


def _is_named_assemblyai(data: Record) -> bool:
    return "audio_url" in data or "acoustic_model" in data


def _is_assemblyai(data: Record) -> bool:
    if _is_named_assemblyai(data):
        return True
    records = _records(data, "utterances") or _records(data, "words")
    return bool(records) and all(
        isinstance(record.get("start"), int) and "text" in record for record in records
    )


def _has_timed_utterances(data: Record) -> bool:
    return any("start" in record and "text" in record for record in _records(data, "utterances"))


def _has_items(*path: str) -> Callable[[Record], bool]:
    return lambda data: bool(_records(data, *path))


def _is_google(data: Record) -> bool:
    return any("alternatives" in result for result in _records(data, "results"))


# Name, detector and reader of each format. The first format whose detector returns true is used.
_FORMATS: tuple[
    tuple[str, Callable[[Record], bool], Callable[[Record, Notes], Iterable[Segment]]], ...
] = (
    ("Whisper JSON", _has_items("segments"), _read_whisper),
    ("whisper.cpp JSON", _has_items("transcription"), _read_whisper_cpp),
    ("Amazon Transcribe JSON", _has_items("results", "items"), _read_amazon),
    ("Amazon Transcribe Call Analytics JSON", _has_items("Transcript"), _read_amazon_call),
    ("Amazon post-call analytics JSON", _has_items("SpeechSegments"), _read_amazon_post_call),
    ("Google Speech-to-Text JSON", _is_google, _read_google),
    ("Azure Speech JSON", _has_items("recognizedPhrases"), _read_azure),
    ("Azure fast transcription JSON", _has_items("phrases"), _read_azure_fast),
    ("Deepgram JSON", _has_items("results", "channels"), _read_deepgram),
    ("AssemblyAI JSON", _is_assemblyai, _read_assemblyai),
    # Times that are not whole numbers are seconds.
    ("JSON with utterances", _has_timed_utterances, _read_utterances),
    ("JSON with words", _has_items("words"), _read_words),
    ("batchalign JSON", _has_items("content"), _read_batchalign),
    # Whisper's output for a recording without speech.
    ("Whisper JSON", lambda data: data.get("segments") == [], _read_whisper),
)
