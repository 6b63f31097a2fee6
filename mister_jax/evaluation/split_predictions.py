"""The labels and predictions of one split, as arrays over its utterances."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mister_jax.models import EXPERTS

NO_VOTE = -1
"""The vote of an expert whose modality is missing."""


@dataclasses.dataclass(frozen=True, eq=False)
class SplitPredictions:
    """One split with its labels and predictions.

    Attributes:
      class_names: Names of the C emotions.
      dialogue_ids: Ids of the M dialogues, in order of first appearance.
      dialogue_index: Index of the dialogue of each of N utterances, [N] int.
      utterance_ids: Ids of the utterances, [N] str.
      label: True classes, [N] int, -1 for unlabeled utterances.
      predicted: Predicted classes, [N] int.
      probabilities: Class probabilities, [N, C].
      experts: Names of the E experts, empty if the model has fewer than two.
      votes: Class predicted by each expert, [N, E] int, `NO_VOTE` if its modality is missing.
      gate: Gate weights, [N, E], or None if the model does not learn them.
    """

    dataset: str
    split: str
    class_names: tuple[str, ...]
    dialogue_ids: tuple[str, ...]
    dialogue_index: np.ndarray
    utterance_ids: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    experts: tuple[str, ...]
    votes: np.ndarray
    gate: np.ndarray | None

    @classmethod
    def from_features(
        cls, features: Any, predictions: Mapping[str, np.ndarray]
    ) -> SplitPredictions:
        """Combines `DialogueFeatures` or `Utterances` of a split with `Predictor`'s predictions."""
        names = np.repeat(np.array(features.dialogue_ids, str), features.lengths)
        # `Utterances` list a dialogue id once per utterance, in any order.
        ids, first, index = np.unique(names, return_index=True, return_inverse=True)
        order = np.argsort(first)
        experts, votes, gate = _expert_outputs(predictions)
        return cls(
            dataset=features.name,
            split=features.split,
            class_names=tuple(features.class_names),
            dialogue_ids=tuple(ids[order].tolist()),
            dialogue_index=np.argsort(order)[index],
            utterance_ids=features.utterance_ids,
            label=np.asarray(features.label),
            predicted=predictions["probabilities"].argmax(-1),
            probabilities=predictions["probabilities"],
            experts=experts,
            votes=votes,
            gate=gate,
        )

    @property
    def labeled(self) -> np.ndarray:
        """Whether each utterance has a label, [N] bool."""
        return self.label >= 0

    @property
    def wrong(self) -> np.ndarray:
        """Whether each utterance is labeled and its prediction is wrong, [N] bool."""
        return self.labeled & (self.label != self.predicted)


def _expert_outputs(
    predictions: Mapping[str, np.ndarray],
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """Returns the names, votes and gate weights of the experts in use.

    A single expert is the model itself, so it is not listed.
    """
    no_experts = (), np.zeros((len(predictions["probabilities"]), 0), int), None
    if "gate" not in predictions:
        return no_experts
    present = predictions["expert_present"]
    in_use = np.flatnonzero(present.any(0))
    if len(in_use) < 2:
        return no_experts
    present = present[:, in_use]
    gate = predictions["gate"][:, in_use]
    votes = np.where(present, predictions["expert_probabilities"][:, in_use].argmax(-1), NO_VOTE)
    # Fixed weights, such as an even mixture, depend only on which experts are present.
    is_learned = any(
        np.ptp(gate[(present == pattern).all(1)], axis=0).max() > 1e-4
        for pattern in np.unique(present, axis=0)
    )
    return tuple(EXPERTS[index] for index in in_use), votes, gate if is_learned else None
