"""Finds speech in recordings without a transcript.

This module provides speech recognition with Whisper, and voice activity detection with Silero.

A recognizer is any function that maps samples to timed segments:

    def recognizer(samples: np.ndarray) -> Sequence[Segment]: ...

The samples are float32, [S], at 16 kHz with full scale 1. The times of the returned segments are
seconds from the first sample. Long recordings are passed in consecutive pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging
from etils import epy

from mister_jax.console import ProgressReporter
from mister_jax.data import SAMPLE_RATE, audio
from mister_jax.data.audio_source import MIX, Channel, Source
from mister_jax.data.transcripts.segments import Segment, Word
from mister_jax.errors import InputError, require_extra

with epy.lazy_imports():
    import faster_whisper
    from faster_whisper import vad

SpeechRecognizer = Callable[[np.ndarray], Sequence[Segment]]
"""Function from float32 samples [S] at 16 kHz to segments."""

DEFAULT_MODEL = "small"
"""Whisper checkpoint that is used by default."""

# Settings of Silero's voice activity detector for conversations: a segment ends at a pause of 0.3 s
# and lasts at most 15 s.
_VAD_OPTIONS = {
    "min_speech_duration_ms": 250,
    "min_silence_duration_ms": 300,
    "max_speech_duration_s": 15.0,
    "speech_pad_ms": 200,
}

# Maximum length in seconds of the pieces that a recognizer receives, which take 38 MB as float32.
_PIECE_SECONDS = 600.0
# A piece ends in the quietest 0.3 s of its last 60 s, so that few words are split.
_SEARCH_SECONDS, _PAUSE_SECONDS = 60.0, 0.3

# A recording counts as truncated if it ends before this fraction of the length in its header. The
# fraction is below 1, because some headers, such as those of MP3 files, only estimate the length.
_TRUNCATED_FRACTION = 0.9
_MAX_NOTES = 5  # maximum number of notes on the samples of a recording


def detect_voice_activity(samples: np.ndarray) -> list[Segment]:
    """Returns the segments that contain speech, without text, from Silero's detector.

    Args:
      samples: Samples [S] float32 at 16 kHz, full scale 1.

    Raises:
      MissingExtraError: The extra `asr` is not installed.
    """
    require_extra("asr", "voice activity detection")
    spans = vad.get_speech_timestamps(samples, vad.VadOptions(**_VAD_OPTIONS))
    return [Segment(span["start"] / SAMPLE_RATE, span["end"] / SAMPLE_RATE) for span in spans]


class CheckpointError(InputError):
    """A checkpoint of a recognizer cannot be loaded."""


class WhisperRecognizer:
    """Transcribes speech with Whisper on CTranslate2, and returns word times.

    Args:
      model: Name of a checkpoint such as "small" or "large-v3", a repository on the Hugging Face
        Hub, or a folder in CTranslate2's format.
      language: Language code, such as "en"; None detects the language.
      local_files_only: Whether to use only checkpoints that have been downloaded before.

    Raises:
      MissingExtraError: The extra `asr` is not installed.
      CheckpointError: The checkpoint cannot be loaded.
      InputError: The language is unknown.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        language: str | None = None,
        local_files_only: bool = False,
    ):
        require_extra("asr", "speech recognition")
        try:
            self._model = faster_whisper.WhisperModel(
                os.fspath(model), local_files_only=local_files_only
            )
        except Exception as error:  # CTranslate2, tokenizers and the Hub raise many error types.
            reason = textwrap.shorten(str(error), 200, placeholder=" ...")
            raise CheckpointError(
                f"speech recognizer {os.fspath(model)}: cannot be loaded ({reason}); allowed: a "
                "Whisper checkpoint for CTranslate2 on the Hub or in a folder"
            ) from error
        if language is not None and language not in self._model.supported_languages:
            raise InputError(
                f"language {language!r}; allowed: {', '.join(self._model.supported_languages)}"
            )
        self._language = language

    def __call__(self, samples: np.ndarray) -> list[Segment]:
        """Returns the segments of samples [S] float32 at 16 kHz."""
        return self._transcribe(samples, self._language)[0]

    def for_recording(self) -> SpeechRecognizer:
        """Returns a recognizer for the pieces of one recording, which share one language.

        The language is detected in the first piece with speech.
        """
        language = self._language

        def transcribe(samples: np.ndarray) -> list[Segment]:
            nonlocal language
            segments, piece_language = self._transcribe(samples, language)
            if segments:
                language = piece_language
            return segments

        return transcribe

    def _transcribe(self, samples: np.ndarray, language: str | None) -> tuple[list[Segment], str]:
        """Returns the segments in the samples, and the language."""
        segments, info = self._model.transcribe(
            samples,
            language=language,
            word_timestamps=True,
            # Whisper hallucinates text in silence, and repeats text that it is conditioned on.
            vad_filter=True,
            vad_parameters=_VAD_OPTIONS,
            condition_on_previous_text=False,
        )
        return [
            Segment(
                segment.start,
                segment.end,
                segment.text.strip(),
                words=tuple(
                    Word(word.word.strip(), word.start, word.end) for word in segment.words or ()
                ),
            )
            for segment in segments
        ], info.language


@dataclasses.dataclass(frozen=True)
class RecognizedSpeech:
    """The speech of a recording.

    Attributes:
      segments: Segments, sorted by start time.
      seconds: Length of the recording in seconds.
      notes: Notes on damage, missing audio and changes to the samples.
    """

    segments: tuple[Segment, ...]
    seconds: float
    notes: tuple[str, ...] = ()


