"""Scores of predictions.

For classification scores, the devices compute confusion matrices, and the host computes the scores
from the sum of these matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCORE_NAMES = ("weighted_f1", "macro_f1", "accuracy", "uar")
"""Scores for a whole split. UAR is the unweighted average recall, or balanced accuracy."""

_TITLES = {"weighted_f1": "weighted F1", "macro_f1": "macro F1", "uar": "UAR"}


def title(score: str) -> str:
    """Returns a score's display name, such as "weighted F1" for "weighted_f1"."""
    return _TITLES.get(score, score.replace("_", " "))


CALIBRATION_SCORES = ("calibration_error", "brier_score", "negative_log_likelihood")
"""Scores of probabilities; lower is better."""

SENTIMENT_CONVENTIONS = (
    "negative_nonnegative",
    "negative_positive_without_zero",
    "nonpositive_positive",
)
_SENTIMENT_CLASSES = (
    {"negative", "positive"},
    {"negative", "nonnegative"},
    {"nonpositive", "positive"},
)


def confusion_counts(
    labels: jax.Array, predicted: jax.Array, mask: jax.Array, num_classes: int
) -> jax.Array:
    """Counts pairs of label and predicted class.

    Positions whose label or prediction is not in 0..C-1 are not counted.

    Args:
      labels: Labels, [...] int; -1 if unlabeled.
      predicted: Predicted classes, [...] int.
      mask: Positions to count, [...] bool.
      num_classes: Number of classes C.

    Returns:
      Counts, [C, C] int32, with labels as rows and predictions as columns.
    """
    # Small integer dtypes, such as uint8, cannot hold the index of a cell.
    labels, predicted = jnp.asarray(labels, jnp.int32), jnp.asarray(predicted, jnp.int32)
    counted = mask.astype(bool)
    for classes in (labels, predicted):
        counted = counted & (classes >= 0) & (classes < num_classes)
    cells = jnp.where(counted, labels * num_classes + predicted, num_classes**2)
    counts = jnp.bincount(cells.reshape(-1), length=num_classes**2 + 1)
    return counts[:-1].reshape(num_classes, num_classes).astype(jnp.int32)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError if a label is not in 0..C-1.

    NumPy would read a negative label as a class counted from the end.
    """
    labels = np.asarray(labels)
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"labels are from {labels.min()} to {labels.max()}; allowed: 0 to {num_classes - 1}"
        )


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divides two arrays; the result is 0 where the denominator is 0."""
    zeros = np.zeros(np.broadcast_shapes(numerator.shape, denominator.shape))
    return np.divide(numerator, denominator, out=zeros, where=denominator > 0)


