"""Adapts features to a model that was trained under other recording conditions.

A telephone line, noise or another microphone shifts acoustic measurements such as prosody far from
the measurements of the training recordings. Adaptation shifts and scales the new features toward
the mean and standard deviation of the training features. It needs no labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from mister_jax.data.schema import DialogueFeatures
from mister_jax.data.standardizer import Standardizer
from mister_jax.errors import InputError

# The statistics of very few utterances are unreliable. Therefore, the statistics of the new
# utterances are mixed with the training statistics, which count as this many utterances. The number
# was chosen on validation speakers; see docs/train_and_evaluate.md.
_PRIOR_UTTERANCES = 2

# Features are reported as shifted if the means of a tenth of the dimensions differ from training by
# more than `_MAX_SHIFT` standard deviations. For 30 unseen utterances recorded under the training
# conditions, the difference was at most 0.8.
_SHIFT_QUANTILE = 0.9
_MAX_SHIFT = 1.5
_MIN_UTTERANCES = 20


def adapt_features(
    features: DialogueFeatures, standardizers: Mapping[str, Standardizer]
) -> DialogueFeatures:
    """Shifts and scales features toward the mean and standard deviation in training.

    If the frequencies of the emotions differ greatly from those in training, for example if all
    utterances are angry, adaptation also removes a part of the emotional information.

    Args:
      features: Features of utterances recorded under similar conditions.
      standardizers: Standardizers of the model, by modality. Modalities without a standardizer do
        not change.

    Raises:
      InputError: The model does not standardize any modality.
    """
    check_adaptable(standardizers)
    adapted: dict[str, Any] = {}
    for modality, standardizer in standardizers.items():
        vectors, present = _vectors(features, modality)
        if not present.any():
            continue
        statistics = _mixed_statistics(vectors[present], standardizer)
        adapted[modality] = np.where(
            present[:, None],
            statistics(vectors) * standardizer.deviation + standardizer.mean,
            vectors,
        ).astype(vectors.dtype)
    return dataclasses.replace(features, **adapted)


def check_adaptable(standardizers: Mapping[str, Standardizer]) -> None:
    """Raises InputError if a model has no standardizers, whose statistics adaptation needs."""
    if not standardizers:
        raise InputError(
            "adapt_features: the model standardizes no features; needed: a model trained on "
            "standardized features, such as prosody (config.data.standardize)"
        )


def describe_shift(features: DialogueFeatures, standardizers: Mapping[str, Standardizer]) -> str:
    """Describes the modalities whose features are far from the training features.

    Returns:
      One line, empty if no modality differs, or if there are too few utterances to tell.
    """
    shifted = []
    for modality, standardizer in standardizers.items():
        vectors, present = _vectors(features, modality)
        if present.sum() < _MIN_UTTERANCES:
            continue
        shifts = np.abs(standardizer(vectors[present]).mean(0))
        shift = np.quantile(shifts, _SHIFT_QUANTILE)
        if shift > _MAX_SHIFT:
            shifted.append(f"a tenth of the {modality} features by at least {shift:.1f}")
    if not shifted:
        return ""
    return (
        f"the features differ from those of the training utterances ({', '.join(shifted)} standard "
        "deviations): the recordings may be of another kind, such as telephone calls or noisy "
        "ones; --adapt_features may help"
    )


def adapt_or_warn(
    features: DialogueFeatures, standardizers: Mapping[str, Standardizer], adapt: bool
) -> DialogueFeatures:
    """Adapts features if `adapt` is true; otherwise, logs a warning if the features are shifted."""
    if adapt:
        return adapt_features(features, standardizers)
    shift = describe_shift(features, standardizers)
    if shift:
        logging.warning("%s: %s", features.name, shift)
    return features


def _vectors(features: DialogueFeatures, modality: str) -> tuple[np.ndarray, np.ndarray]:
    return getattr(features, modality), getattr(features, f"{modality}_present")


def _mixed_statistics(vectors: np.ndarray, training: Standardizer) -> Standardizer:
    """Mixes the statistics of vectors [N, D] with the statistics of the training utterances."""
    vectors = vectors.astype(np.float64)
    weight = len(vectors) / (len(vectors) + _PRIOR_UTTERANCES)
    mean = weight * vectors.mean(0) + (1 - weight) * training.mean
    variance = weight * vectors.var(0) + (1 - weight) * training.deviation**2
    return Standardizer(mean, np.sqrt(variance))
