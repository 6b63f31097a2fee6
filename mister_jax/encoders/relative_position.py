"""Buckets of relative positions, which BEATs and WavLM share."""

from __future__ import annotations

import numpy as np


def position_buckets(offsets: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each relative position, as in T5 (arXiv 1910.10683).

    Small distances have a bucket each; larger distances share logarithmically growing buckets.

    Args:
      offsets: Position of the key minus that of the query, integers.
      num_buckets: Number of buckets; the upper half is for keys after the query.
      max_distance: Distance beyond which all positions share the last bucket of their half.

    Returns:
      Buckets, integers from 0 to num_buckets - 1 in the shape of `offsets`.
    """
    half = num_buckets // 2
    num_exact = half // 2
    distance = np.abs(offsets)
    # float32 as in the reference, because the rounding decides at some of the edges.
    scaled = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(num_exact))
    scaled = scaled / np.float32(np.log(max_distance / num_exact)) * np.float32(half - num_exact)
    far = np.minimum(num_exact + scaled.astype(np.int32), half - 1)
    return np.where(offsets > 0, half, 0) + np.where(distance < num_exact, distance, far)
