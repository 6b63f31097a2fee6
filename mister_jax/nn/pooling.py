"""Pooling of a sequence into one vector, over its valid positions only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over valid positions, in float32.

    Args:
      x: [B, N, D].
      mask: true at valid positions, [B, N] bool.

    Returns:
      [B, D] in the dtype of x; zeros for a sequence with no valid position.
    """
    total = jnp.where(mask[..., None], x, 0).astype(jnp.float32).sum(1)
    return (total / jnp.maximum(mask.sum(1), 1)[:, None]).astype(x.dtype)


class AttentiveStatisticsPooling(nnx.Module):
    """Attention-weighted mean and standard deviation (arXiv 1803.10963).

    h = tanh(W x), weight = softmax over valid positions of v . h, mean = sum w x,
    std = sqrt(max(sum w x^2 - mean^2, 1e-5)).

    Args:
      features: D, width of the input.
      attention_features: width of h; D by default.
      dtype: of the projections; the statistics are float32.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        features: int,
        attention_features: int | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = features if attention_features is None else attention_features
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.hidden = nnx.Linear(features, hidden, **options)
        self.score = nnx.Linear(hidden, 1, use_bias=False, **options)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Pools.

        Args:
          x: [B, N, D].
          mask: true at valid positions, [B, N] bool.

        Returns:
          [mean ; std] [B, 2 D] in the dtype of x; of a sequence with no valid position, the mean
          is zero and the deviation its floor.
        """
        x = jnp.where(mask[..., None], x, 0)
        scores = self.score(jnp.tanh(self.hidden(x)))[..., 0].astype(jnp.float32)  # B N
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0)[..., None]  # B N 1
        values = x.astype(jnp.float32)
        mean = (weights * values).sum(1)
        # About the mean, not E[x^2] - mean^2: the same in exact arithmetic, without cancellation.
        variance = (weights * (values - mean[:, None]) ** 2).sum(1)
        pooled = jnp.concatenate([mean, jnp.sqrt(jnp.maximum(variance, 1e-5))], axis=-1)
        return pooled.astype(x.dtype)