def confusion_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Computes scores from one or more confusion matrices.

    Args:
      confusion: Counts, [..., C, C], with labels as rows and predictions as columns.

    Returns:
      Scores by name: the `SCORE_NAMES` and "utterances", [...]; and for each class, "precision",
      "recall", "f1" and "support", [..., C]. An undefined score is 0.
    """
    confusion = np.asarray(confusion)
    correct = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    support, predicted = confusion.sum(-1).astype(float), confusion.sum(-2).astype(float)
    total = support.sum(-1)
    recall = _ratio(correct, support)
    f1 = _ratio(2 * correct, support + predicted)
    # As in scikit-learn, macro F1 averages over classes that occur or are predicted, and UAR
    # averages over classes that occur. The terms of all other classes are 0.
    occurs_or_predicted, occurs = support + predicted > 0, support > 0
    return {
        "weighted_f1": _ratio((f1 * support).sum(-1), total),
        "macro_f1": _ratio(f1.sum(-1), occurs_or_predicted.sum(-1)),
        "accuracy": _ratio(correct.sum(-1), total),
        "uar": _ratio(recall.sum(-1), occurs.sum(-1)),
        "utterances": total,
        "precision": _ratio(correct, predicted),
        "recall": recall,
        "f1": f1,
        "support": support,
    }


def classification_scores(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Computes all scores from a confusion matrix, as JSON values.

    Args:
      confusion: Counts, [C, C], with labels as rows and predictions as columns.
      class_names: Names of the C classes.

    Returns:
      The `SCORE_NAMES`, "utterances", "per_class" (by class name: "precision", "recall", "f1" and
      "support") and "majority" (the `SCORE_NAMES` of a classifier that always predicts the most
      frequent label). An undefined score is 0.

    Raises:
      ValueError: The number of class names does not match the matrix.
    """
    confusion = np.asarray(confusion)
    if confusion.shape != (len(class_names),) * 2:
        raise ValueError(
            f"confusion has shape {confusion.shape} for {len(class_names)} class names"
        )
    scores = confusion_scores(confusion)
    columns = (scores["precision"], scores["recall"], scores["f1"], scores["support"].astype(int))
    per_class = {
        name: dict(zip(("precision", "recall", "f1", "support"), row, strict=True))
        for name, *row in zip(class_names, *(column.tolist() for column in columns), strict=True)
    }
    majority = np.zeros_like(confusion)
    majority[:, scores["support"].argmax()] = scores["support"]
    majority_scores = confusion_scores(majority)
    return {
        **{name: float(scores[name]) for name in SCORE_NAMES},
        "utterances": int(scores["utterances"]),
        "majority": {name: float(majority_scores[name]) for name in SCORE_NAMES},
        "per_class": per_class,
    }


def positive_class(class_names: Sequence[str]) -> int | None:
    """Returns the index of the positive class if the classes are binary sentiment.

    Args:
      class_names: Class names in any order, such as "negative" and "Non-negative". Case, hyphens,
        underscores and spaces are ignored.

    Returns:
      Index of "positive" or "nonnegative"; None if the classes are not binary sentiment.
    """
    names = [re.sub(r"[-_ ]", "", name.lower()) for name in class_names]
    if len(names) != 2 or set(names) not in _SENTIMENT_CLASSES:
        return None
    return next(
        index for index, name in enumerate(names) if name not in ("negative", "nonpositive")
    )


def binary_sentiment(score: np.ndarray, positive: np.ndarray) -> dict[str, dict[str, Any]]:
    """Computes binary sentiment scores for CMU-MOSI under three common conventions.

    The conventions turn a sentiment score into one of two classes: "negative_nonnegative" (< 0 or
    >= 0), "negative_positive_without_zero" (< 0 or > 0, ignoring scores of 0), and
    "nonpositive_positive" (<= 0 or > 0).

    Args:
      score: Annotated sentiment, [N], -3 to 3; utterances with NaN are ignored.
      positive: Utterances predicted as positive, [N] bool.

    Returns:
      For each of `SENTIMENT_CONVENTIONS`, a dict with "weighted_f1", "accuracy" and "utterances".
    """
    score, positive = np.asarray(score, float), np.asarray(positive, bool)
    annotated = ~np.isnan(score)
    label_and_mask = {
        "negative_nonnegative": (score >= 0, annotated),
        "negative_positive_without_zero": (score > 0, annotated & (score != 0)),
        "nonpositive_positive": (score > 0, annotated),
    }
    result = {}
    for name, (label, mask) in label_and_mask.items():
        cells = 2 * label[mask].astype(int) + positive[mask]
        scores = confusion_scores(np.bincount(cells, minlength=4).reshape(2, 2))
        result[name] = {
            "weighted_f1": float(scores["weighted_f1"]),
            "accuracy": float(scores["accuracy"]),
            "utterances": int(scores["utterances"]),
        }
    return result


