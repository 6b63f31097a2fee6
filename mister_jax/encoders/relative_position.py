"""Relative positions with gates, which BEATs and WavLM share (arXiv 2110.13900)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


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


def relative_bias(embedding: nnx.Embed, config: Any, length: int) -> jax.Array:
    """Returns the ungated bias of each query and key, [K, N, N] float32, for N = `length`."""
    # Offsets key - query in the order 0 ... N - 1, -N ... -1.
    offsets = np.fft.ifftshift(np.arange(-length, length))
    buckets = position_buckets(offsets, config.num_buckets, config.max_distance)
    table = embedding.embedding[...].astype(jnp.float32)[buckets].T  # [K, 2N]
    # Rows of 2N - 1 from a repeated row of 2N: each starts one offset before the previous one.
    rows = jnp.tile(table, length)[:, : length * (2 * length - 1)]
    return rows.reshape(-1, length, 2 * length - 1)[..., :length]


def relative_gate(projected: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the gate of the bias for each query and head, [B, K, N, 1] float32.

    Args:
      projected: Projected input of each head, [B, N, K, 8].
      scale: Scale of each head, [K].
    """
    gates = projected.astype(jnp.float32)
    gates = jax.nn.sigmoid(gates.reshape(*gates.shape[:-1], 2, 4).sum(-1))  # [B, N, K, 2]
    update, reset = gates[..., 0], gates[..., 1]
    gate = update * (reset * scale.astype(jnp.float32) - 1) + 2  # [B, N, K]
    return jnp.moveaxis(gate, 1, 2)[..., None]
