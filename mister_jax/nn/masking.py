"""Padding masks and positions in encoders, for rows with padding or with several sequences.

`data.padding` makes the masks of dialogues.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def length_mask(lengths: jax.Array, size: int) -> jax.Array:
    """Returns a mask, [B, size] bool, that is True at the first `lengths`, [B], positions."""
    return jnp.arange(size) < lengths[:, None]


def positions_and_segment_mask(
    mask: jax.Array, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes token positions within each sequence and a mask for attention within sequences.

    Args:
      mask: Valid tokens, [B, N] bool. The padding may be at the start or at the end of a row.
      segment_ids: Index of each token's sequence, [B, N] int, for rows that contain several
        sequences one after another. By default, a row is one sequence.

    Returns:
      Positions, [B, N] int, and mask, [B, 1, N, N] bool. A token's position is the number of valid
      tokens before it in its sequence; positions in padding are meaningless. The mask is True where
      query and key belong to the same sequence. Padding counts as a separate sequence, so every
      query has a key.
    """
    if segment_ids is None:
        segment_ids = jnp.zeros(mask.shape, int)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)  # B N
    tokens_before = jnp.cumsum(mask, axis=1) - mask
    tokens_before_start = jax.lax.cummax(jnp.where(starts, tokens_before, 0), axis=1)
    sequence = jnp.where(mask, jnp.cumsum(starts, axis=1), 0)
    same_sequence = sequence[:, None, :, None] == sequence[:, None, None, :]
    return tokens_before - tokens_before_start, same_sequence
