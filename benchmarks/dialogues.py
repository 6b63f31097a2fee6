"""Creates random dialogues with realistic lengths."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np

from mister_jax.data.batching import PlannedBatch
from mister_jax.models import MisterEConfig

Batch = dict[str, np.ndarray]


def iemocap_like_lengths() -> np.ndarray:
    """Returns lengths [120] that resemble IEMOCAP's training dialogues: mean 49, maximum 110.

    The lengths are quantiles of a normal distribution in a fixed random order. The largest quantile
    is replaced by 110, the maximum in the corpus. With a standard deviation of 16, about 32% of a
    batch of 8 is padding, close to the value for the corpus.
    """
    count, shortest, longest = 120, 8, 110
    normal = statistics.NormalDist(49, 16)
    quantiles = [normal.inv_cdf((index + 0.5) / count) for index in range(count)]
    lengths = np.clip(np.rint(quantiles), shortest, longest).astype(int)
    lengths[-1] = longest
    return np.random.default_rng(0).permutation(lengths)


LENGTHS: dict[str, Callable[[], np.ndarray]] = {"iemocap": iemocap_like_lengths}


def released_epoch(lengths: np.ndarray, batch_size: int) -> list[PlannedBatch]:
    """Plans an epoch as in the released code: random batches, padded to their longest dialogue."""
    order = np.random.default_rng(0).permutation(len(lengths))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [PlannedBatch(rows, int(lengths[rows].max())) for rows in batches]


def make_batch(config: MisterEConfig, lengths: np.ndarray, num_utterances: int) -> Batch:
    """Creates a batch as `data.batches` does, but with random vectors and labels.

    Args:
      config: Config of the model.
      lengths: Number of utterances in each dialogue, [B] int; 0 for an empty row.
      num_utterances: Padded length T.
    """
    random = np.random.default_rng(0)
    mask = np.arange(num_utterances) < lengths[:, None]

    def vectors(dim: int) -> np.ndarray:
        values = random.standard_normal((*mask.shape, dim), np.float32)
        return np.where(mask[..., None], values, 0)

    label = np.where(mask, random.integers(config.num_classes, size=mask.shape), -1)
    return {
        "speech": vectors(config.speech_dim),
        "text": vectors(config.text_dim),
        "mask": mask,
        "speech_present": mask,
        "text_present": mask,
        "label": label.astype(np.int32),
    }
