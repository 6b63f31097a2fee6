"""Finds a recording's utterances with a transcript, speech recognition or voice activity."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from mister_jax.data import audio
from mister_jax.data.audio_source import (
    MIX,
    NAMED_CHANNELS,
    RECORDING_SUFFIXES,
    AudioError,
    Channel,
    check_channel,
    existing_path,
)
from mister_jax.data.timing import END_TOLERANCE, is_too_fast, max_characters_per_second
from mister_jax.data.transcripts.parsing import Notes
from mister_jax.data.transcripts.reader import find_transcript, read_transcript
from mister_jax.data.transcripts.segments import Segment
from mister_jax.data.transcripts.utterances import UtteranceRules, make_utterances
from mister_jax.errors import InputError
from mister_jax.inference.speech_recognition import (
    SpeechRecognizer,
    detect_voice_activity,
    load_recognizer,
    recognize_speech,
)

SPLIT = "split"
"""Value of `channels` for recordings that have one speaker per channel."""

_LOUDNESS_SECONDS = 60.0  # maximum seconds of a segment to read when comparing channels
_MIN_SHARE_RATIO = 1.25


@dataclasses.dataclass(frozen=True)
class RecordingUtterances:
    """The utterances of a recording, sorted by start time.

    Attributes:
      recording: Path of the recording.
      segments: Times, texts, speakers and channels.
      origin: Source of the segments, such as "transcript call.srt (SRT)".
      transcript: Path of the transcript, or None.
      notes: Notes on the recording and its transcript.
      segment_notes: Notes on each segment.
    """

    recording: str
    segments: tuple[Segment, ...]
    origin: str
    transcript: str | None
    notes: tuple[str, ...]
    segment_notes: tuple[tuple[str, ...], ...]


def find_utterances(
    recording: str | os.PathLike[str],
    *,
    transcript: str | os.PathLike[str] | Sequence[Segment] | None = None,
    search_transcript: bool = True,
    tier: str | None = None,
    speaker: str | None = None,
    recognizer: str | os.PathLike[str] | SpeechRecognizer | None = None,
    language: str | None = None,
    channels: Channel = MIX,
    rules: UtteranceRules | None = None,
    quiet: bool = True,
) -> RecordingUtterances:
    """Finds the utterances of a recording.

    The utterances come from the first available source: the given transcript, a transcript of the
    same name beside the recording, speech recognition, or voice activity detection.

    Args:
      recording: Audio or video file that FFmpeg reads.
      transcript: Path of a transcript that `read_transcript` can read, or a sequence of segments.
      search_transcript: Whether to look for a transcript beside the recording.
      tier: Tier of an annotation; see `read_transcript`.
      speaker: Speaker whose segments are used; None uses all speakers.
      recognizer: Whisper checkpoint (see `WhisperRecognizer`) or a function from samples to
        segments, such as `detect_voice_activity`, which finds utterances without text. By default,
        Whisper if its default checkpoint can be loaded, and otherwise voice activity detection.
      language: Language code for Whisper, such as "en"; None detects the language.
      channels: Channel to read: "mix", "left", "right" or an index. "split" reads all channels,
        each with one speaker.
      rules: Rules for joining and splitting segments. If no segment has text, the segments are not
        changed.
      quiet: Whether to hide progress.

    Raises:
      InputError: The recording or the transcript cannot be read, the transcript belongs to another
        recording, or there is no speech.
    """
    source = existing_path(recording)
    name = os.fspath(recording)
    seconds = audio.container_seconds(source)
    indices = _channel_indices(source, channels)
    notes: tuple[str, ...] = ()
    if transcript is None and search_transcript:
        transcript = find_transcript(source)
    if transcript is None:
        for flag, value in (("tier", tier), ("speaker", speaker)):
            if value is not None:
                raise InputError(
                    f"--{flag}={value}: {name} has no transcript; needed: a transcript"
                )
        function = load_recognizer(recognizer, language)
        segments, notes = _recognize(source, function, indices, quiet)
        is_voice_activity = function is detect_voice_activity
        origin = "voice activity detection" if is_voice_activity else "speech recognition"
        if not segments:
            raise InputError(f"{name}: no speech found by {origin}; needed: a recording of speech")
    else:
        if isinstance(transcript, str | os.PathLike):
            contents = read_transcript(
                transcript,
                tier=tier,
                speaker=speaker,
                recording=pathlib.Path(source).stem,
                ignore_emotion_tiers=True,
            )
            segments, notes = contents.segments, contents.notes
            origin = f"transcript {os.fspath(transcript)} ({contents.format})"
        else:
            segments, origin = _check_given(name, transcript), "given segments"
        if not segments:
            raise InputError(f"{name}: no segments in its {origin}; needed: at least one")
        seconds, truncated = _check_belongs_to_recording(name, source, origin, segments, seconds)
        notes += truncated
        if len(indices) > 1:
            segments = _assign_channels(source, segments, indices)
    if any(segment.text for segment in segments):
        joining = Notes()
        segments = make_utterances(segments, rules, joining)
        notes += joining.messages()
    if len(indices) == 1:
        # The channel of a transcript's segment is used only if the channels are split.
        segments = tuple(dataclasses.replace(it, channel=indices[0]) for it in segments)
    segment_notes = tuple(_timing_notes(segment, seconds) for segment in segments)
    is_path = isinstance(transcript, str | os.PathLike)
    path = os.fspath(transcript) if is_path else None  # type: ignore[arg-type]
    return RecordingUtterances(name, tuple(segments), origin, path, notes, segment_notes)


def _check_given(name: str, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Checks the given segments and returns them sorted by start time."""
    for segment in segments:
        if not -math.inf < segment.start < segment.end < math.inf:
            raise InputError(
                f"{name}: {segment}; needed: finite times, and the end after the start"
            )
    return tuple(sorted(segments, key=lambda segment: segment.start))


