"""Scores predictions against labels."""

from __future__ import annotations

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
      - "sentiment", the result of `metrics.binary_sentiment`, if the utterances have scores and the
        classes are negative and positive; see `metrics.positive_class`.
      - "regression", the result of `metrics.regression_scores`, if the model predicts scores.
      - "raters", the result of `metrics.rater_scores`, if the dataset has ratings.
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
    positive_class = metrics.positive_class(features.class_names)
    if features.score is not None and positive_class is not None:
        scores["sentiment"] = metrics.binary_sentiment(
            np.where(labeled, features.score, np.nan), predicted == positive_class
        )
    ratings = getattr(features, "ratings", None)  # `Utterances` have no ratings.
    if ratings is not None:
        scores["raters"] = metrics.rater_scores(ratings, predictions["probabilities"])
    if features.score is not None and "score" in predictions:
        scores["regression"] = metrics.regression_scores(features.score, predictions["score"])
    if "reference_scores" in features.metadata:
        scores["reference_scores"] = features.metadata["reference_scores"]
    return scores
