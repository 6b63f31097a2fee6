"""Masked multi-head attention and co-attention between two streams."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mister_jax.nn.dropout import Dropout, KeySource
from mister_jax.nn.stacked_modules import StackedModules

Implementation = Literal["xla", "cudnn"]

_MAX_LENGTH = 4096
"""Maximum dialogue length for which attention dropout is independent of the padding."""


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array,
    bias: jax.Array | None = None,
    dropout: Dropout | None = None,
    max_length: int = 0,
    is_causal: bool = False,
    implementation: Implementation | None = None,
    deterministic: bool = True,
    rngs: KeySource | None = None,
) -> jax.Array:
    """Computes softmax(query key^T / sqrt(head_dim) + bias) value, with dropout on the weights.

    Without dropout, this function calls `jax.nn.dot_product_attention`, which has fused
    implementations but does not support dropout. With dropout, this function computes the weights
    itself, with the softmax in float32.

    Args:
      query: Queries, [B, T, K, head_dim].
      key: Keys, [B, S, K, head_dim]. Without dropout, the number of key heads may be a divisor of K
        (grouped-query attention).
      value: Values, shaped like the keys.
      mask: Whether a query may attend to a key, bool; broadcastable to [B, K, T, S]. If a query may
        not attend to any key, its result is finite but meaningless.
      bias: Bias added to the scores, broadcastable to [B, K, T, S]; none by default.
      dropout: Dropout layer for the attention weights; none by default.
      max_length: Length up to which T and S can be padded without changing which weights are
        dropped; requires one dropout key per example. By default, padding changes which weights
        are dropped.
      is_causal: Whether a query may attend only to keys at its position or before it.
      implementation: `implementation` of `jax.nn.dot_product_attention`; ignored with dropout.
      deterministic: Whether to disable dropout.
      rngs: Source of dropout keys.

    Returns:
      Weighted means of the values, [B, T, K, head_dim].
    """
    if deterministic or dropout is None or dropout.rate == 0.0:
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, is_causal=is_causal, implementation=implementation
        )
    if is_causal:
        mask = mask & jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool))
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionState:
    """Last W keys and values of an attention layer with a window, oldest first.

    Attributes:
      key: Keys, [B, W, attention_dim].
      value: Values, [B, W, attention_dim].
      mask: Keys that may be attended to, [B, W] bool.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array


