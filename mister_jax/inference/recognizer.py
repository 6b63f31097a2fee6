"""From recordings and texts to emotions: the encoders and MiSTER-E of a work directory as one.

A `System` needs no dataset: the training has recorded which encoders made its features.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from mister_jax import extract
from mister_jax.console import ProgressReporter
from mister_jax.data import UNLABELED, DialogueFeatures, audio
from mister_jax.data.batching import plan_inference_batches
from mister_jax.data.clips import is_heard
from mister_jax.data.manifest.fields import FIELDS, Fields, audio_intervals, check_further_name
from mister_jax.data.pipeline import padded_batch
from mister_jax.encoders.speech import check_seconds
from mister_jax.errors import InputError
from mister_jax.inference.predictor import Predictions, Predictor, prediction_rows
from mister_jax.workdir import read_config

# Experts that read each modality.
_READERS = {"speech": ("speech", "fusion"), "text": ("text", "fusion")}

_MAX_WARNINGS = 5  # recordings that are warned of one by one

UNUSABLE, SILENT, CAPPED, DAMAGED, CUT, NOTE = (
    "unusable",
    "silent",
    "capped",
    "damaged",
    "cut by the encoder",
    "note",
)
"""Kinds of notes of a recording, the first word of each note."""

Utterance = Mapping[str, Any]
Places = str | Mapping[str, str] | None


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A checked utterance; `sound` is a request, samples [S] int16, or None."""

    text: str
    sound: audio.Request | np.ndarray | None
    notes: tuple[str, ...] = ()


