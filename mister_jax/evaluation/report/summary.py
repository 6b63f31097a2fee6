"""The numbers of a report: scores with intervals, calibration, what the gate does.

Letters: M dialogues, N utterances, E experts in use, C classes, R draws of the bootstrap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mister_jax import metrics
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.errors import InputError
from mister_jax.models import EXPERTS

DRAWS = 1000
SEED = 0
MISSING = -1  # the vote of an expert that has no modality to vote from


@dataclasses.dataclass(frozen=True)
class Score:
    """A number and, where dialogues can be drawn, the ends of its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class SplitPredictions:
    """A split and what was predicted for it.

    Attributes:
      dataset: its name.
      split: of it.
      class_names: C emotions.
      dialogue_ids: M ids, in order of appearance.
      dialogue: [N] int, of each utterance.
      utterance_ids: [N] str.
      label: [N] int, -1 where there is none.
      predicted: [N] int.
      probabilities: [N, C].
      experts: E names, empty where no experts voted.
      votes: [N, E] int, `MISSING` where an expert has no modality.
      gate: [N, E], or None where the weights are not the model's own choice.
    """

    dataset: str
    split: str
    class_names: tuple[str, ...]
    dialogue_ids: tuple[str, ...]
    dialogue: np.ndarray
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
        """From a task's features and the arrays of `evaluate.Predictor`."""
        names = np.repeat(np.array(features.dialogue_ids, str), features.lengths)
        # Features of single utterances name a dialogue once for each of its utterances.
        ids, first, dialogue = np.unique(names, return_index=True, return_inverse=True)
        order = np.argsort(first)
        experts, votes, gate = _experts(predictions)
        return cls(
            dataset=features.name,
            split=features.split,
            class_names=tuple(features.class_names),
            dialogue_ids=tuple(ids[order].tolist()),
            dialogue=np.argsort(order)[dialogue],
            utterance_ids=features.utterance_ids,
            label=np.asarray(features.label),
            predicted=predictions["probabilities"].argmax(-1),
            probabilities=predictions["probabilities"],
            experts=experts,
            votes=votes if experts else np.zeros((len(names), 0), int),
            gate=gate,
        )

    @property
    def labeled(self) -> np.ndarray:
        """[N] bool."""
        return self.label >= 0

    @property
    def wrong(self) -> np.ndarray:
        """[N] bool, labeled and predicted otherwise."""
        return self.labeled & (self.label != self.predicted)