class MultiHeadAttention(nnx.Module):
    """Multi-head scaled dot-product attention (arXiv 1706.03762).

    Args:
      query_dim: Input size of the query projection.
      key_dim: Input size of the key and value projections.
      out_dim: Output size.
      attention_dim: Total size of all heads.
      num_heads: Number of heads K; must divide `attention_dim`.
      window: Number W of keys that a query may attend to. For a query at position t, these are the
        keys at positions t - W + 1 to t. By default, all keys.
      dropout: Dropout rate of the attention weights.
      implementation: `implementation` of `jax.nn.dot_product_attention`; ignored with dropout.
      dtype: Computation dtype; the softmax is float32.
      param_dtype: Parameter dtype.
      rngs: RNGs for parameter initialization.

    Raises:
      ValueError: `num_heads` does not divide `attention_dim`.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        out_dim: int,
        *,
        attention_dim: int,
        num_heads: int,
        window: int | None = None,
        dropout: float = 0.0,
        implementation: Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if attention_dim % num_heads:
            raise ValueError(
                f"attention_dim={attention_dim}; allowed: a multiple of num_heads={num_heads}"
            )
        self.num_heads = num_heads
        self.window = window
        self.implementation = implementation
        self.dropout = Dropout(dropout)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = nnx.Linear(query_dim, attention_dim, **options)
        # A key bias would add the same value to all scores of a query. The softmax cancels this
        # value, so the gradient of the bias would be rounding noise.
        self.key_value = nnx.Linear(key_dim, 2 * attention_dim, use_bias=False, **options)
        self.value_bias = nnx.Param(jnp.zeros(attention_dim, param_dtype))
        self.out = nnx.Linear(attention_dim, out_dim, **options)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        key_mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Computes attention from the queries to the keys.

        Args:
          query: Input of the query projection, [B, T, query_dim]; finite, also at padded positions.
            Otherwise, the gradients are NaN.
          key: Input of the key and value projections, [B, S, key_dim].
          key_mask: Keys that may be attended to, [B, S] bool. If a query has no such key, the
            attended value is zero.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.

        Returns:
          Output, [B, T, out_dim].
        """
        key_mask = key_mask.astype(bool)
        k, v = self._keys_and_values(key, key_mask)
        mask = key_mask[:, None, None, :]  # B 1 1 S
        if self.window is not None:
            distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])  # T S
            mask = mask & (distance >= 0) & (distance < self.window)
        return self._attend(query, k, v, mask, deterministic=deterministic, rngs=rngs)

    def initial_state(self, batch_size: int) -> AttentionState:
        """Returns the state before the first `step`.

        Raises:
          ValueError: The attention has no window.
        """
        if self.window is None:
            raise ValueError("window=None; steps need a window")
        shape = (batch_size, self.window)
        zeros = jnp.zeros((*shape, self.query.out_features), self.query.dtype)
        return AttentionState(zeros, zeros, jnp.zeros(shape, bool))

    def step(
        self, state: AttentionState, query: jax.Array, key: jax.Array, key_mask: jax.Array
    ) -> tuple[AttentionState, jax.Array]:
        """Computes the output for the next query and adds its key to the window.

        Args:
          state: State after the previous step.
          query: Input of the query projection, [B, query_dim].
          key: Input of the key and value projections, [B, key_dim].
          key_mask: Whether the key may be attended to, [B] bool.

        Returns:
          The new state, and the output, [B, out_dim]. `__call__` with all queries and keys gives
          the same outputs.
        """
        mask = key_mask.astype(bool)[:, None]  # B 1
        new = AttentionState(*self._keys_and_values(key[:, None], mask), mask)
        state = jax.tree.map(
            lambda past, value: jnp.concatenate([past[:, 1:], value], axis=1), state, new
        )
        mask = state.mask[:, None, None, :]
        return state, self._attend(query[:, None], state.key, state.value, mask)[:, 0]

    def _keys_and_values(self, key: jax.Array, key_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Projects keys, [B, S, key_dim], to keys and values, [B, S, attention_dim]."""
        # A zero attention weight does not cancel NaN or infinity in a masked value.
        key = jnp.where(key_mask[..., None], key, 0)
        k, v = jnp.split(self.key_value(key), 2, axis=-1)
        return k, v + self.value_bias.astype(v.dtype)

    def _attend(
        self, query: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, **options: Any
    ) -> jax.Array:
        """Attends to keys and values; the mask is broadcastable to [B, 1, T, S]."""

        def split_heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], self.num_heads, -1)

        attended = dot_product_attention(
            split_heads(self.query(query)),  # B T K head_dim
            split_heads(k),  # B S K head_dim
            split_heads(v),
            mask=mask,
            dropout=self.dropout,
            max_length=_MAX_LENGTH,
            implementation=self.implementation,
            **options,
        )
        has_key = mask.any(-1).swapaxes(1, 2)[..., None]  # B T 1 1
        attended = jnp.where(has_key, attended, 0)
        return self.out(attended.reshape(*attended.shape[:2], -1))


class AttentionBlock(nnx.Module):
    """Attention, dropout, residual connection and LayerNorm.

    Args:
      dim: Size F of the streams.
      attention_dim: Total size of all heads.
      num_heads: Number of heads.
      window: Number of keys that a query may attend to; see `MultiHeadAttention`.
      attention_dropout: Dropout rate of the attention weights.
      dropout: Dropout rate of the attention's output.
      epsilon: Epsilon of the LayerNorm.
      implementation: Implementation of `jax.nn.dot_product_attention`.
      dtype: Computation dtype.
      param_dtype: Parameter dtype.
      rngs: RNGs for parameter initialization.
    """

    def __init__(
        self,
        dim: int,
        *,
        attention_dim: int,
        num_heads: int,
        window: int | None,
        attention_dropout: float,
        dropout: float,
        epsilon: float,
        implementation: Implementation | None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.attention = MultiHeadAttention(
            dim,
            dim,
            dim,
            attention_dim=attention_dim,
            num_heads=num_heads,
            window=window,
            dropout=attention_dropout,
            implementation=implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.dropout = Dropout(dropout)
        self.norm = nnx.LayerNorm(
            dim, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs
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
        """Transforms a stream by attention to valid keys.

        Args:
          x: Stream, [B, T, F]; finite, also at padded positions. Otherwise, the gradients are NaN.
          key: Keys, [B, S, F].
          key_mask: Keys that may be attended to, [B, S] bool.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.

        Returns:
          The new stream, [B, T, F].
        """
        attended = self.attention(x, key, key_mask, deterministic=deterministic, rngs=rngs)
        return self.norm(x + self.dropout(attended, deterministic=deterministic, rngs=rngs))

    def initial_state(self, batch_size: int) -> AttentionState:
        """Returns the state before the first `step`."""
        return self.attention.initial_state(batch_size)

    def step(
        self, state: AttentionState, x: jax.Array, key: jax.Array, key_mask: jax.Array
    ) -> tuple[AttentionState, jax.Array]:
        """Transforms the next x, [B, F], which attends to its own key, [B, F], and earlier keys."""
        state, attended = self.attention.step(state, x, key, key_mask)
        return state, self.norm(x + attended)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CoAttentionState:
    """State of a `CoAttentionLayer` with a window; both streams are stacked.

    Attributes:
      cross_attention: State of the cross-attention, arrays [2, B, ...].
      self_attention: State of the self-attention, arrays [2, B, ...].
    """

    cross_attention: AttentionState
    self_attention: AttentionState


class CoAttentionLayer(nnx.Module):
    """Cross-attention between two streams, followed by self-attention within each stream.

    Both streams have the same length and run as one batched computation. As in the cross-modal
    expert of MiSTER-E (arXiv 2602.23300, based on arXiv 1908.02265), the layer has no feed-forward
    block and no position embedding.

    Args:
      dim: Size F of both streams.
      attention_dim: Total size of all heads.
      num_heads: Number of heads.
      window: Number of keys that a query may attend to; see `MultiHeadAttention`.
      attention_dropout: Dropout rate of the attention weights.
      dropout: Dropout rate of each attention's output.
      epsilon: Epsilon of the LayerNorms.
      implementation: Implementation of `jax.nn.dot_product_attention`.
      dtype: Computation dtype.
      param_dtype: Parameter dtype.
      rngs: RNGs for parameter initialization.
    """

    def __init__(
        self,
        dim: int,
        *,
        attention_dim: int,
        num_heads: int,
        window: int | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        epsilon: float = 1e-6,
        implementation: Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def make_block(rngs: nnx.Rngs) -> AttentionBlock:
            return AttentionBlock(
                dim,
                attention_dim=attention_dim,
                num_heads=num_heads,
                window=window,
                attention_dropout=attention_dropout,
                dropout=dropout,
                epsilon=epsilon,
                implementation=implementation,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.cross_attention = StackedModules(make_block, 2, rngs=rngs)
        self.self_attention = StackedModules(make_block, 2, rngs=rngs)

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
        """Updates both streams.

        Both streams must be finite, also at padded positions. Otherwise, the gradients are NaN.

        Args:
          first: First stream, [B, T, F].
          second: Second stream, [B, T, F].
          first_mask: Positions of the first stream that may be attended to, [B, T] bool.
          second_mask: Positions of the second stream that may be attended to, [B, T] bool.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.

        Returns:
          The new streams, [B, T, F] each.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        streams = jnp.stack([first, second])  # 2 B T F
        masks = jnp.stack([first_mask, second_mask])  # 2 B T
        crossed = self.cross_attention(streams, streams[::-1], masks[::-1], **options)
        first, second = self.self_attention(crossed, crossed, masks, **options)
        return first, second

    def initial_state(self, batch_size: int) -> CoAttentionState:
        """Returns the state before the first `step`."""
        return CoAttentionState(
            self.cross_attention.initial_state(batch_size),
            self.self_attention.initial_state(batch_size),
        )

    def step(
        self,
        state: CoAttentionState,
        first: jax.Array,
        second: jax.Array,
        first_mask: jax.Array,
        second_mask: jax.Array,
    ) -> tuple[CoAttentionState, tuple[jax.Array, jax.Array]]:
        """Updates the next position of both streams.

        Args:
          state: State after the previous step.
          first: Next position of the first stream, [B, F].
          second: Next position of the second stream, [B, F].
          first_mask: Whether this position of the first stream may be attended to, [B] bool.
          second_mask: Whether this position of the second stream may be attended to, [B] bool.

        Returns:
          The new state, and the updated position of both streams, [B, F] each.
        """
        streams = jnp.stack([first, second])  # 2 B F
        masks = jnp.stack([first_mask, second_mask])  # 2 B
        cross_state, crossed = self.cross_attention.step(
            state.cross_attention, streams, streams[::-1], masks[::-1]
        )
        self_state, (first, second) = self.self_attention.step(
            state.self_attention, crossed, crossed, masks
        )
        return CoAttentionState(cross_state, self_state), (first, second)
