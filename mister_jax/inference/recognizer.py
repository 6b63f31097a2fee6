"""Recognizes emotions in recordings and texts, with the encoders and model of a training run."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from huggingface_hub import ModelHubMixin

from mister_jax import extraction
from mister_jax.data import SAMPLE_RATE, UNLABELED, DialogueFeatures
from mister_jax.data.adaptation import adapt_or_warn, check_adaptable
from mister_jax.data.batching import plan_inference_batches
from mister_jax.data.padding import pad_dialogues
from mister_jax.data.schema import MODALITIES
from mister_jax.encoders.speech import check_seconds
from mister_jax.errors import InputError
from mister_jax.extraction.encoder import encode_items
from mister_jax.inference import utterance_inputs
from mister_jax.inference.export import write_model
from mister_jax.inference.published import PublishedModels
from mister_jax.inference.recordings import RecordingUtterances, find_utterances
from mister_jax.inference.speech_recognition import detect_voice_activity
from mister_jax.inference.streaming import DialogueStream
from mister_jax.inference.utterance_inputs import NOTE_KINDS, CheckedUtterance, Utterance
from mister_jax.predictor import check_min_confidence, prediction_rows
from mister_jax.pretrained import DEFAULT_MODEL, load_mister_e

# Decoded speech is collected until it has at least this many seconds, and is then encoded. 1200 s
# take 38 MB as int16.
_GROUP_SECONDS = 1200.0

MAX_CONTEXT = 128
"""Maximum number of a dialogue's utterances that are predicted together; see `_sections`."""

NewPaths = str | Mapping[str, str] | None
"""New path of an encoder that has moved, or of its parts by name: "encoder", "adapter", "whisper",
"beats", "vicuna"."""