class System:
    """The encoders and the model of a training of MiSTER-E, loaded once.

    Args:
      workdir: Work directory of a training on features that `launch.extract` has made.
      speech_encoder: New place of the speech encoder, if it has moved: a work directory, a folder,
        or a name on the Hugging Face Hub. For an encoder with further files, a dict of those that
        have moved: see `extract.with_new_paths`.
      text_encoder: New place of the text encoder.

    Raises:
      InputError: The directory holds no training of MiSTER-E, or one whose features were not made
        by encoders; or an encoder cannot be loaded or has changed.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        speech_encoder: Places = None,
        text_encoder: Places = None,
    ):
        if read_config(workdir).task != "fusion":
            raise InputError(f"{workdir}: a training of an encoder; needed: one of MiSTER-E")
        self._predictor = Predictor(workdir)
        task = self._predictor.task
        self.class_names: tuple[str, ...] = task.class_names
        self._dims = {"speech": task.model.speech_dim, "text": task.model.text_dim}
        places = {"speech": _by_part(speech_encoder), "text": _by_part(text_encoder)}
        self._encoders: dict[str, Any] = {}
        for modality, readers in _READERS.items():
            if modality in task.encoders and set(readers) & set(task.model.experts):
                identity = extract.with_new_paths(task.encoders[modality], places[modality])
                encoder = extract.encoder_from_metadata(identity)
                encoder.oom_hint = "shorter utterances, or devices with more memory"
                self._encoders[modality] = encoder
            elif places[modality]:
                raise InputError(
                    f"--{modality}_encoder={', '.join(places[modality].values())}: {workdir} uses "
                    f"no {modality} encoder; leave it out"
                )
        if not self._encoders:
            raise InputError(
                f"{workdir}: trained on ready-made features, so recordings and texts cannot be "
                "read; needed: a training on a dataset that launch.extract has written"
            )

    def predict(
        self, utterances: Sequence[Utterance], *, max_seconds: float = 60.0, quiet: bool = True
    ) -> list[dict[str, Any]]:
        """Predicts the utterances of one dialogue; see `predict_dialogues`."""
        (rows,) = self.predict_dialogues([utterances], max_seconds=max_seconds, quiet=quiet)
        return rows

    def predict_dialogues(
        self,
        dialogues: Sequence[Sequence[Utterance]],
        *,
        max_seconds: float = 60.0,
        num_workers: int = 0,
        quiet: bool = True,
    ) -> list[list[dict[str, Any]]]:
        """Predicts every utterance of some dialogues, each in the context of its dialogue.

        Args:
          dialogues: Utterances in the order in which they were said, each with "text", "audio" or
            both. Audio is a file of any format that FFmpeg reads, or samples [S] at 16 kHz, int16
            or floats of full scale 1. "audio_start" and "audio_end" are seconds into a file,
            "audio_channel" is "mix", "left", "right" or an index; utterances that share a file and
            have "start" and "end" are cut by these. Further fields are those of a manifest, and
            are not read. A file that cannot be read is logged, and its utterance predicted without
            speech.
          max_seconds: Seconds of a recording that are read.
          num_workers: Processes that decode files; 0 decodes in this process.
          quiet: Show no progress.

        Returns:
          For each utterance what `evaluate.prediction_rows` describes, and "notes": what happened
          to its recording, a list of texts that begin with a kind, such as "capped: ...".

        Raises:
          InputError: A dialogue, an utterance or a number of seconds cannot be used.
        """
        check_seconds(max_seconds)
        turns = _checked(dialogues)
        if not turns:
            return []
        if "speech" in self._encoders:
            clips, notes = _clips(turns, max_seconds, num_workers, quiet)
            self._note_cut_speech(clips, notes)
        else:
            clips = [np.zeros(0, np.int16)] * len(turns)
            notes = [[] for _ in turns]
            if any(turn.sound is not None for turn in turns):
                logging.warning("speech is not used: the model has no encoder of it")
        speech, speech_present = self._features("speech", clips, quiet)
        text, text_present = self._features("text", [turn.text for turn in turns], quiet)
        count = len(turns)
        features = DialogueFeatures(
            name="recordings",
            split="test",
            class_names=self.class_names,
            dialogue_ids=tuple(str(number) for number in range(len(dialogues))),
            lengths=np.array([len(dialogue) for dialogue in dialogues]),
            utterance_ids=np.arange(count).astype(str),
            speech=speech,
            text=text,
            speech_present=speech_present,
            text_present=text_present,
            label=np.full(count, UNLABELED, np.int32),
        )
        predicted = prediction_rows(self.class_names, self._predictions(features, quiet))
        rows = ({**row, "notes": notes_of} for row, notes_of in zip(predicted, notes, strict=True))
        return [[next(rows) for _ in dialogue] for dialogue in dialogues]

    def _note_cut_speech(self, clips: Sequence[np.ndarray], notes: Sequence[list[str]]) -> None:
        """Notes the clips that are longer than the encoder reads."""
        limit = self._encoders["speech"].input.max_samples
        for clip, notes_of in zip(clips, notes, strict=True):
            if limit is not None and len(clip) > limit:
                seconds, read = len(clip) / audio.SAMPLE_RATE, limit / audio.SAMPLE_RATE
                notes_of.append(f"{CUT}: {seconds:.1f} s, of which it reads {read:g} s")

    def _features(
        self, modality: str, items: Sequence[Any], quiet: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns features [N, F] of texts or clips, and which of them are present [N]."""
        nothing = np.zeros((len(items), self._dims[modality]), np.float32)
        absent = np.zeros(len(items), bool)
        if modality not in self._encoders:
            if modality == "text" and any(map(len, items)):
                logging.warning("text is not used: the model has no encoder of it")
            return nothing, absent
        encoder = self._encoders[modality]
        # A clip may be silent; if no item is left, an encoder has no features.
        read = [item for item in encoder.input.items(items) if len(item)]
        if not read:
            return nothing, absent
        # A batch is as large as a few utterances need, by powers of 2: few programs.
        needed = 2 ** math.ceil(math.log2(max(1.0, encoder.input.amount(read))))
        budget = min(encoder.input.budget, needed)
        features, present = extract.features_of(encoder, items, budget=budget, quiet=quiet)
        if features.shape[1] != self._dims[modality]:
            raise InputError(
                f"{modality} encoder: features of width {features.shape[1]}; the model takes "
                f"{self._dims[modality]}"
            )
        return features, present

    def _predictions(self, features: DialogueFeatures, quiet: bool) -> Predictions:
        # Not the task's batches: these need TensorFlow, which takes longer to start than the rest.
        planned = list(
            plan_inference_batches(
                features.lengths, num_shards=self._predictor.partitioner.num_shards
            )
        )
        offsets = features.offsets
        batches = (padded_batch(features, offsets, rows, length) for rows, length in planned)
        return self._predictor.predict_batches(batches, len(planned), features, quiet=quiet)


def load(
    workdir: epath.PathLike,
    *,
    speech_encoder: Places = None,
    text_encoder: Places = None,
) -> System:
    """Loads the `System` of a work directory, with the same arguments.

    system = load("RUN")
    system.predict([{"audio": "1.wav", "text": "Hello?"}, {"text": "You again!"}])
    """
    return System(workdir, speech_encoder=speech_encoder, text_encoder=text_encoder)


