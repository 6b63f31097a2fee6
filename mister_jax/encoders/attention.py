"""Attention for the encoders, with implementations for different platforms."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mister_jax.nn import attention
from mister_jax.nn.dropout import Dropout

MAX_CPU_SCORES = 2**22
"""Number of scores (16 MiB) above which a CPU computes one head at a time.

More scores would exceed the CPU's caches.
"""

MAX_TPU_SCORES = 2**22
"""Number of scores per example (16 MiB) above which a TPU computes one key head at a time."""

# Score of a masked key. Even the sum of two such values (mask and bias) is finite in float32.
_MASKED = -0.4 * float(jnp.finfo(jnp.float32).max)

Bias = jax.Array | tuple[jax.Array, ...] | None
"""Bias added to the scores, or factors whose product is the bias; all arrays are 4D."""


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array,
    bias: Bias = None,
    dropout: Dropout | None = None,
    is_causal: bool = False,
    deterministic: bool = True,
    **options: Any,
) -> jax.Array:
    """Computes `mister_jax.nn.dot_product_attention` with the fastest implementation.

    There are special implementations for non-causal inference on CPUs, and for long inputs without
    dropout on TPUs.

    Args:
      query: Queries, [B, T, K, head_dim].
      key: Keys, [B, S, G, head_dim], where G divides K; with dropout, G must be K.
      value: Values, [B, S, G, head_dim].
      mask: Whether a query may attend to a key, bool; broadcastable to [B, K, T, S]. If a query may
        not attend to any key, its result is finite but meaningless.
      bias: Bias added to the scores, broadcastable to [B, K, T, S], or a tuple of its factors.
      dropout: Dropout layer for the attention weights.
      is_causal: Whether a query may attend only to keys at its position or before it.
      deterministic: Whether to disable dropout.
      **options: Further options of `mister_jax.nn.dot_product_attention`.

    Returns:
      Weighted means of the values, [B, T, K, head_dim].
    """
    factors = bias if isinstance(bias, tuple) else () if bias is None else (bias,)

    def default(*inputs: Any) -> jax.Array:
        query, key, value, mask, factors = inputs
        return attention.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            bias=_product(factors),
            dropout=dropout,
            is_causal=is_causal,
            deterministic=deterministic,
            **options,
        )

    inputs = query, key, value, mask, factors
    has_dropout = not deterministic and dropout is not None and dropout.rate > 0
    forms: dict[str, Any] = {}
    if not has_dropout and options.get("implementation") is None:
        # The CPU implementation is only for inference. In training, it is faster than the default
        # only for long inputs. If the bias is a product of factors, the default is faster, because
        # the CPU implementation would store the product.
        equal_heads = query.shape[2] == key.shape[2]
        if deterministic and not is_causal and equal_heads and len(factors) < 2:
            forms["cpu"] = attention_on_cpu
        if math.prod(query.shape[1:3]) * key.shape[1] > MAX_TPU_SCORES:
            forms["tpu"] = functools.partial(attention_on_tpu, is_causal=is_causal)
    # `jax.default_backend()` would be wrong if a CPU host compiles the program for a TPU.
    return jax.lax.platform_dependent(*inputs, **forms, default=default)


def _product(factors: tuple[jax.Array, ...]) -> jax.Array | None:
    return math.prod(factors[1:], start=factors[0]) if factors else None


def attention_on_cpu(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    factors: tuple[jax.Array, ...],
) -> jax.Array:
    """Computes `dot_product_attention` without dropout, optimized for CPUs.

    XLA can compile two matrix products with a softmax between them to one call of its CPU library.
    This requires that heads come before positions, that the mask is added to the scores as a float,
    and that the weights are normalized after the second product.
    """
    batch_size, num_queries, num_heads, head_dim = query.shape
    summand, bias = jnp.where(mask, 0.0, _MASKED), _product(factors)
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
    """Computes attention for scaled queries; `summand` is the mask plus the bias."""
    scores = jnp.einsum("...td,...sd->...ts", query, key, preferred_element_type=jnp.float32)
    scores = scores + summand
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    attended = weights.astype(value.dtype) @ value
    return (attended / weights.sum(-1, keepdims=True)).astype(value.dtype)


def attention_on_tpu(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    factors: tuple[jax.Array, ...],
    *,
    is_causal: bool,
) -> jax.Array:
    """Computes `dot_product_attention` without dropout, one key head at a time.

    For long inputs, the scores of all heads exceed a TPU's on-chip memory, and moving the scores to
    and from device memory takes longer than the matrix products. The scores of a single head stay
    on the chip. Heads that are sharded over devices are gathered first.
    """
    summands = (mask, *factors)
    is_per_head = [summand.shape[1] > 1 for summand in summands]

    # The backward pass recomputes the scores, because storing the scores of all heads is slower.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(inputs: tuple[list[jax.Array], list[jax.Array]]) -> jax.Array:
        (query, key, value), per_head = inputs
        head_summands = iter(per_head)
        mask, *factors = (
            next(head_summands) if varies else summand
            for summand, varies in zip(summands, is_per_head, strict=True)
        )
        return jax.nn.dot_product_attention(
            query, key, value, _product(tuple(factors)), mask, is_causal=is_causal
        )

    def heads_first(x: jax.Array, axis: int) -> jax.Array:
        split = x.reshape(*x.shape[:axis], key.shape[2], -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(split, axis, 0)

    heads = [heads_first(x, axis=2) for x in (query, key, value)]
    per_head = [
        heads_first(summand, axis=1)
        for summand, varies in zip(summands, is_per_head, strict=True)
        if varies
    ]
    attended = jax.lax.map(attend, (heads, per_head))  # [G, B, T, K / G, head_dim]
    return jnp.moveaxis(attended, 0, 2).reshape(query.shape)
