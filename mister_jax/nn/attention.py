"""Masked multi-head attention, and the layer in which two streams attend to each other."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mister_jax.nn.dropout import Dropout, KeySource

Implementation = Literal["xla", "cudnn"]

_MAX_LENGTH = 4096
"""Dialogue length up to which attention dropout does not depend on the padding."""


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array,
    bias: jax.Array | None = None,
    dropout: Dropout | None = None,
    max_length: int = 0,
    implementation: Implementation | None = None,
    deterministic: bool = True,
    rngs: KeySource | None = None,
) -> jax.Array:
    """Computes softmax(query key^T / sqrt(head_dim) + bias) value, with dropout on the weights.

    Without dropout this is `jax.nn.dot_product_attention`, which has fused implementations but no
    dropout. With dropout the weights are computed here, with the softmax in float32.

    Args:
      query: Queries, [B, T, K, head_dim].
      key: Keys, [B, S, K, head_dim].
      value: Values, [B, S, K, head_dim].
      mask: Whether a query may attend to a key, bool; broadcastable to [B, K, T, S]. The result of
        a query without any key is finite but has no meaning.
      bias: Summand of the scores, broadcastable to [B, K, T, S]; none by default.
      dropout: Dropout of the attention weights; none by default.
      max_length: Length up to which T and S may be padded without changing which weights are
        dropped, given one dropout key per example. By default, the padding has an effect.
      implementation: Implementation of `jax.nn.dot_product_attention`, used without dropout.
      deterministic: Whether dropout is off.
      rngs: Source of dropout keys.

    Returns:
      Weighted means of the values, [B, T, K, head_dim].
    """
    if deterministic or dropout is None or dropout.rate == 0.0:
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, implementation=implementation
        )
    scores = jnp.einsum("btkd,bskd->bkts", query, key, preferred_element_type=jnp.float32)
    scores = scores / jnp.sqrt(query.shape[-1]) + (0 if bias is None else bias)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)  # B K T S
    lengths = (max(max_length, length) for length in weights.shape[2:])
    weights = dropout(
        weights,
        deterministic=deterministic,
        rngs=rngs,
        padded_shape=(*weights.shape[:2], *lengths),
    )
    return jnp.einsum("bkts,bskd->btkd", weights.astype(value.dtype), value)


class MultiHeadAttention(nnx.Module):
    """Scaled dot-product attention in several heads (arXiv 1706.03762).

    Args:
      query_features: width of the queries' input.
      key_features: width of the keys' and values' input.
      out_features: width of the output.
      width: of all heads together.
      num_heads: K; divides `width`.
      dropout: rate on the attention weights.
      implementation: of `jax.nn.dot_product_attention`, used where dropout is off.
      dtype: of the computation; the softmax is float32.
      param_dtype: of the parameters.

    Raises:
      ValueError: `num_heads` does not divide `width`.
    """

    def __init__(
        self,
        query_features: int,
        key_features: int,
        out_features: int,
        *,
        width: int,
        num_heads: int,
        dropout: float = 0.0,
        implementation: Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width % num_heads:
            raise ValueError(f"attention width {width} is not a multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.implementation = implementation
        self.dropout = Dropout(dropout)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = nnx.Linear(query_features, width, **options)
        # Keys have no bias: it would add the same to all scores of a query, which the softmax
        # takes out again, and its gradient would be rounding noise.
        self.key_value = nnx.Linear(key_features, 2 * width, use_bias=False, **options)
        self.value_bias = nnx.Param(jnp.zeros(width, param_dtype))
        self.out = nnx.Linear(width, out_features, **options)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        key_mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          query: [B, T, query_features].
          key: [B, S, key_features], keys and values.
          key_mask: true where a key may be attended to, [B, S] bool. A query with no key at all
            attends to nothing: its attention is zero, whatever the padding.

        Returns:
          [B, T, out_features].
        """

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], self.num_heads, -1)

        # A weight of zero does not undo a value that is not finite.
        key = jnp.where(key_mask[..., None], key, 0)
        q = heads(self.query(query))  # B T K W
        k, v = jnp.split(self.key_value(key), 2, axis=-1)
        k, v = heads(k), heads(v + self.value_bias.astype(v.dtype))  # B S K W
        mixed = dot_product_attention(
            q,
            k,
            v,
            mask=key_mask[:, None, None, :],
            dropout=self.dropout,
            max_length=_MAX_LENGTH,
            implementation=self.implementation,
            deterministic=deterministic,
            rngs=rngs,
        )
        mixed = jnp.where(key_mask.any(-1)[:, None, None, None], mixed, 0)
        return self.out(mixed.reshape(*mixed.shape[:2], -1))


class AttentionBlock(nnx.Module):
    """Attention, dropout, residual, LayerNorm: the unit both halves of a co-attention layer share.

    Args:
      width: F, of the streams.
      attention_dim: of all heads together.
      num_heads: K.
      attention_dropout: rate on the attention weights.
      dropout: rate on the block's output before the residual.
      epsilon: of the LayerNorm.
    """

    def __init__(
        self,
        width: int,
        *,
        attention_dim: int,
        num_heads: int,
        attention_dropout: float,
        dropout: float,
        epsilon: float,
        implementation: Implementation | None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.attention = MultiHeadAttention(
            width,
            width,
            width,
            width=attention_dim,
            num_heads=num_heads,
            dropout=attention_dropout,
            implementation=implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.dropout = Dropout(dropout)
        self.norm = nnx.LayerNorm(
            width, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(
        self,
        x: jax.Array,
        key: jax.Array,
        key_mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """x [B, T, F] attends to key [B, S, F] where key_mask [B, S]; gives [B, T, F]."""
        attended = self.attention(x, key, key_mask, deterministic=deterministic, rngs=rngs)
        return self.norm(x + self.dropout(attended, deterministic=deterministic, rngs=rngs))


class CoAttentionLayer(nnx.Module):
    """Two streams attend to each other in parallel, then each to itself.

    No feed-forward block and no positions (MiSTER-E, arXiv 2602.23300, cross-modal expert; after
    arXiv 1908.02265).

    Args:
      width: F, of both streams.
      attention_dim: of all heads together.
      num_heads: K.
      attention_dropout: rate on the attention weights.
      dropout: rate on each block's output before the residual.
      epsilon: of the LayerNorms.
    """

    def __init__(
        self,
        width: int,
        *,
        attention_dim: int,
        num_heads: int,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        epsilon: float = 1e-6,
        implementation: Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def block() -> AttentionBlock:
            return AttentionBlock(
                width,
                attention_dim=attention_dim,
                num_heads=num_heads,
                attention_dropout=attention_dropout,
                dropout=dropout,
                epsilon=epsilon,
                implementation=implementation,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.first_to_second, self.second_to_first = block(), block()
        self.first_self, self.second_self = block(), block()

    def __call__(
        self,
        first: jax.Array,
        second: jax.Array,
        first_mask: jax.Array,
        second_mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Both streams [B, T, F] with masks [B, T] of what may be attended to; gives both anew."""
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        crossed_first = self.first_to_second(first, second, second_mask, **options)
        crossed_second = self.second_to_first(second, first, first_mask, **options)
        return (
            self.first_self(crossed_first, crossed_first, first_mask, **options),
            self.second_self(crossed_second, crossed_second, second_mask, **options),
        )
