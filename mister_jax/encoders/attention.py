"""Attention of the encoders."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mister_jax.nn import attention

MAX_CPU_SCORES = 2**22
"""Number of scores, 16 MiB, that are computed at once on a CPU; more would exceed its caches."""

# The sum of two of them is finite.
_MASKED = -0.4 * float(jnp.finfo(jnp.float32).max)


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array,
    bias: jax.Array | None = None,
    deterministic: bool = True,
    **options: Any,
) -> jax.Array:
    """Computes `mister_jax.nn.dot_product_attention`, on CPUs without dropout several times faster.

    Args:
      query: Queries, [B, T, K, head_dim].
      key: Keys, [B, S, K, head_dim].
      value: Values, [B, S, K, head_dim].
      mask: Whether a query may attend to a key, bool; broadcastable to [B, K, T, S]. The result of
        a query without any key is finite but has no meaning.
      bias: Summand of the scores, broadcastable to [B, K, T, S]; none by default.
      deterministic: Whether dropout is off.
      **options: Further options of `mister_jax.nn.dot_product_attention`.

    Returns:
      Weighted means of the values, [B, T, K, head_dim].
    """

    def default(*inputs: Any) -> jax.Array:
        query, key, value, mask, bias = inputs
        return attention.dot_product_attention(
            query, key, value, mask=mask, bias=bias, deterministic=deterministic, **options
        )

    inputs = query, key, value, mask, bias
    if not deterministic:  # The gradient is faster in the default form, unless clips are long.
        return default(*inputs)
    # Not `jax.default_backend()`: a program may be compiled for a TPU on a CPU.
    return jax.lax.platform_dependent(*inputs, cpu=attention_on_cpu, default=default)


def attention_on_cpu(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Computes `dot_product_attention` without dropout, in the form that is fastest on CPUs.

    XLA gives a softmax between two matrix products to its CPU library as one call if heads come
    before positions, the mask is a float summand, and the second product is normalized instead of
    the weights.
    """
    batch_size, num_queries, num_heads, head_dim = query.shape
    summand = jnp.where(mask, 0.0, _MASKED)
    if bias is not None:
        summand = summand + bias.astype(jnp.float32)
    summand = jnp.moveaxis(summand, 1, 0)  # [1 or K, B, T, S]
    query = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
    query, key, value = (jnp.moveaxis(x, 2, 0) for x in (query, key, value))
    if batch_size * num_heads * num_queries * key.shape[2] <= MAX_CPU_SCORES:
        attended = _attend(query, key, value, summand)
    else:
        last = len(summand) - 1
        attended = jax.lax.map(
            lambda k: _attend(query[k], key[k], value[k], summand[jnp.minimum(k, last)]),
            jnp.arange(num_heads),
        )
    return jnp.moveaxis(attended, 0, 2)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, summand: jax.Array) -> jax.Array:
    """Attends with scaled queries [..., T, head_dim]; returns [..., T, head_dim]."""
    scores = jnp.einsum("...td,...sd->...ts", query, key, preferred_element_type=jnp.float32)
    scores = scores + summand
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    attended = weights.astype(value.dtype) @ value
    return (attended / weights.sum(-1, keepdims=True)).astype(value.dtype)