def regression_scores(score: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Scores predicted sentiment as papers on CMU-MOSI and CMU-MOSEI do.

    The annotated and predicted scores are rounded to the nearest integer (ties to even) from -3 to
    3 for "accuracy_7", and from -2 to 2 for "accuracy_5".

    Args:
      score: Annotated sentiment, [N], -3 to 3; utterances with NaN are ignored.
      predicted: Predicted sentiment, [N]; read only where `score` is not NaN.

    Returns:
      A dict with these entries, or only "utterances" if there are no scores:

      - "mae": Mean absolute error.
      - "pearson_r": Pearson's correlation; None if all annotated or all predicted scores are equal.
      - "accuracy_7", "accuracy_5": Accuracy of the rounded scores.
      - "utterances": Number of utterances with scores.
      - "binary": Result of `binary_sentiment` for the signs of the predicted scores.

    Raises:
      ValueError: The predicted score of an annotated utterance is NaN.
    """
    score, predicted = np.asarray(score, float), np.asarray(predicted, float)
    annotated = ~np.isnan(score)
    score, predicted = score[annotated], predicted[annotated]
    if not len(score):
        return {"utterances": 0}
    num_missing = int(np.isnan(predicted).sum())
    if num_missing:
        raise ValueError(
            f"predicted is NaN for {num_missing} of {len(score)} annotated utterances; allowed: "
            "numbers"
        )
    varies = len(score) > 1 and min(np.ptp(score), np.ptp(predicted)) > 0

    def accuracy(limit: float) -> float:
        rounded = (np.round(np.clip(values, -limit, limit)) for values in (score, predicted))
        return float(np.equal(*rounded).mean())

    binary = binary_sentiment(score, predicted > 0)
    # In this convention, a predicted score of 0 is not negative.
    binary["negative_nonnegative"] = binary_sentiment(score, predicted >= 0)["negative_nonnegative"]
    return {
        "mae": float(np.abs(score - predicted).mean()),
        "pearson_r": float(np.corrcoef(score, predicted)[0, 1]) if varies else None,
        "accuracy_7": accuracy(3),
        "accuracy_5": accuracy(2),
        "utterances": len(score),
        "binary": binary,
    }


def rater_scores(ratings: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Compares predicted distributions with the raters' distributions.

    Args:
      ratings: Number of raters who chose each class, [N, C]; rows of zeros are ignored.
      probabilities: Class probabilities, [N, C].

    Returns:
      A dict with these entries, or only "utterances" if there are no ratings:

      - "kl_divergence": Mean Kullback-Leibler divergence from the raters to the model, in nats.
      - "js_divergence": Mean Jensen-Shannon divergence, in nats.
      - "any_rater_accuracy": Share of utterances whose predicted class at least one rater chose.
      - "rater_agreement": Mean share of pairs of raters who agree, on utterances with at least two
        raters who each chose one class; None without such utterances.
      - "fleiss_kappa": Fleiss' kappa (1971) on the utterances of "rater_agreement"; None if
        undefined.
      - "utterances": Number of utterances with ratings.
      - "mean_raters": Mean number of raters per utterance with ratings.
    """
    count = ratings.sum(-1)
    ratings, probabilities, count = (
        np.asarray(values, float)[count > 0] for values in (ratings, probabilities, count)
    )
    if not len(count):
        return {"utterances": 0}
    raters = ratings / count[:, None]

    def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        q = np.maximum(q, 1e-12)  # A probability may be rounded to 0.
        return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0).sum(-1)

    middle = (raters + probabilities) / 2
    js = (divergence(raters, middle) + divergence(probabilities, middle)) / 2
    chosen = ratings[np.arange(len(count)), probabilities.argmax(-1)] > 0
    agreement = kappa = None
    # A vote that one rater divides among several classes would count as disagreement.
    whole = np.isclose(ratings, np.round(ratings), atol=1e-4).all(-1)
    several = whole & (count > 1.5)
    if several.any():
        n = count[several]
        agreement = float((((ratings[several] ** 2).sum(-1) - n) / (n * (n - 1))).mean())
        shares = ratings[several].sum(0) / n.sum()
        chance = float((shares**2).sum())
        kappa = (agreement - chance) / (1 - chance) if chance < 1 else None
    return {
        "kl_divergence": float(divergence(raters, probabilities).mean()),
        "js_divergence": float(js.mean()),
        "any_rater_accuracy": float(chosen.mean()),
        "rater_agreement": agreement,
        "fleiss_kappa": kappa,
        "utterances": len(count),
        "mean_raters": float(count.mean()),
    }


