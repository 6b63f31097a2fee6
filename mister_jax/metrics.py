"""Scores of emotion recognition, from confusion counts.

Counts are made on the devices and add up over batches; scores are made of the counts on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def confusion_counts(
    labels: jax.Array, predicted: jax.Array, mask: jax.Array, num_classes: int
) -> jax.Array:
    """Counts of (label, predicted) pairs.

    Args:
      labels: [...] int, -1 where unlabelled, which does not count.
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
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)


def _scores(confusion: np.ndarray) -> dict[str, Any]:
    correct = np.diag(confusion).astype(float)
    support, predicted = confusion.sum(1).astype(float), confusion.sum(0).astype(float)
    total = max(support.sum(), 1.0)
    recall = _ratio(correct, support)
    f1 = _ratio(2 * correct, support + predicted)
    # As scikit-learn has it: macro F1 over classes that occur or were predicted, balanced accuracy
    # over classes that occur.
    seen, occurs = support + predicted > 0, support > 0
    return {
        "weighted_f1": float((f1 * support).sum() / total),
        "macro_f1": float(f1[seen].mean()) if seen.any() else 0.0,
        "accuracy": float(correct.sum() / total),
        "balanced_accuracy": float(recall[occurs].mean()) if occurs.any() else 0.0,
        "utterances": int(support.sum()),
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
    found = _scores(confusion)
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
    overall = ("weighted_f1", "macro_f1", "accuracy", "balanced_accuracy")
    baseline = _scores(constant)
    return {
        **{name: found[name] for name in overall},
        "utterances": found["utterances"],
        "majority": {name: baseline[name] for name in overall},
        "per_class": per_class,
    }


SENTIMENT_CONVENTIONS = (
    "negative_nonnegative",
    "negative_positive_without_zero",
    "nonpositive_positive",
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
        found = _scores(np.bincount(cells, minlength=4).reshape(2, 2))
        result[name] = {key: found[key] for key in ("weighted_f1", "accuracy", "utterances")}
    return result