def _experts(
    predictions: Mapping[str, np.ndarray],
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """Names, votes and gate of the experts in use; none of one alone, which is the model."""
    nothing: tuple[str, ...] = ()
    if "gate" not in predictions:
        return nothing, np.zeros((0, 0), int), None
    present = predictions["expert_present"]
    in_use = np.flatnonzero(present.any(0))
    if len(in_use) < 2:
        return nothing, np.zeros((0, 0), int), None
    present = present[:, in_use]
    gate = predictions["gate"][:, in_use]
    votes = np.where(present, predictions["expert_probabilities"][:, in_use].argmax(-1), MISSING)
    # An even mixture and a vote give the same weights wherever the same experts are there.
    chosen = any(
        np.ptp(gate[(present == pattern).all(1)], axis=0).max() > 1e-4
        for pattern in np.unique(present, axis=0)
    )
    return tuple(EXPERTS[index] for index in in_use), votes, gate if chosen else None


def read_utterance_texts(features: Any, data_dir: epath.PathLike | None = None) -> dict[str, str]:
    """What was said, by utterance id; empty where it is not known.

    Texts are read from the dataset of dialogues that the features say they were made from, or that
    they are of.

    Args:
      features: of a task.
      data_dir: the directory that holds datasets; that of TFDS when None.
    """
    told = features.metadata.get("text")
    name = told.get("dataset") if isinstance(told, Mapping) else None
    try:
        dialogues = DialogueDataset(name or features.name, data_dir).dialogues(features.split)
    except InputError:  # A report can do without texts.
        return {}
    turns = (turn for dialogue in dialogues for turn in dialogue.utterances)
    return {turn.id: turn.text for turn in turns if turn.text_present}


class Bootstrap:
    """Scores of a split and their intervals, from draws of its labeled dialogues.

    All scores see the same draws, so differences of scores have intervals, too.

    Args:
      evaluated: with at least one label.
      draws: R.
      seed: of the draws.
    """

    def __init__(self, evaluated: SplitPredictions, draws: int = DRAWS, seed: int = SEED):
        self._evaluated = evaluated
        counted = evaluated.dialogue[evaluated.labeled]
        self.dialogues, self._group = np.unique(counted, return_inverse=True)
        # One dialogue drawn anew is itself: that has no interval.
        self.draws = draws if len(self.dialogues) > 1 else 0
        self._weights = metrics.bootstrap_weights(len(self.dialogues), self.draws, seed)

    def sums(self, cells: np.ndarray, num_cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts [num_cells] of the cells [n] of labeled utterances, and their draws.

        Args:
          cells: of each labeled utterance, -1 for one that does not count.
          num_cells: cells there are.

        Returns:
          [num_cells] and [R, num_cells].
        """
        counted = cells >= 0
        place = self._group[counted] * num_cells + cells[counted]
        counts = np.bincount(place, minlength=len(self.dialogues) * num_cells)
        counts = counts.reshape(len(self.dialogues), num_cells)
        return counts.sum(0), self._weights @ counts

    def confusion(self, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Confusion [C, C] of predictions [N], -1 where there is none, and its draws [R, C, C]."""
        evaluated = self._evaluated
        classes = len(evaluated.class_names)
        label, predicted = evaluated.label[evaluated.labeled], predicted[evaluated.labeled]
        cells = np.where(predicted >= 0, label * classes + predicted, -1)
        counts, draws = self.sums(cells, classes**2)
        return counts.reshape(classes, classes), draws.reshape(-1, classes, classes)

    def scores(self, predicted: np.ndarray) -> dict[str, Any]:
        """`metrics.confusion_scores` of predictions [N], and their draws, by name."""
        counts, draws = self.confusion(predicted)
        found, drawn = metrics.confusion_scores(counts), metrics.confusion_scores(draws)
        return {name: (found[name], drawn[name]) for name in found}


def with_interval(value: Any, draws: np.ndarray) -> Score:
    """A `Score` of a value and its draws [R], of which there may be none."""
    if not np.isfinite(draws).any():
        return Score(float(value))
    low, high = metrics.interval(draws)
    return Score(float(value), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class System:
    """One way of predicting, and its scores.

    Attributes:
      name: "model", an expert, "majority", or the name of a reference.
      kind: "model", "expert", "majority" or "reference".
      scores: of `metrics.SCORE_NAMES`, those that are known.
      utterances: that it was scored on; None where unknown.
      difference: its weighted F1 less that of the model, on the same utterances.
    """

    name: str
    kind: str
    scores: Mapping[str, Score]
    utterances: int | None = None
    difference: Score | None = None


def systems(
    evaluated: SplitPredictions, bootstrap: Bootstrap, references: Mapping[str, Mapping[str, float]]
) -> list[System]:
    """The model, each expert alone, the majority class and the references.

    Args:
      evaluated: with at least one label.
      bootstrap: of it.
      references: name to scores that are known from elsewhere.
    """
    label = evaluated.label[evaluated.labeled]
    most = np.bincount(label, minlength=len(evaluated.class_names)).argmax()
    predictions = {("model", "model"): evaluated.predicted}
    for index, name in enumerate(evaluated.experts):
        predictions[name, "expert"] = evaluated.votes[:, index]
    predictions["majority", "majority"] = np.full(len(evaluated.label), most)
    found = []
    for (name, kind), predicted in predictions.items():
        if not (predicted[evaluated.labeled] >= 0).any():
            continue
        own = bootstrap.scores(predicted)
        difference = None
        if kind != "model":
            same = bootstrap.scores(np.where(predicted >= 0, evaluated.predicted, MISSING))
            (ours, our_draws), (theirs, their_draws) = own["weighted_f1"], same["weighted_f1"]
            difference = with_interval(ours - theirs, our_draws - their_draws)
        scores = {key: with_interval(*own[key]) for key in metrics.SCORE_NAMES}
        found.append(System(name, kind, scores, int(own["utterances"][0]), difference))
    for name, values in references.items():
        known = {key: Score(values[key]) for key in metrics.SCORE_NAMES if key in values}
        found.append(System(name, "reference", known))
    return found


def per_class(evaluated: SplitPredictions, bootstrap: Bootstrap) -> dict[str, dict[str, Any]]:
    """For each class "precision", "recall", "f1" as `Score`, and "support"."""
    found = bootstrap.scores(evaluated.predicted)
    rows: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(evaluated.class_names):
        rows[name] = {
            key: with_interval(found[key][0][index], found[key][1][:, index])
            for key in ("precision", "recall", "f1")
        }
        rows[name]["support"] = int(found["support"][0][index])
    return rows


@dataclasses.dataclass(frozen=True)
class Bin:
    """One bin of a calibration curve: utterances, their mean confidence, their accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: Score


def calibration(evaluated: SplitPredictions, bootstrap: Bootstrap) -> tuple[float, list[Bin]]:
    """The expected calibration error, and the bins that hold any utterance."""
    labeled = evaluated.labeled
    confidence = evaluated.probabilities[labeled].max(-1)
    correct = ~evaluated.wrong[labeled]
    found = metrics.calibration(confidence, correct)
    num_bins = len(found["count"])
    _, of_all = bootstrap.sums(found["bin"], num_bins)
    _, of_correct = bootstrap.sums(np.where(correct, found["bin"], -1), num_bins)
    with np.errstate(invalid="ignore"):  # A draw need not hold any utterance of a bin.
        drawn = of_correct / of_all  # R bins
    return found["error"], [
        Bin(
            index / num_bins,
            (index + 1) / num_bins,
            int(count),
            float(found["confidence"][index]),
            with_interval(found["accuracy"][index], drawn[:, index]),
        )
        for index, count in enumerate(found["count"])
        if count
    ]


def gate_rows(evaluated: SplitPredictions) -> list[tuple[str | None, str, int, np.ndarray]]:
    """Mean gate of labeled utterances that were predicted rightly and wrongly.

    Returns:
      (class or None for all, "right" or "wrong", utterances, gate [E]), where there are any.
    """
    assert evaluated.gate is not None
    groups: dict[str | None, np.ndarray] = {None: evaluated.labeled}
    for index, name in enumerate(evaluated.class_names):
        groups[name] = evaluated.label == index
    rows: list[tuple[str | None, str, int, np.ndarray]] = []
    for emotion, members in groups.items():
        for outcome, chosen in (
            ("right", members & ~evaluated.wrong),
            ("wrong", members & evaluated.wrong),
        ):
            if chosen.any():
                mean = evaluated.gate[chosen].mean(0)
                rows.append((emotion, outcome, int(chosen.sum()), mean))
    return rows