def summarize_notes(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns one line with the number of utterances by kind of note, empty if there are none."""
    counts = collections.Counter(
        kind for row in rows for kind in {note.partition(":")[0] for note in row["notes"]}
    )
    kinds = (UNUSABLE, SILENT, CAPPED, CUT, DAMAGED, NOTE)
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind])


def is_unusable(note: str) -> bool:
    """Returns whether a note says that a recording could not be used."""
    return note.startswith(UNUSABLE)


def _by_part(places: Places) -> Mapping[str, str]:
    return {"encoder": places} if isinstance(places, str) else places or {}


def _checked(dialogues: Sequence[Sequence[Utterance]]) -> list[_Turn]:
    """Checks the utterances of all dialogues."""
    rows, arrays = [], []
    for number, dialogue in enumerate(dialogues, start=1):
        if not len(dialogue):
            raise InputError(f"dialogue {number}: no utterances; at least one is needed")
        for place, utterance in enumerate(dialogue, start=1):
            where = f"dialogue {number}, utterance {place}"
            if not isinstance(utterance, Mapping):
                raise InputError(
                    f"{where}: {type(utterance).__name__}; needed: a dict with audio or text"
                )
            fields = dict(utterance)
            sound = fields.get("audio")
            is_array = sound is not None and not isinstance(sound, str | os.PathLike)
            if is_array:
                del fields["audio"]
                if fields.keys() & {"audio_start", "audio_end", "audio_channel"}:
                    raise InputError(
                        f"{where}: audio is an array; allowed with audio_start, audio_end and "
                        "audio_channel: a file. Cut the samples"
                    )
            elif sound is not None:
                fields["audio"] = os.fspath(sound)
            row = Fields(where, fields)
            arrays.append(_samples(sound, row) if is_array else None)
            rows.append(row)
    intervals = audio_intervals(rows)
    return [
        _turn(row, samples, interval)
        for row, samples, interval in zip(rows, arrays, intervals, strict=True)
    ]


def _turn(
    row: Fields,
    samples: tuple[np.ndarray, tuple[str, ...]] | None,
    interval: tuple[float | None, float | None],
) -> _Turn:
    for name in row.values:
        if name not in FIELDS:
            check_further_name(row, name, row.values)
    text, path = row.text("text") or "", row.line("audio")
    if samples is not None:
        return _Turn(text, *samples)
    if path is None and row.values.get("text") is None:
        row.fail("audio", "missing, and text too; needed: one of them")
    if path is None:
        return _Turn(text, None)
    return _Turn(text, audio.Request(path, *interval, row.channel()))


def _samples(sound: Any, row: Fields) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns samples [S] int16 of an array, and notes on them."""
    samples = np.asarray(sound)
    if samples.ndim != 1 or not (samples.dtype == np.int16 or samples.dtype.kind == "f"):
        row.fail(
            "audio",
            f"{samples.dtype} {list(samples.shape)}; allowed: a file, or samples [S] at 16 kHz, "
            "int16 or float",
        )
    if samples.dtype == np.int16:
        return samples, ()
    try:
        scaled, note = audio.float_to_int16(samples)
    except ValueError as error:
        row.fail("audio", str(error))
    return scaled, (f"{NOTE}: {note}",) if note else ()


def _clips(
    turns: Sequence[_Turn], max_seconds: float, num_workers: int, quiet: bool
) -> tuple[list[np.ndarray], list[list[str]]]:
    """Returns the samples [S] of each utterance, empty where it has no sound, and notes on them."""
    most = round(max_seconds * audio.SAMPLE_RATE)
    requests = [turn.sound for turn in turns if isinstance(turn.sound, audio.Request)]
    decoded = audio.decode_many(requests, num_workers=num_workers, max_seconds=max_seconds)
    clips, notes = [], []
    failures: list[audio.AudioError] = []
    with ProgressReporter(
        len(requests), unit="recordings", quiet=quiet or not requests
    ) as reporter:
        for turn in turns:
            samples, notes_of = np.zeros(0, np.int16), list(turn.notes)
            if isinstance(turn.sound, np.ndarray):
                samples = turn.sound[:most]
                if len(turn.sound) > most:
                    seconds = len(turn.sound) / audio.SAMPLE_RATE
                    notes_of.append(_capped(seconds, max_seconds))
            elif turn.sound is not None:
                clip = next(decoded)
                reporter.advance("decoding")
                if isinstance(clip, audio.AudioError):
                    failures.append(clip)
                    notes_of.append(f"{UNUSABLE}: {clip}")
                else:
                    samples = clip.samples
                    notes_of += [f"{NOTE}: {note}" for note in clip.notes]
                    if clip.capped:
                        notes_of.append(_capped(clip.seconds, max_seconds))
                    if clip.damaged:
                        notes_of.append(f"{DAMAGED}: some of it could not be decoded")
            if len(samples) and not is_heard(samples):
                notes_of.append(f"{SILENT}: predicted without speech")
            clips.append(samples)
            notes.append(notes_of)
    for failure in failures[:_MAX_WARNINGS]:
        logging.warning("%s; its utterance is predicted without speech", failure)
    if len(failures) > _MAX_WARNINGS:
        logging.warning("%d of %d recordings cannot be used", len(failures), len(requests))
    return clips, notes


def _capped(seconds: float, max_seconds: float) -> str:
    return f"{CAPPED}: {seconds:.1f} s, of which {max_seconds:g} s are read"
