"""Layers that pool the valid positions of a sequence into one vector."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes the mean over valid positions, in float32.

    Args:
      x: Sequences, [B, N, D].
      mask: Valid positions, [B, N] bool.

    Returns:
      Means in the dtype of x, [B, D]; zeros for a sequence without valid positions.
    """
    mask = mask.astype(bool)
    total = jnp.where(mask[..., None], x, 0).astype(jnp.float32).sum(1)
    return (total / jnp.maximum(mask.sum(1), 1)[:, None]).astype(x.dtype)


class AttentiveStatisticsPooling(nnx.Module):
    """Attention-weighted mean and standard deviation (arXiv 1803.10963).

    The weights are the softmax over valid positions of v . tanh(W x + b).

    Args:
      in_dim: Input size D.
      attention_dim: Hidden size; D by default.
      dtype: Dtype of the projections; the statistics are float32.
      param_dtype: Parameter dtype.
      rngs: RNGs for parameter initialization.
    """

    def __init__(
        self,
        in_dim: int,
        attention_dim: int | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        attention_dim = in_dim if attention_dim is None else attention_dim
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.hidden = nnx.Linear(in_dim, attention_dim, **options)
        self.score = nnx.Linear(attention_dim, 1, use_bias=False, **options)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Pools sequences.

        Args:
          x: Sequences, [B, N, D].
          mask: Valid positions, [B, N] bool.

        Returns:
          Mean and standard deviation, concatenated, in the dtype of x, [B, 2 D]. The standard
          deviation is at least sqrt(1e-5). A sequence without valid positions has mean 0.
        """
        x = jnp.where(mask[..., None], x, 0)
        scores = self.score(jnp.tanh(self.hidden(x)))[..., 0].astype(jnp.float32)  # B N
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0)[..., None]  # B N 1
        values = x.astype(jnp.float32)
        mean = (weights * values).sum(1)
        # E[x^2] - mean^2 would lose precision by cancellation.
        variance = (weights * (values - mean[:, None]) ** 2).sum(1)
        pooled = jnp.concatenate([mean, jnp.sqrt(jnp.maximum(variance, 1e-5))], axis=-1)
        return pooled.astype(x.dtype)