def list_recordings(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Returns the given recordings; a folder is replaced by its recordings, sorted by name.

    Raises:
      InputError: A folder has no recordings, or a recording is named twice.
    """
    recordings = []
    for path in paths:
        folder = pathlib.Path(path)
        if not folder.is_dir():
            recordings.append(os.fspath(path))
            continue
        files = sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in RECORDING_SUFFIXES
            and path.is_file()
            and not path.name.startswith(".")
        )
        if not files:
            raise InputError(
                f"{folder}: no recordings; needed: files with extension "
                f"{', '.join(RECORDING_SUFFIXES)} (subfolders are not searched)"
            )
        recordings += map(str, files)
    counts = collections.Counter(map(os.path.realpath, recordings))
    for recording in recordings:
        if counts[os.path.realpath(recording)] > 1:
            raise InputError(f"{recording}: given twice; needed: each recording once")
    return recordings


def _channel_indices(source: str, channels: Channel) -> tuple[Channel, ...]:
    if channels != SPLIT:
        try:
            channel = check_channel(channels)
        except ValueError as error:
            raise InputError(f"--channels={error}, or {SPLIT}") from error
        index = NAMED_CHANNELS.get(str(channel), channel)
        count = audio.num_channels(source)
        if isinstance(index, int) and index >= count:
            raise InputError(f"--channels={channels}: number of channels in {source} is {count}")
        return (channel,)
    count = audio.num_channels(source)
    if count < 2:
        raise InputError(f"{source}: one channel; needed for --channels=split: at least two")
    return tuple(range(count))


def _recognize(
    source: str, recognizer: SpeechRecognizer, channels: Sequence[Channel], quiet: bool
) -> tuple[tuple[Segment, ...], tuple[str, ...]]:
    """Returns the segments that a recognizer finds in the given channels, and its notes."""
    segments: list[Segment] = []
    notes: dict[str, None] = {}  # an ordered set
    for channel in channels:
        speech = recognize_speech(source, recognizer, channel=channel, quiet=quiet)
        notes |= dict.fromkeys(speech.notes)
        is_split = len(channels) > 1
        segments += (
            dataclasses.replace(
                segment,
                channel=channel,
                speaker=segment.speaker or (_channel_name(channel) if is_split else None),
            )
            for segment in speech.segments
        )
    return tuple(sorted(segments, key=lambda segment: segment.start)), tuple(notes)


def _channel_name(channel: Channel) -> str:
    return {0: "left", 1: "right"}.get(int(channel), f"channel {channel}")


def _check_belongs_to_recording(
    name: str, source: str, origin: str, segments: Sequence[Segment], seconds: float | None
) -> tuple[float, tuple[str, ...]]:
    """Returns the recording's length, and a note if the transcript ends after the recording.

    Raises:
      InputError: Most segments start after the end of the recording.
    """

    def num_late(length: float) -> int:
        return sum(segment.start >= length for segment in segments)

    end = max(segment.end for segment in segments)
    if seconds is not None and end <= seconds + END_TOLERANCE:
        return seconds, ()
    # A file's header may have no length or only an estimate, so measure the length.
    decoded_seconds = audio.decoded_seconds(source)
    if end <= decoded_seconds + END_TOLERANCE:
        return decoded_seconds, ()
    # The transcript of a truncated recording matches the length that the header states.
    full_seconds = max(decoded_seconds, (seconds or 0.0) + audio.missing_seconds(source))
    late = num_late(full_seconds)
    if 2 * late > len(segments):
        raise InputError(
            f"{name}: {full_seconds:.1f} s long, but its {origin} ends at {end:.1f} s and {late} "
            f"of {len(segments)} segments start after the recording; needed: the transcript of "
            "this recording"
        )
    note = f"the recording ends at {decoded_seconds:.1f} s, its {origin} ends later"
    return decoded_seconds, (note,)


def _assign_channels(
    source: str, segments: Sequence[Segment], channels: Sequence[Channel]
) -> tuple[Segment, ...]:
    """Assigns each segment to the channel that it names, or else to the channel of its speaker."""
    segments = [
        dataclasses.replace(it, channel=NAMED_CHANNELS.get(str(it.channel), it.channel))
        for it in segments
    ]
    unassigned = [index for index, it in enumerate(segments) if it.channel not in channels]
    powers: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(len(channels)))
    speakers = {index: segments[index].speaker or f"segment {index}" for index in unassigned}
    for position, channel in enumerate(channels):
        requests = [
            audio.DecodeRequest(source, segments[index].start, segments[index].end, channel)
            for index in unassigned
        ]
        for index, clip in zip(
            unassigned, audio.stream_cuts(requests, _LOUDNESS_SECONDS), strict=True
        ):
            if not isinstance(clip, AudioError):
                squares = np.square(clip.samples.astype(np.float32))
                powers[speakers[index]][position] += float(squares.sum())
    totals = np.maximum(sum(powers.values(), np.zeros(len(channels))), 1.0)
    by_speaker = {
        speaker: channels[_loudest(power, power / totals)] for speaker, power in powers.items()
    }
    return tuple(
        dataclasses.replace(segment, channel=by_speaker[speakers[index]])
        if index in speakers
        else segment
        for index, segment in enumerate(segments)
    )


def _loudest(power: np.ndarray, share: np.ndarray) -> int:
    """Returns the position of a speaker's channel.

    `power` is the speaker's power in each channel, and `share` is this power divided by the power
    of all speakers in the channel. Shares are compared, because a channel may be louder than the
    others for all speakers. If all speakers are in one channel and the others contain only
    crosstalk, the shares are almost equal, so the channel with the largest power is chosen.
    """
    second, first = np.sort(share)[-2:]
    return int((share if first > _MIN_SHARE_RATIO * second else power).argmax())


def _timing_notes(segment: Segment, seconds: float | None) -> tuple[str, ...]:
    """Returns notes on times that do not fit the recording or the text."""
    notes = []
    duration = segment.end - segment.start
    if seconds is not None and segment.end > seconds + END_TOLERANCE:
        notes.append(f"ends {segment.end - seconds:.1f} s after the recording")
    if is_too_fast(segment.text, duration):
        notes.append(
            f"{len(segment.text)} characters in {duration:.1f} s; speech has at most "
            f"{max_characters_per_second(segment.text):.0f} per second"
        )
    return tuple(notes)
