"""Buckets of relative positions, which BEATs and WavLM share."""

from __future__ import annotations

import numpy as np


def position_buckets(offsets: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Buckets of relative positions (arXiv 1910.10683): exact when near, logarithmic when far.

    Args:
      offsets: key's position less the query's, integers.
      num_buckets: the upper half of them is for keys after the query.
      max_distance: from here on, all share the last bucket of their half.

    Returns:
      Integers of the shape of `offsets`, 0 <= bucket < num_buckets.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offsets)
    # In float32, since rounding decides at some of the edges.
    scaled = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    scaled = scaled / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + scaled.astype(np.int32), half - 1)
    return np.where(offsets > 0, half, 0) + np.where(distance < exact, distance, far)