def recognize_speech(
    source: Source,
    recognizer: SpeechRecognizer,
    *,
    channel: Channel = MIX,
    quiet: bool = True,
) -> RecognizedSpeech:
    """Applies a recognizer to a recording of any length, in bounded memory.

    Args:
      source: Path or content of the recording.
      recognizer: Function from samples to segments. The segments are clipped to the piece that the
        function received.
      channel: Channel to read.
      quiet: Whether to hide progress.

    Raises:
      AudioError: The recording cannot be read.
      InputError: The times of a recognizer's segment are not finite.
    """
    if isinstance(recognizer, WhisperRecognizer):
        recognizer = recognizer.for_recording()
    segments: list[Segment] = []
    seconds = 0.0
    notes: list[str] = []
    stated_seconds = audio.container_seconds(source) or 0.0
    with ProgressReporter(math.ceil(stated_seconds), unit="seconds", quiet=quiet) as reporter:
        for offset, samples in _pieces(source, channel, notes):
            piece_seconds = len(samples) / SAMPLE_RATE
            seconds = offset + piece_seconds
            found = [_check_segment(it, piece_seconds) for it in recognizer(samples)]
            segments += (_shift(it, offset) for it in found if it.end > it.start)
            reporter.advance("recognizing speech", amount=round(piece_seconds))
    is_damaged = any(note.startswith("damaged") for note in notes)
    if not is_damaged and seconds < _TRUNCATED_FRACTION * stated_seconds:
        notes.append(
            f"ends at {seconds:.0f} s of the {stated_seconds:.0f} s that its header states"
        )
    segments.sort(key=lambda segment: segment.start)
    return RecognizedSpeech(tuple(segments), seconds, tuple(notes))


def _check_segment(segment: Segment, piece_seconds: float) -> Segment:
    if not (math.isfinite(segment.start) and math.isfinite(segment.end)):
        raise InputError(f"the recognizer returned {segment}; needed: finite times in seconds")
    start, end = (min(max(time, 0.0), piece_seconds) for time in (segment.start, segment.end))
    return dataclasses.replace(segment, start=start, end=end)


def _shift(segment: Segment, offset: float) -> Segment:
    def later(time: float | None) -> float | None:
        return None if time is None else time + offset

    words = tuple(Word(it.text, later(it.start), later(it.end)) for it in segment.words)
    return dataclasses.replace(
        segment, start=segment.start + offset, end=segment.end + offset, words=words
    )


def _pieces(
    source: Source, channel: Channel, notes: list[str]
) -> Iterator[tuple[float, np.ndarray]]:
    """Yields the offset in seconds and the float32 samples of consecutive pieces.

    Notes on the recording are added to `notes`: one on damage, and each other note once.
    """
    piece_size = round(_PIECE_SECONDS * SAMPLE_RATE)
    buffered, offset = np.zeros(0, np.int16), 0
    is_damaged = False
    seen: set[str] = set()
    for block in audio.stream_blocks(source, channel):
        begin = (offset + len(buffered)) / SAMPLE_RATE
        end = begin + max(1.0, block.seconds)
        if block.damaged and not is_damaged:
            is_damaged = True
            where = f"somewhere between {begin:.0f} and {end:.0f} s"
            notes.append(f"damaged {where}; only speech that could be decoded is used")
        for note in block.notes:
            if note not in seen and len(seen) < _MAX_NOTES:
                seen.add(note)
                notes.append(f"{begin:.0f} to {end:.0f} s: {note}")
        buffered = np.concatenate([buffered, block.samples])
        while len(buffered) > piece_size:
            cut = _quietest_index(buffered[:piece_size])
            yield offset / SAMPLE_RATE, _to_float(buffered[:cut])
            buffered, offset = buffered[cut:], offset + cut
    if len(buffered):
        yield offset / SAMPLE_RATE, _to_float(buffered)


def _quietest_index(samples: np.ndarray) -> int:
    """Returns the sample index in the middle of the quietest pause near the end of a piece."""
    size = round(_PAUSE_SECONDS * SAMPLE_RATE)
    tail = samples[-round(_SEARCH_SECONDS * SAMPLE_RATE) :]
    frames = tail[: len(tail) // size * size].reshape(-1, size).astype(np.float32)
    quietest = int(np.argmin(np.mean(np.square(frames), axis=1)))
    return len(samples) - len(tail) + quietest * size + size // 2


def _to_float(samples: np.ndarray) -> np.ndarray:
    return samples.astype(np.float32) / audio.FULL_SCALE


def load_recognizer(
    recognizer: str | os.PathLike[str] | SpeechRecognizer | None, language: str | None = None
) -> SpeechRecognizer:
    """Returns the recognizer that the user chose, and keeps loaded checkpoints in memory.

    Args:
      recognizer: A function or a checkpoint (see `WhisperRecognizer`). None selects the default
        checkpoint if it can be loaded, and `detect_voice_activity` otherwise.
      language: Language code for Whisper.

    Raises:
      MissingExtraError: The extra `asr` is not installed.
      InputError: The named checkpoint cannot be loaded, or the language is unknown.
    """
    if callable(recognizer):
        return recognizer
    if recognizer is not None:
        return _load_whisper(os.fspath(recognizer), language)
    return _load_default(language)


@functools.cache  # A failed download is not repeated for each recording.
def _load_default(language: str | None) -> SpeechRecognizer:
    try:
        return _load_whisper(DEFAULT_MODEL, language)
    except CheckpointError as error:
        logging.warning("%s; utterances will have no text", error)
        return detect_voice_activity


@functools.cache
def _load_whisper(model: str, language: str | None) -> WhisperRecognizer:
    return WhisperRecognizer(model, language=language)