class EmotionRecognizer(ModelHubMixin):
    """The encoders and the model of MiSTER-E, loaded once.

    The dataset of the training run is not needed: the run and its exported bundle record which
    encoders extracted the features.

    `save_pretrained(FOLDER)` and `push_to_hub("OWNER/NAME")` write a bundle; see
    `huggingface_hub.ModelHubMixin`.

    Args:
      model: Work directory of a run trained on features from `mister-jax extract`, bundle from
        `mister-jax export`, name of a model in this package, or name on the Hugging Face Hub; see
        `pretrained.find_model`.
      speech_encoder: New path of the speech encoder, if it has moved: a work directory, a folder,
        or a name on the Hugging Face Hub. For an encoder in several parts, a dict of the parts
        that have moved; see `extraction.with_new_paths`.
      text_encoder: New path of the text encoder.
      calibrate: Whether to calibrate the probabilities, if the model has a calibration.
      adapt_features: Whether to adapt features to the model. Each call of a method adapts the
        features of its own utterances; see `data.adaptation.adapt_features`.

    Raises:
      InputError: The MiSTER-E model does not exist or is damaged, the encoders of its features are
        unknown, an encoder cannot be loaded or has changed, or the features cannot be adapted.
    """

    def __init__(
        self,
        model: epath.PathLike = DEFAULT_MODEL,
        *,
        speech_encoder: NewPaths = None,
        text_encoder: NewPaths = None,
        calibrate: bool = True,
        adapt_features: bool = False,
    ):
        self._predictor = load_mister_e(model, calibrate=calibrate)
        self._adapt_features = adapt_features
        task = self._predictor.task
        if adapt_features:
            check_adaptable(task.standardizers)
        self.class_names: tuple[str, ...] = task.class_names
        self._feature_dims = {"speech": task.model.speech_dim, "text": task.model.text_dim}
        new_paths = {"speech": _by_part(speech_encoder), "text": _by_part(text_encoder)}
        self._encoders: dict[str, Any] = {}
        for modality in MODALITIES:
            if modality in task.encoders and modality in task.used_modalities:
                metadata = extraction.with_new_paths(task.encoders[modality], new_paths[modality])
                encoder = extraction.encoder_from_metadata(metadata)
                encoder.oom_hint = "shorter utterances, or devices with more memory"
                self._encoders[modality] = encoder
            elif new_paths[modality]:
                raise InputError(
                    f"--{modality}_encoder={', '.join(new_paths[modality].values())}: {model} "
                    f"uses no {modality} encoder; omit this option"
                )
        self._warned_of_window = False
        if not self._encoders:
            raise InputError(
                f"{model}: trained on ready-made features, so recordings and texts cannot be "
                "read; needed: a model trained on features from mister-jax extract"
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, model: epath.PathLike = DEFAULT_MODEL, *, revision: str | None = None, **options: Any
    ) -> EmotionRecognizer:
        """Loads a recognizer.

        Args:
          model: See `EmotionRecognizer`.
          revision: Branch, tag or commit of a model on the Hugging Face Hub.
          **options: Further arguments of `EmotionRecognizer`.
        """
        return cls(f"{model}@{revision}" if revision else model, **options)

    @staticmethod
    def from_models(
        *, text: str | None = None, speech: str | None = None, **options: Any
    ) -> EmotionRecognizer:
        """Combines published text and speech classifiers, without training.

        recognizer = EmotionRecognizer.from_models(text="OWNER/TEXT", speech="OWNER/SPEECH")

        The predicted rows have the same keys as MiSTER-E's rows: "experts" contains the models'
        predicted emotions, and "gate" contains the models' weights. Unlike MiSTER-E, the models do
        not read the context of an utterance.

        Args:
          text: Checkpoint for sequence classification, a folder or a name on the Hub.
          speech: Checkpoint for audio classification.
          **options: Further arguments of `published.PublishedModels`.

        Raises:
          InputError: See `published.PublishedModels`.
        """
        return _PublishedRecognizer(PublishedModels(text=text, speech=speech, **options))

    def _save_pretrained(self, save_directory: pathlib.Path) -> None:
        """Writes a bundle; see `save_pretrained` of `huggingface_hub.ModelHubMixin`."""
        write_model(self._predictor, pathlib.Path(save_directory))

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that the recognizer reads."""
        return tuple(self._encoders)

    def predict(
        self,
        utterances: Sequence[Utterance],
        *,
        max_seconds: float = 60.0,
        min_confidence: float | None = None,
        quiet: bool = True,
    ) -> list[dict[str, Any]]:
        """Predicts the emotions of one dialogue's utterances; see `predict_dialogues`."""
        (rows,) = self.predict_dialogues(
            [utterances], max_seconds=max_seconds, min_confidence=min_confidence, quiet=quiet
        )
        return rows

    def predict_dialogues(
        self,
        dialogues: Sequence[Sequence[Utterance]],
        *,
        max_seconds: float = 60.0,
        min_confidence: float | None = None,
        num_workers: int = 0,
        quiet: bool = True,
    ) -> list[list[dict[str, Any]]]:
        """Predicts the emotion of every utterance in one or more dialogues.

        The context of an utterance is its dialogue. Dialogues of more than `MAX_CONTEXT` utterances
        are predicted in overlapping sections, as are recordings.

        Args:
          dialogues: Dialogues. A dialogue is a list of its utterances in order, and an utterance is
            a dict with "text", "audio" or both. Audio is a file in any format that FFmpeg reads, or
            an array of samples [S] at 16 kHz, either int16 or floats with full scale 1.
            "audio_start" and "audio_end", in seconds, select a segment of a file. If these keys are
            missing, "start" and "end" select the segments of utterances that share a file.
            "audio_channel" is "mix", "left", "right" or an index. The other fields of a manifest
            are allowed and do not affect the prediction. An unusable file is logged, and its
            utterance is predicted without speech.
          max_seconds: Maximum number of seconds to read from each utterance's speech.
          min_confidence: Probability below which predictions are marked as "uncertain".
          num_workers: Number of processes that decode files; 0 decodes in this process.
          quiet: Whether to hide progress.

        Returns:
          A list for each dialogue, with a dict for each utterance: the values of
          `predictor.prediction_rows`, and "notes" on the utterance, a list of texts that start with
          the kind of note, such as "capped: ...".

        Raises:
          InputError: A dialogue or an utterance cannot be used, no utterance has a modality that
            the model reads, or `max_seconds` or `min_confidence` is invalid.
        """
        checked = utterance_inputs.check_utterances(dialogues)
        if checked and not any(map(self._is_readable, checked)):
            raise InputError(
                f"no utterance has {' or '.join(self._encoders)}, and the model reads nothing else"
            )
        rows = iter(
            self._predict(
                checked,
                list(map(len, dialogues)),
                max_seconds=max_seconds,
                min_confidence=min_confidence,
                num_workers=num_workers,
                quiet=quiet,
            )
        )
        return [[next(rows) for _ in dialogue] for dialogue in dialogues]

    def _is_readable(self, utterance: CheckedUtterance) -> bool:
        """Returns whether an utterance has a modality that the model reads."""
        has_speech, has_text = utterance.speech is not None, bool(utterance.text.strip())
        return (has_speech and "speech" in self._encoders) or (
            has_text and "text" in self._encoders
        )

    def _predict(
        self,
        utterances: Sequence[CheckedUtterance],
        lengths: Sequence[int],
        *,
        max_seconds: float,
        min_confidence: float | None = None,
        num_workers: int = 0,
        quiet: bool,
    ) -> list[dict[str, Any]]:
        """Predicts the emotion of every utterance; see `predict_dialogues`.

        `lengths` contains the number of utterances in each dialogue.
        """
        self._check_options(max_seconds, min_confidence)
        if not utterances:
            return []
        encoded, notes = self._encode_utterances(utterances, max_seconds, num_workers, quiet)
        windows, sections = [], []
        for dialogue in _consecutive_ranges(lengths):
            for (begin, end), (first, stop) in _sections(len(dialogue)):
                windows.append(dialogue[first:stop])
                sections.append(slice(begin - first, end - first))
        window_rows = iter(self._predict_encoded(encoded, windows, min_confidence, quiet))
        rows: list[dict[str, Any]] = []
        for window, section in zip(windows, sections, strict=True):
            rows += [next(window_rows) for _ in window][section]
        return [{**row, "notes": note} for row, note in zip(rows, notes, strict=True)]

    def _predict_encoded(
        self,
        encoded: Mapping[str, np.ndarray],
        dialogues: Sequence[np.ndarray],
        min_confidence: float | None,
        quiet: bool,
    ) -> list[dict[str, Any]]:
        """Predicts the emotions of encoded utterances; the rows have no notes.

        `dialogues` contains the indices of the utterances in each dialogue. An utterance may be in
        several dialogues.
        """
        indices = np.concatenate(dialogues)
        features = DialogueFeatures(
            name="recordings",
            split="test",  # DialogueFeatures requires one of the splits.
            class_names=self.class_names,
            dialogue_ids=tuple(map(str, range(len(dialogues)))),
            lengths=np.array(list(map(len, dialogues))),
            utterance_ids=indices.astype(str),
            **{name: values[indices] for name, values in encoded.items()},
            label=np.full(len(indices), UNLABELED, np.int32),
        )
        standardizers = self._predictor.task.standardizers
        features = adapt_or_warn(features, standardizers, self._adapt_features)
        num_shards = self._predictor.partitioner.num_shards
        plan = list(plan_inference_batches(features.lengths, num_shards=num_shards))
        batches = (pad_dialogues(features, *planned) for planned in plan)
        outputs = self._predictor.predict_batches(batches, len(plan), features, quiet=quiet)
        return list(prediction_rows(self.class_names, outputs, min_confidence))

    def predict_recording(
        self,
        recording: str | os.PathLike[str],
        *,
        max_seconds: float = 60.0,
        min_confidence: float | None = None,
        quiet: bool = True,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Predicts the emotion of every utterance of a recording, as one conversation.

        recognizer.predict_recording("call.mp3")
        recognizer.predict_recording("call.mp3", transcript="call.srt", channels="split")

        Args:
          recording: Audio or video file in any format that FFmpeg reads.
          max_seconds: Maximum number of seconds to read from each utterance's speech.
          min_confidence: Probability below which predictions are marked as "uncertain".
          quiet: Whether to hide progress.
          **options: Options of `recordings.find_utterances`, such as `transcript`.

        Returns:
          For each utterance, a dict with "recording", "utterance", "start" and "end" in seconds,
          "speaker", "text", "label" (annotated in the transcript), "emotion", "probabilities",
          "experts", "gate" and "notes".

        Raises:
          InputError: The recording or its transcript cannot be used, or the recording has no speech
            or text that the model can read.
        """
        utterances = self.find_utterances(recording, quiet=quiet, **options)
        return self.predict_utterances(
            utterances, max_seconds=max_seconds, min_confidence=min_confidence, quiet=quiet
        )

    def find_utterances(
        self, recording: str | os.PathLike[str], **options: Any
    ) -> RecordingUtterances:
        """Finds the utterances of a recording; see `recordings.find_utterances`.

        If the model does not read text, voice activity detection is the default recognizer.
        """
        reads_text = "text" in self._encoders
        if not reads_text and options.get("recognizer") is None:
            options["recognizer"] = detect_voice_activity
        utterances = find_utterances(recording, **options)
        if "speech" not in self._encoders and not any(it.text for it in utterances.segments):
            raise InputError(
                f"{utterances.recording}: no text from {utterances.origin}, and the model reads "
                "only text; needed: a transcript or a speech recognizer"
            )
        return utterances

    def predict_utterances(
        self,
        utterances: RecordingUtterances,
        *,
        max_seconds: float = 60.0,
        min_confidence: float | None = None,
        quiet: bool = True,
    ) -> list[dict[str, Any]]:
        """Predicts the emotions of utterances from `find_utterances`; see `predict_recording`."""
        recording = utterances.recording
        inputs = [
            {
                "text": segment.text,
                "audio": recording,
                "audio_start": segment.start,
                "audio_end": segment.end,
                "audio_channel": segment.channel,
            }
            for segment in utterances.segments
        ]
        # Notes on times are in `segment_notes`.
        checked = [
            dataclasses.replace(it, annotated_seconds=None)
            for it in utterance_inputs.check_utterances([inputs])
        ]
        rows = self._predict(
            checked,
            [len(checked)],
            max_seconds=max_seconds,
            min_confidence=min_confidence,
            quiet=quiet,
        )
        predictions = []
        for number, (segment, notes, row) in enumerate(
            zip(utterances.segments, utterances.segment_notes, rows, strict=True), start=1
        ):
            predictions.append(
                {
                    "recording": recording,
                    "utterance": str(number),
                    "start": round(segment.start, 3),
                    "end": max(round(segment.end, 3), round(segment.start + 0.001, 3)),
                    "speaker": segment.speaker,
                    "text": segment.text,
                    "label": segment.label,
                    **row,
                    "notes": [*(f"{utterance_inputs.NOTE}: {it}" for it in notes), *row["notes"]],
                }
            )
        return predictions

    def stream(
        self, *, window: int = 32, max_seconds: float = 60.0, min_confidence: float | None = None
    ) -> DialogueStream:
        """Returns a stream that predicts a live dialogue, one utterance at a time.

        stream = recognizer.stream()
        stream.predict({"text": "Hello?"})
        stream.predict({"text": "You again!", "audio": "2.wav"})

        With a causal model, each of the first `MAX_CONTEXT` predictions equals the prediction of
        `predict` for the dialogue up to the new utterance, and the time per utterance is constant.
        With any other model, the stream logs a warning and rereads the last `window` utterances for
        every new utterance.

        Args:
          window: Number of utterances in the window of a model that is not causal.
          max_seconds: Maximum number of seconds to read from each utterance's speech.
          min_confidence: Probability below which predictions are marked as "uncertain".

        Raises:
          InputError: `window`, `max_seconds` or `min_confidence` is out of range, or the recognizer
            adapts features.
        """
        check_seconds(max_seconds)
        check_min_confidence(min_confidence)
        if window < 1:
            raise InputError(f"window={window}; allowed: at least 1")
        if self._adapt_features:
            raise InputError(
                "adapt_features: a stream has no utterances to adapt to; needed: a recording or a "
                "dialogue"
            )

        def encode(utterance: Utterance) -> tuple[dict[str, np.ndarray], list[str]]:
            checked = utterance_inputs.check_utterance(utterance)
            encoded, (notes,) = self._encode_utterances([checked], max_seconds, 0, quiet=True)
            return encoded, notes

        stream = DialogueStream(self._predictor, encode, window, min_confidence)
        if not stream.is_exact and not self._warned_of_window:
            self._warned_of_window = True
            logging.warning(
                "the model is not causal, so a stream reads the last %d utterances again for each "
                "prediction; for exact live predictions, train a model with "
                "--config.model.causal=True",
                window,
            )
        return stream

    def _check_options(self, max_seconds: float, min_confidence: float | None) -> None:
        check_seconds(max_seconds)
        check_min_confidence(min_confidence)

    def _encode_utterances(
        self,
        utterances: Sequence[CheckedUtterance],
        max_seconds: float,
        num_workers: int,
        quiet: bool,
    ) -> tuple[dict[str, np.ndarray], list[list[str]]]:
        """Returns the features of N utterances by name, [N, ...], and notes on each utterance."""
        speech, speech_present, notes = self._encode_speech(
            utterances, max_seconds, num_workers, quiet
        )
        text, text_present = self._encode_text(utterances, notes, quiet)
        for index in np.flatnonzero(~(speech_present | text_present)):
            modalities = " and no ".join(self._encoders)
            notes[index].append(
                f"{utterance_inputs.NO_INPUT}: no {modalities} that the model can read"
            )
        features = {
            "speech": speech,
            "text": text,
            "speech_present": speech_present,
            "text_present": text_present,
        }
        return features, notes

    def _encode_speech(
        self,
        utterances: Sequence[CheckedUtterance],
        max_seconds: float,
        num_workers: int,
        quiet: bool,
    ) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
        """Returns speech features [N, F], presence flags [N], and notes.

        Speech is decoded and encoded in groups of about `_GROUP_SECONDS`, so memory does not
        grow with the length of a recording.
        """
        features, present = self._no_features("speech", len(utterances))
        notes: list[list[str]] = [[] for _ in utterances]
        if "speech" not in self._encoders:
            if any(utterance.speech is not None for utterance in utterances):
                logging.warning("speech is not used: the model has no speech encoder")
            return features, present, notes
        order = utterance_inputs.reading_order(utterances)
        decoded = utterance_inputs.decode_speech(
            [utterances[index] for index in order], max_seconds, num_workers, quiet
        )
        group: dict[int, np.ndarray] = {}
        num_samples = 0
        for index, (clip, clip_notes) in zip(order, decoded, strict=True):
            group[index] = clip
            num_samples += len(clip)
            notes[index] = clip_notes + self._length_notes(clip)
            if num_samples >= _GROUP_SECONDS * SAMPLE_RATE or index == order[-1]:
                indices = list(group)
                items = self._encoders["speech"].input.items(list(group.values()))
                features[indices], present[indices] = self._encode_items("speech", items, quiet)
                group, num_samples = {}, 0
        return features, present, notes

    def _encode_text(
        self, utterances: Sequence[CheckedUtterance], notes: Sequence[list[str]], quiet: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns text features [N, F] and presence flags [N], and notes truncated texts."""
        texts = [it.text for it in utterances]
        if "text" not in self._encoders:
            if any(texts):
                logging.warning("text is not used: the model has no text encoder")
            return self._no_features("text", len(texts))
        truncated: list[int] = []
        text_input: Any = self._encoders["text"].input
        items = text_input.items(texts, truncated)
        for index in truncated:
            limit = text_input.max_length
            notes[index].append(f"{utterance_inputs.CUT}: it reads {limit} tokens of the text")
        return self._encode_items("text", items, quiet)

    def _length_notes(self, clip: np.ndarray) -> list[str]:
        """Returns a note if the speech encoder does not read a clip [S] to the end."""
        max_samples = self._encoders["speech"].input.max_samples
        if max_samples is None or len(clip) <= max_samples:
            return []
        seconds, limit = len(clip) / SAMPLE_RATE, max_samples / SAMPLE_RATE
        return [f"{utterance_inputs.CUT}: {seconds:.1f} s, of which it reads {limit:g} s"]

    def _no_features(self, modality: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the features and presence flags of utterances that lack the modality."""
        return np.zeros((count, self._feature_dims[modality]), np.float32), np.zeros(count, bool)

    def _encode_items(
        self, modality: str, items: Sequence[np.ndarray], quiet: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the features of an encoder's items, [N, F], and presence flags, [N]."""
        features, present = self._no_features(modality, len(items))
        present |= [len(item) > 0 for item in items]
        if not present.any():
            return features, present
        encoder = self._encoders[modality]
        encodable = [item for item in items if len(item)]
        # If there are few utterances, use smaller batches. Their `budget`, the maximum number of
        # tokens or seconds, is a power of 2, so that few batch shapes are compiled.
        needed = 2 ** math.ceil(math.log2(max(1.0, encoder.input.num_units(encodable))))
        budget = min(encoder.input.budget, needed)
        encoded = encode_items(encoder, encodable, budget, quiet=quiet)
        if encoded.shape[1] != features.shape[1]:
            raise InputError(
                f"{modality} encoder: features of width {encoded.shape[1]}; the model takes "
                f"{features.shape[1]}"
            )
        features[present] = encoded
        return features, present


class _PublishedRecognizer(EmotionRecognizer):
    """Recognizer that uses `PublishedModels` instead of MiSTER-E."""

    def __init__(self, models: PublishedModels):
        self._models = models
        self.class_names = models.class_names
        self._encoders = dict(models.encoders)
        self._feature_dims = models.feature_dims

    def _save_pretrained(self, save_directory: pathlib.Path) -> None:
        raise InputError(
            f"{save_directory}: published models cannot be saved together; load them by their "
            "names with EmotionRecognizer.from_models"
        )

    def stream(self, **options: Any) -> DialogueStream:
        """Raises InputError, because the models read each utterance separately."""
        raise InputError(
            "published models read utterances without their context, so they have no stream; "
            "call predict for each utterance instead"
        )

    def _predict_encoded(
        self,
        encoded: Mapping[str, np.ndarray],
        dialogues: Sequence[np.ndarray],
        min_confidence: float | None,
        quiet: bool,
    ) -> list[dict[str, Any]]:
        outputs = self._models.combine(encoded)
        rows = list(prediction_rows(self.class_names, outputs, min_confidence))
        return [rows[index] for index in np.concatenate(dialogues)]


def _consecutive_ranges(lengths: Iterable[int]) -> list[np.ndarray]:
    """Returns consecutive ranges with the given lengths."""
    ends = np.cumsum(list(lengths))
    return np.split(np.arange(ends[-1]), ends[:-1]) if len(ends) else []


def _sections(num_utterances: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yields the range of each section of a long conversation, and the range of its context.

    Models are trained on dialogues of up to about a hundred utterances, and attention over all
    utterances takes quadratic memory. Conversations longer than `MAX_CONTEXT` are therefore
    predicted in sections. A section's context is the section itself and the `MAX_CONTEXT` / 4
    utterances before and after it.
    """
    if num_utterances <= MAX_CONTEXT:
        yield (0, num_utterances), (0, num_utterances)
        return
    margin = MAX_CONTEXT // 4
    for begin in range(0, num_utterances, MAX_CONTEXT // 2):
        end = min(begin + MAX_CONTEXT // 2, num_utterances)
        yield (begin, end), (max(0, begin - margin), min(num_utterances, end + margin))


def load(model: epath.PathLike = DEFAULT_MODEL, **options: Any) -> EmotionRecognizer:
    """Loads an `EmotionRecognizer`, with the same arguments.

    recognizer = load("RUN")
    recognizer.predict([{"audio": "1.wav", "text": "Hello?"}, {"text": "You again!"}])
    """
    return EmotionRecognizer(model, **options)


def summarize_notes(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns the number of utterances for each kind of note in one line, or "" without notes."""
    counts = collections.Counter(
        kind for row in rows for kind in {note.partition(":")[0] for note in row["notes"]}
    )
    return ", ".join(f"{counts[kind]} {kind}" for kind in NOTE_KINDS if counts[kind])


def is_unusable(note: str) -> bool:
    """Returns whether a note says that a recording could not be used."""
    return note.startswith(utterance_inputs.UNUSABLE)


def _by_part(new_paths: NewPaths) -> Mapping[str, str]:
    return {"encoder": new_paths} if isinstance(new_paths, str) else new_paths or {}
