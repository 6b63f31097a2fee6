"""Scores of emotion recognition, from confusion counts.

Counts are made on the devices and add up over batches; scores are made of the counts on the host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCORE_NAMES = ("weighted_f1", "macro_f1", "accuracy", "balanced_accuracy")
"""The scores of a whole split."""


def confusion_counts(
    labels: jax.Array, predicted: jax.Array, mask: jax.Array, num_classes: int
) -> jax.Array:
    """Counts of (label, predicted) pairs.

    Args:
      labels: [...] int, -1 where unlabeled, which does not count.
      predicted: [...] int.
      mask: positions that count [...] bool.
      num_classes: C.

    Returns:
      [C, C] int32, labels down, predictions across.
    """
    counted = mask & (labels >= 0)
    cells = jnp.where(counted, labels * num_classes + predicted, num_classes**2)
    counts = jnp.bincount(cells.reshape(-1), length=num_classes**2 + 1)
    return counts[:-1].reshape(num_classes, num_classes).astype(jnp.int32)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where the denominator is 0."""
    zeros = np.zeros(np.broadcast_shapes(numerator.shape, denominator.shape))
    return np.divide(numerator, denominator, out=zeros, where=denominator > 0)


def confusion_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of one or many confusion matrices.

    Args:
      confusion: [..., C, C] counts, labels down, predictions across.

    Returns:
      "weighted_f1", "macro_f1", "accuracy", "balanced_accuracy", "utterances" [...], and
      "precision", "recall", "f1", "support" [..., C]. A score without a basis is 0.
    """
    confusion = np.asarray(confusion)
    correct = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    support, predicted = confusion.sum(-1).astype(float), confusion.sum(-2).astype(float)
    total = support.sum(-1)
    recall = _ratio(correct, support)
    f1 = _ratio(2 * correct, support + predicted)
    # As scikit-learn has it: macro F1 over classes that occur or were predicted, balanced accuracy
    # over classes that occur. The others' terms are 0.
    seen, occurs = support + predicted > 0, support > 0
    return {
        "weighted_f1": _ratio((f1 * support).sum(-1), total),
        "macro_f1": _ratio(f1.sum(-1), seen.sum(-1)),
        "accuracy": _ratio(correct.sum(-1), total),
        "balanced_accuracy": _ratio(recall.sum(-1), occurs.sum(-1)),
        "utterances": total,
        "precision": _ratio(correct, predicted),
        "recall": recall,
        "f1": f1,
        "support": support,
    }


def scores(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Every score of a confusion matrix.

    Args:
      confusion: [C, C] counts, labels down, predictions across.
      class_names: C names.

    Returns:
      "weighted_f1", "macro_f1", "accuracy", "balanced_accuracy", "utterances", "per_class" (name to
      precision, recall, f1 and support) and "majority" (the same four scores of always predicting
      the most frequent label). A score without a basis is 0.
    """
    confusion = np.asarray(confusion)
    if confusion.shape != (len(class_names),) * 2:
        raise ValueError(f"confusion {confusion.shape} for {len(class_names)} class names")
    found = confusion_scores(confusion)
    per_class = {
        name: {
            "precision": float(found["precision"][index]),
            "recall": float(found["recall"][index]),
            "f1": float(found["f1"][index]),
            "support": int(found["support"][index]),
        }
        for index, name in enumerate(class_names)
    }
    constant = np.zeros_like(confusion)
    constant[:, found["support"].argmax()] = found["support"]
    baseline = confusion_scores(constant)
    return {
        **{name: float(found[name]) for name in SCORE_NAMES},
        "utterances": int(found["utterances"]),
        "majority": {name: float(baseline[name]) for name in SCORE_NAMES},
        "per_class": per_class,
    }


SENTIMENT_CONVENTIONS = (
    "negative_nonnegative",
    "negative_positive_without_zero",
    "nonpositive_positive",
)


_SENTIMENTS = (
    {"negative", "positive"},
    {"negative", "nonnegative"},
    {"nonpositive", "positive"},
)


def positive_class(class_names: Sequence[str]) -> int | None:
    """Which of two classes of sentiment is the positive one.

    Args:
      class_names: of a dataset, such as "negative" and "Non-negative", in any order.

    Returns:
      The index of "positive" or "nonnegative" beside "negative" or "nonpositive"; None for classes
      with other names. Upper case, hyphens, underscores and spaces do not count.
    """
    names = [re.sub(r"[-_ ]", "", name.lower()) for name in class_names]
    if len(names) != 2 or set(names) not in _SENTIMENTS:
        return None
    return next(
        index for index, name in enumerate(names) if name not in ("negative", "nonpositive")
    )


def binary_sentiment(score: np.ndarray, positive: np.ndarray) -> dict[str, dict[str, Any]]:
    """The three binary readings of CMU-MOSI's scores, by name.

    "negative_nonnegative": score < 0 against score >= 0; "negative_positive_without_zero": the same
    with scores of zero left out; "nonpositive_positive": score <= 0 against score > 0.

    Args:
      score: annotated scores [N], in [-3, 3]; NaN is left out.
      positive: utterances predicted as positive [N] bool.

    Returns:
      For each of `SENTIMENT_CONVENTIONS` its "weighted_f1", "accuracy" and "utterances".
    """
    score, positive = np.asarray(score, float), np.asarray(positive, bool)
    scored = ~np.isnan(score)
    readings = {
        "negative_nonnegative": (score >= 0, scored),
        "negative_positive_without_zero": (score > 0, scored & (score != 0)),
        "nonpositive_positive": (score > 0, scored),
    }
    result = {}
    for name in SENTIMENT_CONVENTIONS:
        label, counted = readings[name]
        cells = 2 * label[counted].astype(int) + positive[counted]
        found = confusion_scores(np.bincount(cells, minlength=4).reshape(2, 2))
        result[name] = {
            "weighted_f1": float(found["weighted_f1"]),
            "accuracy": float(found["accuracy"]),
            "utterances": int(found["utterances"]),
        }
    return result


def calibration(confidence: np.ndarray, correct: np.ndarray, num_bins: int = 10) -> dict[str, Any]:
    """How far probabilities are from shares: bins of equal width, and their expected error.

    The expected calibration error of arXiv 1706.04599, equation 3: the mean over utterances of
    |accuracy - mean confidence| of their bins.

    Args:
      confidence: probability of the predicted class [N], in [0, 1].
      correct: whether it was the label [N] bool.
      num_bins: of equal width, between 0 and 1; each holds its upper end, the first also 0.

    Returns:
      "error", and "bin" [N] int, "count", "confidence", "accuracy" [num_bins]; 0 without a basis.
    """
    confidence = np.asarray(confidence, float)
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
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


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation, 0 for one value."""
    array = np.asarray(list(values), float)
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else 0.0
