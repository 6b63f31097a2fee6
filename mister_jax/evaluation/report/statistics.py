"""Computes the numbers in a report: scores with intervals, calibration and mean gate weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mister_jax import metrics
from mister_jax.evaluation.confidence_intervals import DialogueBootstrap, Estimate
from mister_jax.evaluation.split_predictions import NO_VOTE, SplitPredictions

_MIN_CONFIDENCES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class ScoredModel:
    """A model, expert, majority baseline or reference, with its scores.

    Attributes:
      name: "model", the name of an expert, "mean" for the mean of the experts, "majority", or the
        name of a reference.
      kind: "model", "expert", "mean", "majority" or "reference".
      scores: Available scores by name; see `metrics.SCORE_NAMES`.
      utterances: Number of scored utterances; None if unknown.
      difference: Weighted F1 minus the evaluated model's weighted F1 on the same utterances; None
        for the evaluated model and for references.
    """

    name: str
    kind: str
    scores: Mapping[str, Estimate]
    utterances: int | None = None
    difference: Estimate | None = None


def score_models(
    predictions: SplitPredictions,
    bootstrap: DialogueBootstrap,
    reference_scores: Mapping[str, Mapping[str, float]],
) -> list[ScoredModel]:
    """Scores the model, each expert, the experts' mean and the majority class.

    The reference scores are added to the result. The split must have at least one label.
    """
    label = predictions.label[predictions.labeled]
    majority = np.bincount(label, minlength=len(predictions.class_names)).argmax()
    predicted_by = {("model", "model"): predictions.predicted}
    for index, name in enumerate(predictions.experts):
        predicted_by[name, "expert"] = predictions.votes[:, index]
    if predictions.without_gate is not None:
        predicted_by["mean", "mean"] = predictions.without_gate
    predicted_by["majority", "majority"] = np.full(len(predictions.label), majority)
    models = []
    for (name, kind), predicted in predicted_by.items():
        if not (predicted[predictions.labeled] >= 0).any():
            continue
        scores = bootstrap.scores(predicted)
        difference = None
        if kind != "model":
            # An expert may vote on only some utterances, so score the model on the same ones.
            same = np.where(predicted >= 0, predictions.predicted, NO_VOTE)
            value, resampled = scores["weighted_f1"]
            model_value, model_resampled = bootstrap.scores(same)["weighted_f1"]
            difference = Estimate.from_resamples(value - model_value, resampled - model_resampled)
        estimates = {key: Estimate.from_resamples(*scores[key]) for key in metrics.SCORE_NAMES}
        utterances = int(scores["utterances"][0])
        models.append(ScoredModel(name, kind, estimates, utterances, difference))
    for name, values in reference_scores.items():
        estimates = {key: Estimate(values[key]) for key in metrics.SCORE_NAMES if key in values}
        models.append(ScoredModel(name, "reference", estimates))
    return models


def class_scores(
    predictions: SplitPredictions, bootstrap: DialogueBootstrap
) -> dict[str, dict[str, Any]]:
    """Returns each class's "precision", "recall" and "f1" as `Estimate`, and its "support"."""
    scores = bootstrap.scores(predictions.predicted)
    rows: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(predictions.class_names):
        rows[name] = {
            key: Estimate.from_resamples(scores[key][0][index], scores[key][1][:, index])
            for key in ("precision", "recall", "f1")
        }
        rows[name]["support"] = int(scores["support"][0][index])
    return rows


class CalibrationBin(NamedTuple):
    """Number, mean confidence and accuracy of utterances with confidence from `low` to `high`."""

    low: float
    high: float
    utterances: int
    confidence: float
    accuracy: Estimate