def calibration(confidence: np.ndarray, correct: np.ndarray, num_bins: int = 10) -> dict[str, Any]:
    """Computes the calibration curve and the expected calibration error.

    The error is the mean of |accuracy - mean confidence| over the bins, weighted by the number of
    utterances in each bin (arXiv 1706.04599, equation 3).

    Args:
      confidence: Probability of the predicted class, [N], 0 to 1.
      correct: Whether the prediction is correct, [N] bool.
      num_bins: Number of equal-width bins between 0 and 1. A bin includes its upper end, rounded to
        the dtype of `confidence`; the first bin also includes 0.

    Returns:
      The calibration "error"; the "bin" of each utterance, [N] int; and the "count", mean
      "confidence" and "accuracy" of each bin, [num_bins], which are 0 for an empty bin.

    Raises:
      ValueError: A confidence is not between 0 and 1, apart from rounding.
    """
    confidence = np.asarray(confidence)
    # The softmax of an accelerator may exceed 1 in the last digit.
    if not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():  # also rejects NaN
        raise ValueError(
            f"confidence is from {confidence.min()} to {confidence.max()}; allowed: 0 to 1"
        )
    upper_ends = np.arange(1, num_bins) / num_bins
    if confidence.dtype.kind == "f":
        upper_ends = upper_ends.astype(confidence.dtype)
    bins = np.searchsorted(upper_ends, confidence)
    confidence = confidence.astype(float)
    count = np.bincount(bins, minlength=num_bins).astype(float)
    mean_confidence = _ratio(np.bincount(bins, confidence, num_bins), count)
    accuracy = _ratio(np.bincount(bins, np.asarray(correct, float), num_bins), count)
    total = max(count.sum(), 1.0)
    return {
        "error": float((count * np.abs(accuracy - mean_confidence)).sum() / total),
        "bin": bins,
        "count": count.astype(int),
        "confidence": mean_confidence,
        "accuracy": accuracy,
    }


def brier_scores(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Returns each utterance's Brier score, the squared distance from the one-hot label, 0 to 2.

    Args:
      probabilities: Class probabilities, [N, C].
      label: True classes, [N] int.

    Raises:
      ValueError: A label is not in 0..C-1.
    """
    check_labels(label, probabilities.shape[-1])
    return ((probabilities - np.eye(probabilities.shape[-1])[label]) ** 2).sum(-1)


def risk_coverage(
    confidence: np.ndarray, correct: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Computes the risk-coverage curve of a classifier that abstains if it is uncertain.

    The classifier predicts only the utterances on which it is most confident. Coverage is the share
    of utterances that the classifier predicts, and risk is the share of wrong predictions among
    these utterances (arXiv 1705.08500).

    Args:
      confidence: Probability of the predicted class, [N], with N of at least 1.
      correct: Whether the prediction is correct, [N] bool.

    Returns:
      Coverage and risk at each distinct confidence, in ascending order of coverage, and the area
      under the curve. The area is the mean risk if the classifier predicts 1, 2, ..., N utterances,
      with utterances of equal confidence in random order.
    """
    values, index = np.unique(-np.asarray(confidence, float), return_inverse=True)
    count = np.bincount(index, minlength=len(values))
    wrong = np.bincount(index, ~np.asarray(correct, bool), len(values))
    kept = count.cumsum()
    expected_wrong = np.repeat(wrong / count, count).cumsum()
    numbers = np.arange(1, kept[-1] + 1)
    area = (expected_wrong / numbers).mean()
    return kept / kept[-1], wrong.cumsum() / kept, float(area)


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation, which is 0 for a single value."""
    array = np.asarray(list(values), float)
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else 0.0
