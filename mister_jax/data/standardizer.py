"""Standardizes features, and decides which features need standardization."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mister_jax.data.schema import MODALITIES, DialogueFeatures
from mister_jax.errors import InputError

AUTO, NONE = "auto", "none"

# Standard deviations differ by at most a factor of 6 among the dimensions of neural embeddings
# (RoBERTa, MiniLM, wav2vec 2.0, CNN features), and by a factor of 30 or more among physical
# measurements (prosody).
_MAX_DEVIATION_RATIO = 10.0
_MAX_OUTLIER_RATIO = 100.0
_SCALE_RANGE = (0.01, 10.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Standardizer:
    """Standardizes features with a mean and a standard deviation per dimension, [D] float32."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def fit(cls, vectors: np.ndarray) -> Standardizer:
        """Returns the standardizer that maps vectors [N, D] to mean 0 and standard deviation 1."""
        vectors = vectors.astype(np.float64)
        deviation = np.where(_is_constant(vectors), 1, vectors.std(0))
        return cls(vectors.mean(0).astype(np.float32), deviation.astype(np.float32))

    @classmethod
    def identity(cls, dim: int) -> Standardizer:
        """Returns the standardizer that does not change vectors [N, dim]."""
        return cls(np.zeros(dim, np.float32), np.ones(dim, np.float32))

    def __call__(self, features: Any) -> Any:
        """Returns standardized features [..., D]."""
        return (features - self.mean) / self.deviation


def choose_standardizers(
    features: DialogueFeatures, choice: str | Sequence[str]
) -> tuple[dict[str, Standardizer], list[str]]:
    """Chooses the modalities to standardize, and fits their standardizers.

    Args:
        features: Training split.
        choice: Modalities to standardize, as a list or a comma-separated string; "none"; or "auto",
            which chooses each modality for which `why_standardize` returns a reason.

    Returns:
        Standardizers by modality, and notes that tell the user why "auto" chose these modalities.

    Raises:
        InputError: The choice is unknown, or no utterance of the split has a chosen modality.
    """
    names = choice.split(",") if isinstance(choice, str) else list(choice)
    names = [name.strip() for name in names if name.strip() not in ("", NONE)]
    if names != [AUTO] and any(name not in MODALITIES for name in names):
        raise InputError(
            f"config.data.standardize={choice!r}; allowed: {AUTO}, {NONE}, or some of "
            f"{', '.join(MODALITIES)}"
        )
    standardizers, notes = {}, []
    for modality in MODALITIES:
        vectors = getattr(features, modality)[getattr(features, f"{modality}_present")]
        if names == [AUTO]:
            reason = why_standardize(vectors)
            if not reason:
                continue
            notes.append(f"standardizing {modality}, {reason} (config.data.standardize=auto)")
        elif modality not in names:
            continue
        elif len(vectors) == 0:
            raise InputError(
                f"config.data.standardize: no utterance of dataset {features.name}, split "
                f"{features.split} has {modality!r}; allowed: modalities that are present"
            )
        standardizers[modality] = Standardizer.fit(vectors)
    return standardizers, notes


def why_standardize(vectors: np.ndarray) -> str:
    """Returns the reason to standardize vectors [N, D], or an empty string if there is none.

    Vectors need standardization if the standard deviations of their dimensions differ greatly, as
    in features with physical units (Hz, decibels, fractions), or if the median root mean square of
    the dimensions is far from 1. Constant dimensions are ignored.
    """
    vectors = vectors.astype(np.float64)
    vectors = vectors[:, ~_is_constant(vectors)] if len(vectors) else vectors[:, :0]
    if vectors.size == 0:
        return ""
    deviation = vectors.std(0)
    low, median, high = np.quantile(deviation, [0.05, 0.5, 0.95])
    scale = float(np.median(np.sqrt((vectors**2).mean(0))))
    if high > _MAX_DEVIATION_RATIO * low:
        return f"whose dimensions differ {high / low:.0f}-fold in scale"
    if deviation.max() > _MAX_OUTLIER_RATIO * median:
        return f"with a dimension whose scale is {deviation.max() / median:.0f} times the median"
    if not _SCALE_RANGE[0] <= scale <= _SCALE_RANGE[1]:
        return f"whose values are around {scale:.2g}"
    return ""


def _is_constant(vectors: np.ndarray) -> np.ndarray:
    """Returns which dimensions of vectors [N, D] float64 are constant, as [D] bool."""
    return vectors.std(0) < 1e-6 * np.maximum(1, np.abs(vectors).max(0))
