"""Checks the utterances of a prediction and decodes their recordings."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from mister_jax.console import ProgressReporter
from mister_jax.data import audio
from mister_jax.data.clips import is_audible
from mister_jax.data.corpora.manifest import fields
from mister_jax.data.corpora.manifest.fields import Fields
from mister_jax.data.timing import END_TOLERANCE, is_length_mismatch
from mister_jax.errors import InputError

Utterance = Mapping[str, Any]

UNUSABLE, SILENT, NO_INPUT, CAPPED, DAMAGED, CUT, NOTE = NOTE_KINDS = (
    "unusable",
    "silent",
    "no input",
    "capped",
    "damaged",
    "cut by the encoder",
    "note",
)
"""Kinds of notes on an utterance; a note is "KIND: text"."""

_SHORT_SECONDS = 0.1  # below this length, a recording gets a note
_MAX_WARNINGS = 5  # number of unusable recordings that are logged individually


@dataclasses.dataclass(frozen=True)
class CheckedUtterance:
    """An utterance that passed the checks.

    Attributes:
      text: Text, empty if it is missing.
      speech: Request to decode a recording, samples [S] int16 at 16 kHz, or None without speech.
      notes: Notes for the user on samples that were passed as an array.
      annotated_seconds: Length of the speech according to the utterance's times, if known. A
        recording of another length gets a note.
    """

    text: str
    speech: audio.DecodeRequest | np.ndarray | None
    notes: tuple[str, ...] = ()
    annotated_seconds: float | None = None


def check_utterances(dialogues: Sequence[Sequence[Utterance]]) -> list[CheckedUtterance]:
    """Checks the utterances of all dialogues, in order.

    Raises:
      InputError: A dialogue is empty, or an utterance has a field that cannot be used.
    """
    rows, samples_and_notes = [], []
    for dialogue_number, dialogue in enumerate(dialogues, start=1):
        if not len(dialogue):
            raise InputError(f"dialogue {dialogue_number}: no utterances; at least one is needed")
        for utterance_number, utterance in enumerate(dialogue, start=1):
            where = f"dialogue {dialogue_number}, utterance {utterance_number}"
            row, samples = _read_fields(utterance, where)
            rows.append(row)
            samples_and_notes.append(samples)
    # All rows are read first, because "start" and "end" select a segment only if several rows share
    # a recording.
    intervals = fields.audio_intervals(rows)
    return [
        _check_utterance(row, samples, interval)
        for row, samples, interval in zip(rows, samples_and_notes, intervals, strict=True)
    ]


def check_utterance(utterance: Utterance) -> CheckedUtterance:
    """Checks a single utterance.

    Only "audio_start" and "audio_end", not "start" and "end", select a segment of the recording.

    Raises:
      InputError: The utterance has a field that cannot be used.
    """
    row, samples = _read_fields(utterance, "utterance")
    (interval,) = fields.audio_intervals([row])
    return _check_utterance(row, samples, interval)


def decode_speech(
    utterances: Sequence[CheckedUtterance], max_seconds: float, num_workers: int, quiet: bool
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Decodes the speech of utterances; see `EmotionRecognizer.predict_dialogues`.

    Yields:
      A tuple for each utterance: its samples [S] int16, which are empty if there is no recording or
      the recording cannot be read, and notes on the recording.
    """
    max_samples = round(max_seconds * audio.SAMPLE_RATE)
    requests = [it.speech for it in utterances if isinstance(it.speech, audio.DecodeRequest)]
    decoded = audio.decode_many(requests, num_workers=num_workers, max_seconds=max_seconds)
    failures: list[audio.AudioError] = []
    quiet = quiet or not requests
    with ProgressReporter(len(requests), unit="utterances", quiet=quiet) as reporter:
        for utterance in utterances:
            samples, notes = np.zeros(0, np.int16), list(utterance.notes)
            if isinstance(utterance.speech, np.ndarray):
                samples = utterance.speech[:max_samples]
                if len(utterance.speech) > max_samples:
                    seconds = len(utterance.speech) / audio.SAMPLE_RATE
                    notes.append(_capped_note(seconds, max_seconds))
            elif utterance.speech is not None:
                clip = next(decoded)
                reporter.advance("reading speech")
                if isinstance(clip, audio.AudioError):
                    failures.append(clip)
                    notes.append(f"{UNUSABLE}: {clip}")
                else:
                    samples = clip.samples
                    notes += _clip_notes(clip, max_seconds)
                    notes += _length_notes(clip, utterance.speech, utterance.annotated_seconds)
            if len(samples) and not is_audible(samples):
                notes.append(f"{SILENT}: predicted without speech")
            yield samples, notes
    for failure in failures[:_MAX_WARNINGS]:
        logging.warning("%s; its utterance is predicted without speech", failure)
    if len(failures) > _MAX_WARNINGS:
        logging.warning("%d of %d recordings cannot be used", len(failures), len(requests))


