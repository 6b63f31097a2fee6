"""Scores predictions against labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mister_jax import metrics
from mister_jax.data import DialogueFeatures
from mister_jax.evaluation.split_predictions import predict_without_gate
from mister_jax.models import EXPERTS
from mister_jax.predictor import Predictions


def score_predictions(features: DialogueFeatures, predictions: Predictions) -> dict[str, Any]:
    """Scores the predictions of the model and of each expert.

    Args:
      features: Features of the split.
      predictions: Arrays that a `Predictor` returns.

    Returns:
      The result of `metrics.classification_scores` with these additional entries:

      - "confusion" and "calibration_error"; if there are labels, "brier_score" and
        "area_under_risk_coverage".
      - For MiSTER-E, "mean_gate" (mean gate weight of each expert), "experts" (scores of each
        expert) and "without_gate" (score of the mean of the experts' logits).
      - The result of `score_other_targets`.
      - "reference_scores", if the dataset's metadata contains scores of reference classifiers.
    """
    num_classes = len(features.class_names)
    labeled = features.label >= 0

    def confusion(choices: np.ndarray, counted: np.ndarray) -> np.ndarray:
        cells = features.label[counted] * num_classes + choices[counted]
        return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)

    predicted = predictions["probabilities"].argmax(-1)
    counts = confusion(predicted, labeled)
    scores = metrics.classification_scores(counts, features.class_names)
    scores["confusion"] = counts.tolist()
    probabilities, label = predictions["probabilities"][labeled], features.label[labeled]
    confidence, correct = probabilities.max(-1), predicted[labeled] == label
    scores["calibration_error"] = metrics.calibration(confidence, correct)["error"]
    if labeled.any():
        scores["brier_score"] = float(metrics.brier_scores(probabilities, label).mean())
        scores["area_under_risk_coverage"] = metrics.risk_coverage(confidence, correct)[2]
    if "gate" in predictions:
        scores["mean_gate"], scores["experts"] = {}, {}
        for index, name in enumerate(EXPERTS):
            present = labeled & predictions["expert_present"][:, index]
            if present.any():
                choices = predictions["expert_probabilities"][:, index].argmax(-1)
                expert_scores = metrics.classification_scores(
                    confusion(choices, present), features.class_names
                )
                scores["experts"][name] = {
                    key: expert_scores[key] for key in ("weighted_f1", "utterances")
                }
                scores["mean_gate"][name] = float(predictions["gate"][labeled, index].mean())
        mean = metrics.classification_scores(
            confusion(predict_without_gate(predictions), labeled), features.class_names
        )
        scores["without_gate"] = {"weighted_f1": mean["weighted_f1"]}
    scores |= score_other_targets(
        features.class_names,
        features.label,
        predictions["probabilities"],
        score=features.score,
        predicted_score=predictions.get("score"),
        ratings=getattr(features, "ratings", None),  # `Utterances` have no ratings.
    )
    if "reference_scores" in features.metadata:
        scores["reference_scores"] = features.metadata["reference_scores"]
    return scores


def score_other_targets(
    class_names: Sequence[str],
    label: np.ndarray,
    probabilities: np.ndarray,
    *,
    score: np.ndarray | None,
    predicted_score: np.ndarray | None,
    ratings: np.ndarray | None,
) -> dict[str, Any]:
    """Scores predictions against annotated scores and against the choices of raters.

    Args:
      class_names: Names of the C classes.
      label: True classes, [N], -1 for unlabeled utterances.
      probabilities: Class probabilities, [N, C].
      score: Annotated scores, [N], NaN if unknown; None if the dataset has none.
      predicted_score: Predicted scores, [N]; None if the model predicts none.
      ratings: Number of raters who chose each class, [N, C]; None if the dataset has none.

    Returns:
      A dict with these entries:

      - "sentiment", the result of `metrics.binary_sentiment`, if the utterances have scores and the
        classes are negative and positive; see `metrics.positive_class`.
      - "regression", the result of `metrics.regression_scores`, if the model predicts scores.
      - "raters", the result of `metrics.rater_scores`, if the dataset has ratings.
    """
    scores: dict[str, Any] = {}
    positive_class = metrics.positive_class(class_names)
    if score is not None and positive_class is not None:
        scores["sentiment"] = metrics.binary_sentiment(
            np.where(label >= 0, score, np.nan), probabilities.argmax(-1) == positive_class
        )
    if ratings is not None:
        scores["raters"] = metrics.rater_scores(ratings, probabilities)
    if score is not None and predicted_score is not None:
        scores["regression"] = metrics.regression_scores(score, predicted_score)
    return scores
