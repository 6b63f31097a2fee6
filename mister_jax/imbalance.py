"""Options for imbalanced classes: loss weights, logit adjustment and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from mister_jax.errors import InputError

Sampling = Literal["shuffle", "balanced"]
"""Order of the training items: every item once per epoch, or draws that favor rare classes."""

CLASS_WEIGHTS = ("none", "balanced", "effective_number")
"""Names of class weights; a list of numbers is also allowed. See `class_weights`."""

# Hyperparameter of the effective number of samples, one of the values in arXiv 1901.05555.
_BETA = 0.999


def class_counts(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the number of items of each class, [C]; unlabeled items are not counted."""
    return np.bincount(label[label >= 0], minlength=num_classes)


def class_weights(
    method: str | Sequence[float], counts: np.ndarray, field: str = "class_weights"
) -> np.ndarray | None:
    """Returns the weight of each class in a loss.

    Args:
      method: Weighting method: "none" for no weights; "balanced" for the inverse of the class's
        count n; "effective_number" for the inverse of the effective number
        (1 - beta^n) / (1 - beta) with beta 0.999 (arXiv 1901.05555); or one positive number per
        class, as a sequence such as (1, 2, 0.5) or as text such as "1,2,0.5".
      counts: Number of training items of each class, [C].
      field: Name of the config field, for errors.

    Returns:
      Weights, [C] float32, or None for "none". The mean weight over the training items is 1, which
      keeps the scale of the loss.

    Raises:
      InputError: The method is unknown, the list is not one positive number per class, or no item
        has a label.
    """
    if not isinstance(method, str):
        method = ",".join(map(str, method))
    if method == "none":
        return None
    if method == "balanced":
        weights = 1 / np.maximum(counts, 1)
    elif method == "effective_number":
        weights = (1 - _BETA) / (1 - _BETA ** np.maximum(counts, 1))
    else:
        weights = _given_weights(method, len(counts), field)
    if not counts.sum():
        raise InputError(f"{field}={method} needs labels, but no item has one")
    return (weights * counts.sum() / (weights * counts).sum()).astype(np.float32)


def _given_weights(text: str, num_classes: int, field: str) -> np.ndarray:
    try:
        weights = np.array([float(value) for value in text.split(",")])
    except ValueError:
        weights = np.zeros(0)
    if len(weights) != num_classes or not (np.isfinite(weights) & (weights > 0)).all():
        raise InputError(
            f"{field}={text}; allowed: {', '.join(CLASS_WEIGHTS)}, or {num_classes} positive "
            "numbers separated by commas, one per class"
        )
    return weights


def logit_adjustment(strength: float, counts: np.ndarray) -> np.ndarray | None:
    """Returns the values that are added to the logits in the loss (arXiv 2007.07314).

    A model that is trained with adjusted logits learns to predict classes as if they were equally
    frequent. At prediction time, the model uses the logits without the adjustment.

    Args:
      strength: Factor of the classes' log frequencies. 0 disables the adjustment. With 1,
        minimizing the loss also maximizes the mean recall (Fisher consistency).
      counts: Number of training items of each class, [C]. Missing classes count as one item.

    Returns:
      strength * log frequency, [C] float32, or None if `strength` is 0.
    """
    if not strength:
        return None
    counts = np.maximum(counts, 1)
    return (strength * np.log(counts / counts.sum())).astype(np.float32)


def sampling_weights(
    sampling: Sampling, label: np.ndarray, lengths: np.ndarray, num_classes: int, field: str
) -> np.ndarray | None:
    """Returns the weights for drawing items, which are dialogues or single utterances.

    With "balanced", an item's weight is the mean of 1 / (class count) over its labeled utterances.
    If the items are single utterances in one length bucket, these weights draw all classes equally
    often. With several buckets, items are drawn within each bucket, so a class that is rare in a
    bucket of many items stays rarer. If the items are dialogues, these weights draw dialogues with
    rare classes more often.

    Args:
      sampling: "shuffle" or "balanced".
      label: Class of each utterance, in the order of the items, [N] int, -1 if unlabeled.
      lengths: Number of utterances in each item, [M] int.
      num_classes: Number of classes.
      field: Name of the config field, for errors.

    Returns:
      Positive weights, [M]; None for "shuffle".

    Raises:
      InputError: The sampling is unknown, or it is "balanced" and no utterance has a label.
    """
    if sampling not in get_args(Sampling):
        raise InputError(f"{field}={sampling}; allowed: {', '.join(get_args(Sampling))}")
    if sampling == "shuffle":
        return None
    inverse = 1 / np.maximum(class_counts(label, num_classes), 1)
    values = np.where(label >= 0, inverse[label], 0)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    sums = np.add.reduceat(values, starts)
    labeled = np.add.reduceat((label >= 0).astype(float), starts)
    if not labeled.any():
        raise InputError(f"{field}=balanced needs labels, but no utterance has one")
    means = sums / np.maximum(labeled, 1)
    # A dialogue without labels gets the smallest weight of the dialogues with labels.
    return np.where(labeled > 0, means, means[labeled > 0].min())