def reading_order(utterances: Sequence[CheckedUtterance]) -> list[int]:
    """Returns the utterances' indices in an order in which each channel is decoded only once.

    The segments of one channel of a recording are adjacent and sorted by start time.
    """
    sources: dict[Any, int] = {}

    def key(index: int) -> tuple[int, str, float]:
        speech = utterances[index].speech
        if not isinstance(speech, audio.DecodeRequest):
            return (-1, "", 0.0)
        # Recordings stay in the order of their first utterance.
        position = sources.setdefault(speech.source, len(sources))
        return (position, str(speech.channel), speech.start or 0.0)

    return sorted(range(len(utterances)), key=key)


def _read_fields(
    utterance: Utterance, where: str
) -> tuple[Fields, tuple[np.ndarray, tuple[str, ...]] | None]:
    """Returns the fields of an utterance, and its samples with notes if its audio is an array."""
    if not isinstance(utterance, Mapping):
        raise InputError(f"{where}: {type(utterance).__name__}; needed: a dict with audio or text")
    values = dict(utterance)
    speech = values.get("audio")
    is_array = speech is not None and not isinstance(speech, str | os.PathLike)
    if is_array:
        del values["audio"]
        if values.keys() & {"audio_start", "audio_end", "audio_channel"}:
            raise InputError(
                f"{where}: audio is an array, but audio_start, audio_end and audio_channel need a "
                "file; slice the array instead"
            )
    elif speech is not None:
        values["audio"] = os.fspath(speech)
    row = Fields(where, values)
    return row, _check_samples(speech, row) if is_array else None


def _check_utterance(
    row: Fields,
    samples: tuple[np.ndarray, tuple[str, ...]] | None,
    interval: tuple[float | None, float | None],
) -> CheckedUtterance:
    for name in row.values:
        if name not in fields.FIELDS:
            fields.check_extra_column(row, name, row.values)
    text, path = row.text("text") or "", row.line("audio")
    if samples is not None:
        return CheckedUtterance(text, *samples)
    if path is not None:
        given = row.values["audio"]
        if given != path and pathlib.Path(given).exists():  # a name with a space at an end
            path = given
        request = audio.DecodeRequest(path, *interval, row.channel())
        start, end = interval
        if interval == (None, None):
            start, end = row.interval("start", "end")
        elif start is None:
            start = 0.0
        seconds = None if start is None or end is None else end - start
        return CheckedUtterance(text, request, annotated_seconds=seconds)
    if row.values.get("text") is None:
        row.fail("audio", "missing, and text is also missing; needed: at least one of them")
    return CheckedUtterance(text, None)


def _check_samples(array: Any, row: Fields) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns an array's samples [S] as int16, and notes on the samples."""
    allowed = "allowed: a file, or samples [S] at 16 kHz, int16 or float"
    try:
        samples = np.asarray(array)
    except ValueError:  # for example, a tuple of an array and a sampling rate
        row.fail("audio", f"{type(array).__name__}; {allowed}")
    if samples.ndim != 1 or not (samples.dtype == np.int16 or samples.dtype.kind == "f"):
        row.fail("audio", f"{samples.dtype} {list(samples.shape)}; {allowed}")
    if samples.dtype == np.int16:
        return samples, ()
    try:
        scaled_samples, note = audio.float_to_int16(samples)
    except ValueError as error:
        row.fail("audio", str(error))
    return scaled_samples, (f"{NOTE}: {note}",) if note else ()


def _clip_notes(clip: audio.Clip, max_seconds: float) -> list[str]:
    notes = [f"{NOTE}: {note}" for note in clip.notes]
    if clip.seconds < _SHORT_SECONDS:
        notes.append(f"{NOTE}: only {clip.seconds:.2f} s long")
    if clip.capped:
        notes.append(_capped_note(clip.seconds, max_seconds))
    if clip.damaged:
        notes.append(f"{DAMAGED}: some of it could not be decoded")
    return notes


def _length_notes(
    clip: audio.Clip, request: audio.DecodeRequest, annotated_seconds: float | None
) -> list[str]:
    """Returns a note if a clip is not as long as the times of its utterance say."""
    if annotated_seconds is None:
        return []
    if request.end is not None:
        late = annotated_seconds - clip.seconds
        return [f"{NOTE}: ends {late:.1f} s after the recording"] if late > END_TOLERANCE else []
    if request.start is not None or not is_length_mismatch(clip.seconds, annotated_seconds):
        return []
    return [
        f"{NOTE}: all {clip.seconds:.1f} s of the recording are read, but start and end are "
        f"{annotated_seconds:.1f} s apart; audio_start and audio_end select a part"
    ]


def _capped_note(seconds: float, max_seconds: float) -> str:
    return f"{CAPPED}: {seconds:.1f} s, of which {max_seconds:g} s are read"
