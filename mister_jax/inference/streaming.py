"""Predicts live dialogues, one utterance at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mister_jax.data import UNLABELED, DialogueFeatures
from mister_jax.data.padding import pad_dialogues
from mister_jax.inference.utterance_inputs import Utterance
from mister_jax.predictor import Predictions, Predictor, prediction_rows

Features = dict[str, Any]
"""Arrays with the features of one utterance: "speech" [1, D], "text" [1, D],
"speech_present" [1] and "text_present" [1]."""


class DialogueStream:
    """Predicts one dialogue, utterance by utterance; see `EmotionRecognizer.stream`.

    Args:
      predictor: Predictor of a MiSTER-E model.
      encode: Function that returns the features of an utterance and notes on its recording.
      window: Number of utterances, including the new one, that a noncausal model reads for every
        prediction.
      min_confidence: Probability below which predictions are marked as "uncertain".

    Attributes:
      is_exact: Whether the model is causal. The predictions of a causal model depend on the whole
        dialogue up to the utterance, and equal the predictions of `EmotionRecognizer.predict`.
      num_utterances: Number of utterances of the dialogue so far.
    """

    def __init__(
        self,
        predictor: Predictor,
        encode: Callable[[Utterance], tuple[Features, list[str]]],
        window: int = 32,
        min_confidence: float | None = None,
    ):
        self._predictor = predictor
        self._encode = encode
        self._window = window
        self._min_confidence = min_confidence
        self.is_exact: bool = predictor.task.model.causal
        self.reset()

    def reset(self) -> None:
        """Starts a new dialogue."""
        self.num_utterances = 0
        self._states = self._predictor.initial_states() if self.is_exact else []
        self._recent: list[Features] = []

    def predict(self, utterance: Utterance) -> dict[str, Any]:
        """Predicts the next utterance of the dialogue.

        Args:
          utterance: Utterance as in `EmotionRecognizer.predict_dialogues`. Only "audio_start" and
            "audio_end", not "start" and "end", select a segment of the recording.

        Returns:
          The values that `EmotionRecognizer.predict` returns for an utterance.

        Raises:
          InputError: The utterance cannot be used. The dialogue continues without this utterance.
        """
        features, notes = self._encode(utterance)
        return {**self.predict_features(features), "notes": notes}

    def predict_features(self, features: Features) -> dict[str, Any]:
        """Predicts the next utterance of the dialogue from the utterance's features.

        Args:
          features: Features of the utterance before standardization.

        Returns:
          The values of `predictor.prediction_rows`.
        """
        if self.is_exact:
            self._states, predictions = self._predictor.predict_step(self._states, features)
        else:
            recent = [*self._recent, features][-self._window :]
            predictions = self._predict_last(recent)
            self._recent = recent
        self.num_utterances += 1
        class_names = self._predictor.task.class_names
        (row,) = prediction_rows(class_names, predictions, self._min_confidence)
        return row

    def _predict_last(self, recent: list[Features]) -> Predictions:
        """Predicts the last utterance of a dialogue of recent utterances, padded to the window."""
        length = len(recent)
        features: dict[str, Any] = {
            name: np.concatenate([it[name] for it in recent]) for name in recent[0]
        }
        dialogue = DialogueFeatures(
            name="stream",
            split="test",  # DialogueFeatures requires one of the splits.
            class_names=self._predictor.task.class_names,
            dialogue_ids=("0",),
            lengths=np.array([length]),
            utterance_ids=np.arange(length).astype(str),
            label=np.full(length, UNLABELED, np.int32),
            **features,
        )
        rows = np.full(self._predictor.partitioner.num_shards, -1, np.int32)
        rows[0] = 0
        batches = [pad_dialogues(dialogue, rows, self._window)]
        predictions = self._predictor.predict_batches(batches, 1, dialogue, quiet=True)
        return {name: values[-1:] for name, values in predictions.items()}
