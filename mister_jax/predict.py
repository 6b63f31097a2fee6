"""From recordings and texts to emotions: the encoders and MiSTER-E of a work directory as one.

A `System` needs no dataset: training has written down which encoders made its features.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from mister_jax import extract
from mister_jax.data import UNLABELLED, DialogueFeatures, audio
from mister_jax.data.pipeline import padded_batch
from mister_jax.encoders.speech import check_seconds
from mister_jax.errors import InputError
from mister_jax.evaluate import Predictions, Predictor, predicted_rows
from mister_jax.train import read_config
from mister_jax.writers import Reporter

FIELDS = ("audio", "audio_start", "audio_end", "text")
"""What an utterance may have, as in a manifest."""

# Experts that read each modality.
_READERS = {"speech": ("speech", "fusion"), "text": ("text", "fusion")}

_BATCH = 8  # dialogues
_SHORTEST = 8  # utterances to which dialogues are padded at least
_TOLD = 5  # recordings that are told of one by one

Utterance = Mapping[str, Any]
Places = str | Mapping[str, str] | None


@dataclasses.dataclass(frozen=True)
class _Checked:
    """An utterance whose fields are of the right kind; its sound a request or samples, or None."""

    text: str
    sound: audio.Request | np.ndarray | None


class System:
    """The encoders and the model of a training of MiSTER-E, loaded once.

    Args:
      workdir: of the training, on features that `launch.extract` has made.
      speech_encoder: where the speech encoder is now: a work directory, a folder, or a name on the
        Hugging Face Hub; where it was when the features were made if None. Of one that has further
        files, a dict of what has moved: see `extract.moved`.
      text_encoder: likewise.

    Raises:
      InputError: no work directory of MiSTER-E, one whose features were not made by encoders, or
        an encoder that cannot be loaded or is another one.
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
        self._widths = {"speech": task.model.speech_dim, "text": task.model.text_dim}
        places = {"speech": _by_part(speech_encoder), "text": _by_part(text_encoder)}
        self._encoders: dict[str, Any] = {}
        for modality, readers in _READERS.items():
            if modality in task.encoders and set(readers) & set(task.model.experts):
                identity = extract.moved(task.encoders[modality], places[modality])
                encoder = extract.encoder_of(identity)
                encoder.memory_remedy = "shorter utterances, or devices with more memory"
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
        """Predicts every utterance of some dialogues, each in the light of its own dialogue.

        Args:
          dialogues: utterances in the order in which they were said, each with "text", "audio" or
            both. Audio is a file of any format that FFmpeg reads, with "audio_start" and
            "audio_end" in seconds where the utterance is a part of it, or samples [s] at 16 kHz,
            int16 or floats of full scale 1. A file that cannot be read is logged, and its utterance
            taken as one without speech.
          max_seconds: of a recording that are read.
          num_workers: processes that decode files; 0 decodes in this one.
          quiet: show no progress.

        Returns:
          For each utterance what `evaluate.predicted_rows` describes.

        Raises:
          InputError: a dialogue or an utterance that cannot be used, or seconds that cannot be.
        """
        check_seconds(max_seconds)
        turns = []
        for number, dialogue in enumerate(dialogues, start=1):
            if not len(dialogue):
                raise InputError(f"dialogue {number}: no utterances; at least one is needed")
            for place, utterance in enumerate(dialogue, start=1):
                turns.append(_checked(utterance, f"dialogue {number}, utterance {place}"))
        if not turns:
            return []
        clips = _clips([turn.sound for turn in turns], max_seconds, num_workers, quiet)
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
            label=np.full(count, UNLABELLED, np.int32),
        )
        rows = predicted_rows(self.class_names, self._predictions(features, quiet))
        return [[next(rows) for _ in dialogue] for dialogue in dialogues]

    def _features(
        self, modality: str, items: Sequence[Any], quiet: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, F] of texts or clips, and which of them are there [N]."""
        nothing = np.zeros((len(items), self._widths[modality]), np.float32)
        absent = np.zeros(len(items), bool)
        if modality not in self._encoders:
            if any(map(len, items)):
                logging.warning("%s is not used: the model has no encoder of it", modality)
            return nothing, absent
        encoder = self._encoders[modality]
        # A clip may be silent; of items none of which is there, an encoder has no features.
        read = [item for item in encoder.input.items(items) if len(item)]
        if not read:
            return nothing, absent
        # A batch is as large as a few utterances need, by powers of 2: few programs.
        needed = 2 ** math.ceil(math.log2(max(1.0, encoder.input.amount(read))))
        budget = min(encoder.input.budget, needed)
        features, present = extract.features_of(encoder, items, budget=budget, quiet=quiet)
        if features.shape[1] != self._widths[modality]:
            raise InputError(
                f"{modality} encoder: features of width {features.shape[1]}; the model takes "
                f"{self._widths[modality]}"
            )
        return features, present

    def _predictions(self, features: DialogueFeatures, quiet: bool) -> Predictions:
        # Not by the task's batches: those take TensorFlow, whose start is longer than all the rest.
        planned = list(_plan(features.lengths, self._predictor.spread.num_shards))
        offsets = features.offsets
        batches = (padded_batch(features, offsets, rows, length) for rows, length in planned)
        return self._predictor.over(batches, len(planned), features, quiet=quiet)


def load(
    workdir: epath.PathLike,
    *,
    speech_encoder: Places = None,
    text_encoder: Places = None,
) -> System:
    """The `System` of a work directory, whose arguments these are.

    system = load("RUN")
    system.predict([{"audio": "1.wav", "text": "Hello?"}, {"text": "You again!"}])
    """
    return System(workdir, speech_encoder=speech_encoder, text_encoder=text_encoder)


def _by_part(places: Places) -> Mapping[str, str]:
    return {"encoder": places} if isinstance(places, str) else places or {}


def _checked(utterance: Any, where: str) -> _Checked:
    if not isinstance(utterance, Mapping):
        raise InputError(f"{where}: {type(utterance).__name__}; needed: a dict with audio or text")
    unknown = [name for name in utterance if name not in FIELDS]
    if unknown:
        raise InputError(f"{where}: unknown {unknown[0]!r}; allowed: {', '.join(FIELDS)}")
    text, sound = utterance.get("text"), utterance.get("audio")
    if text is None and sound is None:
        raise InputError(f"{where}: neither audio nor text; needed: one of them")
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: text {type(text).__name__}; allowed: str")
    start, end = utterance.get("audio_start"), utterance.get("audio_end")
    if isinstance(sound, str | os.PathLike):
        request: Any = audio.Request(os.fspath(sound), start, end)
    elif (start, end) != (None, None):
        raise InputError(f"{where}: audio_start and audio_end are of a file; cut the samples")
    else:
        request = None if sound is None else _samples(sound, where)
    return _Checked((text or "").strip(), request)


def _samples(sound: Any, where: str) -> np.ndarray:
    """Samples [s] int16 of an array."""
    samples = np.asarray(sound)
    if samples.ndim != 1 or not (samples.dtype == np.int16 or samples.dtype.kind == "f"):
        raise InputError(
            f"{where}: audio {samples.dtype} {list(samples.shape)}; allowed: a file, or samples "
            "[s] at 16 kHz, int16 or float"
        )
    if samples.dtype == np.int16:
        return samples
    if not np.isfinite(samples).all():
        raise InputError(f"{where}: audio is not finite; allowed: samples from -1 to 1")
    return np.clip(np.rint(samples * 2.0**15), -(2**15), 2**15 - 1).astype(np.int16)


def _clips(
    sounds: Sequence[audio.Request | np.ndarray | None],
    max_seconds: float,
    num_workers: int,
    quiet: bool,
) -> list[np.ndarray]:
    """Samples of each, none where there is no sound."""
    nothing = np.zeros(0, np.int16)
    most = round(max_seconds * audio.SAMPLE_RATE)
    files = [sound for sound in sounds if isinstance(sound, audio.Request)]
    decoded = audio.decode_many(files, num_workers=num_workers, max_seconds=max_seconds)
    clips, failures = [], []
    with Reporter(len(files), unit="recordings", quiet=quiet or not files) as reporter:
        for sound in sounds:
            if not isinstance(sound, audio.Request):
                clips.append(nothing if sound is None else sound[:most])
                continue
            clip = next(decoded)
            reporter.advance("decoding")
            if isinstance(clip, audio.AudioError):
                failures.append(clip)
                clips.append(nothing)
            else:
                clips.append(clip.samples)
    for failure in failures[:_TOLD]:
        logging.warning("%s; its utterance is taken as one without speech", failure)
    if len(failures) > _TOLD:
        logging.warning("%d of %d recordings cannot be used", len(failures), len(files))
    return clips


def _plan(lengths: np.ndarray, num_shards: int) -> Iterator[tuple[np.ndarray, int]]:
    """Dialogues [B] of each batch, -1 for an empty row, and its padded length.

    Lengths are padded to powers of 2, so that later calls find their program compiled.
    """
    padded = np.maximum(_SHORTEST, 2 ** np.ceil(np.log2(lengths)).astype(int))
    for length in np.unique(padded):
        members = np.flatnonzero(padded == length)
        size = -(-min(len(members), _BATCH) // num_shards) * num_shards
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            rows = np.full(size, -1, np.int32)
            rows[: len(chunk)] = chunk
            yield rows, int(length)
