"""What the transformers share: self-attention, and which tokens of a row belong together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mister_jax.nn.attention import Implementation
from mister_jax.nn.dropout import Dropout, KeySource
from mister_jax.nn.lora import LoRALinear


class SelfAttention(nnx.Module):
    """Scaled dot-product attention of a sequence to itself (arXiv 1706.03762).

    The four projections are of their own, so that LoRA can be given to any of them.

    Args:
      width: D.
      num_heads: K; divides `width`.
      key_bias: keys have a bias. It has no effect on the result; checkpoints of some have it.
      dropout: rate on the attention weights.
      implementation: of `jax.nn.dot_product_attention`, used where dropout is off.
      dtype: of the computation; the softmax is float32.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        key_bias: bool = True,
        dropout: float = 0.0,
        implementation: Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.num_heads = num_heads
        self.implementation = implementation
        self.query = LoRALinear(width, width, **options)
        self.key = LoRALinear(width, width, use_bias=key_bias, **options)
        self.value = LoRALinear(width, width, **options)
        self.out = LoRALinear(width, width, **options)
        self.dropout = Dropout(dropout)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None = None,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          x: [B, N, D], finite.
          mask: true where a query may attend to a key [B, 1, N or 1, N] (query, key) bool.
          bias: added to the scores [B, K, N, N] (query, key), or None.

        Returns:
          [B, N, D]; finite, but without meaning, for a query with no key.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}

        def heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*x.shape[:2], self.num_heads, -1)  # B N K W

        query = heads(self.query(x, **options))
        key = heads(self.key(x, **options))
        value = heads(self.value(x, **options))
        if deterministic or self.dropout.rate == 0.0:
            mixed = jax.nn.dot_product_attention(
                query, key, value, bias, mask, implementation=self.implementation
            )
        else:
            scores = jnp.einsum("bqkw,bskw->bkqs", query, key, preferred_element_type=jnp.float32)
            scores = scores / jnp.sqrt(query.shape[-1]) + (0 if bias is None else bias)
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
            weights = self.dropout(jax.nn.softmax(scores, axis=-1), **options)  # B K N N
            mixed = jnp.einsum("bkqs,bskw->bqkw", weights.astype(value.dtype), value)
        return self.out(mixed.reshape(x.shape), **options)


def token_layout(mask: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Where the tokens of rows stand, which may be padded on either side or hold several sequences.

    Args:
      mask: true at tokens [B, N] bool.
      segment_ids: a number that changes from each sequence of a row to the next [B, N] int, or None
        where a row is one sequence.

    Returns:
      How many tokens each has before it in its sequence [B, N] int, of no meaning in padding; and
      which belong to one sequence [B, 1, N, N] bool. All padding counts as a sequence of its own,
      so that every query has a key.
    """
    if segment_ids is None:
        segment_ids = jnp.zeros(mask.shape, int)
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True)  # B N
    before = jnp.cumsum(mask, axis=1) - mask
    at_start = jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
    sequence = jnp.where(mask, jnp.cumsum(starts, axis=1), 0)
    together = sequence[:, None, :, None] == sequence[:, None, None, :]
    return before - at_start, together
