"""Collects a split's labels and predictions as arrays over utterances."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mister_jax.models import EXPERTS

NO_VOTE = -1
"""Vote of an expert whose modality is missing. Without speech and text, all experts vote."""


@dataclasses.dataclass(frozen=True, eq=False)
class SplitPredictions:
    """Labels and predictions for one split.

    Attributes:
      dataset: Name of the dataset.
      split: Name of the split.
      class_names: Names of the C emotions.
      dialogue_ids: Ids of the M dialogues.
      dialogue_index: Index of each utterance's dialogue, [N] int.
      utterance_ids: Ids of the utterances, [N] str.
      label: True classes, [N] int, -1 for unlabeled utterances.
      predicted: Predicted classes, [N] int.
      probabilities: Class probabilities, [N, C].
      experts: Names of the E experts that are present for at least one utterance; empty if there
        are fewer than two.
      votes: Class that each expert predicts, [N, E] int; `NO_VOTE` if the utterance lacks
        the expert's modality.
      gate: Gate weights, [N, E]; None if the model does not learn them.
      without_gate: Class predicted by the mean of the experts' logits, [N] int; None if the model
        does not learn gate weights.
      group_index: Index of each utterance's group, such as its speaker, [N] int. Confidence
        intervals resample groups instead of dialogues. None without groups.
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
    without_gate: np.ndarray | None = None
    group_index: np.ndarray | None = None

    @classmethod
    def from_features(
        cls, features: Any, predictions: Mapping[str, np.ndarray]
    ) -> SplitPredictions:
        """Combines `DialogueFeatures` or `Utterances` with the predictions of a `Predictor`."""
        names = np.repeat(np.array(features.dialogue_ids, str), features.lengths)
        # `Utterances` have one dialogue id per utterance, and may interleave dialogues.
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
            without_gate=None if gate is None else predict_without_gate(predictions),
        )

    @property
    def labeled(self) -> np.ndarray:
        """Whether the utterance has a label, [N] bool."""
        return self.label >= 0

    @property
    def wrong(self) -> np.ndarray:
        """Whether the utterance has a label that differs from the prediction, [N] bool."""
        return self.labeled & (self.label != self.predicted)


def group_index(rows: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Returns the index of each row's "group", [N] int; None if the rows have no groups."""
    if not all("group" in row for row in rows):
        return None
    return np.unique([row["group"] for row in rows], return_inverse=True)[1]


def predict_without_gate(predictions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the class with the largest mean logit over the present experts, [N] int.

    Log-probabilities are summed. For each expert and utterance, they differ from the logits by a
    constant, which does not change the class.
    """
    log_p = np.log(np.maximum(predictions["expert_probabilities"], 1e-30))  # N E C
    return np.where(predictions["expert_present"][..., None], log_p, 0).sum(1).argmax(-1)


def _expert_outputs(
    predictions: Mapping[str, np.ndarray],
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """Returns the names, votes and gate weights of the experts that are present in the split.

    A single expert is identical to the model, so this expert is not listed.
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
    # Unlike an even mixture's weights, learned weights differ between utterances with the same
    # present experts.
    is_learned = any(
        np.ptp(gate[(present == pattern).all(1)], axis=0).max() > 1e-4
        for pattern in np.unique(present, axis=0)
    )
    return tuple(EXPERTS[index] for index in in_use), votes, gate if is_learned else None
