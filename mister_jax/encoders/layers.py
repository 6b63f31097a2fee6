"""Layers that several encoders share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mister_jax.encoders.attention import dot_product_attention
from mister_jax.nn.attention import Implementation
from mister_jax.nn.dropout import Dropout, KeySource
from mister_jax.nn.lora import LoRALinear


class SelfAttention(nnx.Module):
    """Scaled dot-product self-attention (arXiv 1706.03762) with LoRA on any of the projections.

    Args:
      hidden_size: Size D of the input and output.
      num_heads: Number of heads K; divides `hidden_size`.
      key_bias: Whether the key projection has a bias. It has no effect on the result but is part
        of some checkpoints.
      dropout: Dropout rate on the attention weights.
      implementation: Implementation of `jax.nn.dot_product_attention`, used without dropout.
      dtype: Type of the computation; the softmax is float32.
      param_dtype: Type of the parameters.
      rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        hidden_size: int,
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
        self.query = LoRALinear(hidden_size, hidden_size, **options)
        self.key = LoRALinear(hidden_size, hidden_size, use_bias=key_bias, **options)
        self.value = LoRALinear(hidden_size, hidden_size, **options)
        self.out = LoRALinear(hidden_size, hidden_size, **options)
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
        """Attends from every position to the positions that the mask allows.

        Args:
          x: Finite input, [B, N, D].
          mask: Whether a query may attend to a key, [B, 1, N or 1, N] (query, key) bool.
          bias: Bias added to the scores, [B, K, N, N] (query, key); none by default.
          deterministic: Whether dropout is off.
          rngs: Source of dropout keys.

        Returns:
          Output, [B, N, D]. For a query without any key it is finite but has no meaning.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}

        def split_heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*x.shape[:2], self.num_heads, -1)  # [B, N, K, head_dim]

        attended = dot_product_attention(
            split_heads(self.query(x, **options)),
            split_heads(self.key(x, **options)),
            split_heads(self.value(x, **options)),
            mask=mask,
            bias=bias,
            dropout=self.dropout,
            implementation=self.implementation,
            **options,
        )
        return self.out(attended.reshape(x.shape), **options)


def dtypes(config: Any) -> dict[str, Any]:
    """Returns the `dtype` and `param_dtype` of a config as arguments of a layer."""
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact GELU, x times the standard normal distribution function, in float32."""
    # `jax.nn.gelu` computes erfc, which takes several times as long as erf on CPUs and TPUs.
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * 0.5**0.5))).astype(x.dtype)


def layer_norm(size: int, epsilon: float, config: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Creates a LayerNorm with a config's types."""
    # The fast variance loses precision where a few dimensions are far larger than the others.
    return nnx.LayerNorm(
        size, epsilon=epsilon, use_fast_variance=False, rngs=rngs, **dtypes(config)
    )
