"""Layers that several encoders share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.encoders.attention import dot_product_attention
from mister_jax.nn.dropout import Dropout
from mister_jax.nn.lora import LoRALinear


class SelfAttention(nnx.Module):
    """Scaled dot-product self-attention (arXiv 1706.03762) with LoRA on any of the projections.

    Args:
      config: Config of the model.
      key_bias: Whether the key projection has a bias. It has no effect on the result but is part
        of some checkpoints.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: Any, *, key_bias: bool = True, rngs: nnx.Rngs):
        hidden_size, options = config.hidden_size, dtypes(config) | {"rngs": rngs}
        self.num_heads = config.num_heads
        self.implementation = config.attention_implementation
        self.query = LoRALinear(hidden_size, hidden_size, **options)
        self.key = LoRALinear(hidden_size, hidden_size, use_bias=key_bias, **options)
        self.value = LoRALinear(hidden_size, hidden_size, **options)
        self.out = LoRALinear(hidden_size, hidden_size, **options)
        self.dropout = Dropout(config.attention_dropout)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Attends from every position to the positions that the mask allows.

        Args:
          x: Finite input, [B, N, D].
          mask: Whether a query may attend to a key, [B, 1, N or 1, N] (query, key) bool.
          bias: Bias added to the scores, [B, K, N, N] (query, key); none by default.
          **options: `deterministic` and `rngs` of dropout.

        Returns:
          Output, [B, N, D]. For a query without any key it is finite but has no meaning.
        """

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


class TransformerLayer(nnx.Module):
    """Self-attention and a feed-forward block; the subclasses differ in the place of the norms.

    Args:
      config: Config of the model.
      epsilon: Epsilon of the LayerNorms.
      activation_dropout: Dropout rate in the feed-forward block.
      key_bias: Whether the key projection has a bias.
      gate: Module from the attention's input and `bias` to the summand of the scores, or None.
      rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        config: Any,
        *,
        epsilon: float,
        activation_dropout: float = 0.0,
        key_bias: bool = True,
        gate: nnx.Module | None = None,
        rngs: nnx.Rngs,
    ):
        hidden_size, options = config.hidden_size, dtypes(config) | {"rngs": rngs}
        self.gate = nnx.data(gate)
        self.attention = SelfAttention(config, key_bias=key_bias, rngs=rngs)
        self.attention_norm = layer_norm(hidden_size, epsilon, config, rngs)
        self.mlp_in = LoRALinear(hidden_size, config.mlp_dim, **options)
        self.mlp_out = LoRALinear(config.mlp_dim, hidden_size, **options)
        self.mlp_norm = layer_norm(hidden_size, epsilon, config, rngs)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(activation_dropout)

    def attend(
        self, x: jax.Array, mask: jax.Array, bias: jax.Array | None = None, **options: Any
    ) -> jax.Array:
        """Returns the attention's residual, [B, N, D]; see `SelfAttention`."""
        if self.gate is not None:
            bias = self.gate(x, bias, **options)
        return self.dropout(self.attention(x, mask, bias, **options), **options)

    def feed_forward(self, x: jax.Array, **options: Any) -> jax.Array:
        """Returns the feed-forward block's residual, [B, N, D]."""
        hidden = self.activation_dropout(gelu(self.mlp_in(x, **options)), **options)
        return self.dropout(self.mlp_out(hidden, **options), **options)


class PostNormLayer(TransformerLayer):
    """Layer with a LayerNorm after each residual."""

    def __call__(self, x: jax.Array, *inputs: Any, **options: Any) -> jax.Array:
        """Transforms x [B, N, D]; the inputs are the mask and bias of `attend`."""
        x = self.attention_norm(x + self.attend(x, *inputs, **options))
        return self.mlp_norm(x + self.feed_forward(x, **options))


class PreNormLayer(TransformerLayer):
    """Layer with a LayerNorm before each block."""

    def __call__(self, x: jax.Array, *inputs: Any, **options: Any) -> jax.Array:
        """Transforms x [B, N, D]; the inputs are the mask and bias of `attend`."""
        x = x + self.attend(self.attention_norm(x), *inputs, **options)
        return x + self.feed_forward(self.mlp_norm(x), **options)


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