def calibration(
    predictions: SplitPredictions, bootstrap: DialogueBootstrap
) -> tuple[float, list[CalibrationBin]]:
    """Computes the expected calibration error and the nonempty bins."""
    labeled = predictions.labeled
    confidence = predictions.probabilities[labeled].max(-1)
    correct = ~predictions.wrong[labeled]
    curve = metrics.calibration(confidence, correct)
    num_bins = len(curve["count"])
    _, resampled_counts = bootstrap.count(curve["bin"], num_bins)
    _, resampled_correct = bootstrap.count(np.where(correct, curve["bin"], -1), num_bins)
    with np.errstate(invalid="ignore"):  # A bin may be empty in a resample.
        resampled = resampled_correct / resampled_counts
    return curve["error"], [
        CalibrationBin(
            index / num_bins,
            (index + 1) / num_bins,
            int(count),
            float(curve["confidence"][index]),
            Estimate.from_resamples(curve["accuracy"][index], resampled[:, index]),
        )
        for index, count in enumerate(curve["count"])
        if count
    ]


class RiskCoverage(NamedTuple):
    """Risk-coverage curve: coverage and risk, [K], and areas under curves.

    `area` is the area under the model's curve. `best_area` is the area if every correct prediction
    has a higher confidence than every wrong prediction. With random confidences, the area is
    `error`, the share of wrong predictions.
    """

    coverage: np.ndarray
    risk: np.ndarray
    error: float
    area: float
    best_area: float


def risk_coverage(predictions: SplitPredictions) -> RiskCoverage:
    """Computes the risk-coverage curve of the labeled utterances; see `metrics.risk_coverage`."""
    labeled = predictions.labeled
    correct = ~predictions.wrong[labeled]
    confidence = predictions.probabilities[labeled].max(-1)
    coverage, risk, area = metrics.risk_coverage(confidence, correct)
    _, _, best_area = metrics.risk_coverage(correct, correct)
    return RiskCoverage(coverage, risk, float(1 - correct.mean()), area, best_area)


class KeptUtterances(NamedTuple):
    """Scores of the utterances whose confidence is at least `min_confidence`."""

    min_confidence: float
    coverage: Estimate
    accuracy: Estimate
    weighted_f1: Estimate


def abstention(predictions: SplitPredictions, bootstrap: DialogueBootstrap) -> list[KeptUtterances]:
    """Scores the labeled utterances that remain at each of several minimum confidences."""
    confidence = predictions.probabilities.max(-1)
    total = bootstrap.scores(predictions.predicted)["utterances"]
    rows: list[KeptUtterances] = []
    for threshold in _MIN_CONFIDENCES:
        kept = np.where(confidence >= threshold, predictions.predicted, NO_VOTE)
        scores = bootstrap.scores(kept)
        if not scores["utterances"][0]:
            break  # Higher thresholds also keep no utterance.
        count, resampled_count = scores["utterances"]
        coverage = Estimate.from_resamples(count / total[0], resampled_count / total[1])
        accuracy, weighted_f1 = (
            # A resample may contain no utterance above the threshold.
            Estimate.from_resamples(value, np.where(resampled_count > 0, resampled, np.nan))
            for value, resampled in (scores["accuracy"], scores["weighted_f1"])
        )
        row = KeptUtterances(threshold, coverage, accuracy, weighted_f1)
        if rows and row.coverage.value == 1:
            continue
        rows.append(row)
    return rows


class MeanGate(NamedTuple):
    """Mean gate weights for one emotion and outcome.

    Attributes:
      emotion: True emotion; None for all emotions.
      outcome: "correct" or "wrong".
      utterances: Number of utterances.
      weights: Mean gate weights, [E].
    """

    emotion: str | None
    outcome: str
    utterances: int
    weights: np.ndarray


def mean_gates(predictions: SplitPredictions) -> list[MeanGate]:
    """Computes the mean gate weights by emotion and outcome. Empty groups are omitted."""
    assert predictions.gate is not None
    groups: dict[str | None, np.ndarray] = {None: predictions.labeled}
    for index, name in enumerate(predictions.class_names):
        groups[name] = predictions.label == index
    rows = []
    for emotion, members in groups.items():
        for outcome, selected in (
            ("correct", members & ~predictions.wrong),
            ("wrong", members & predictions.wrong),
        ):
            if selected.any():
                weights = predictions.gate[selected].mean(0)
                rows.append(MeanGate(emotion, outcome, int(selected.sum()), weights))
    return rows
