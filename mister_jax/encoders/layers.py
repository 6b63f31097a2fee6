"""Layers shared by several encoders.

Shape letters: B sequences, N tokens or frames, D hidden size, K heads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.encoders.attention import dot_product_attention
from mister_jax.nn.dropout import Dropout
from mister_jax.nn.lora import LoRALinear


class SelfAttention(nnx.Module):
    """Self-attention (arXiv 1706.03762) whose projections support LoRA.

    Args:
      config: Model config.
      key_bias: Whether the key projection has a bias. The bias has no effect on the result, but
        some checkpoints contain it.
      rngs: RNGs for parameter initialization.
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
        """Computes attention over the positions that the mask allows.

        Args:
          x: Finite input, [B, N, D].
          mask: Whether a query may attend to a key, [B, 1, N, N] bool (query, key). The query axis
            may have size 1.
          bias: Bias added to the scores, [B, K, N, N] (query, key); none by default.
          **options: Dropout arguments `deterministic` and `rngs`.

        Returns:
          Output, [B, N, D]. The output of a query without any key is finite but meaningless.
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
    """Base class of layers with self-attention and an MLP; subclasses place the LayerNorms.

    Args:
      config: Model config.
      epsilon: Epsilon of the LayerNorms.
      activation_dropout: Dropout rate inside the MLP.
      key_bias: Whether the key projection has a bias.
      gate: Module that computes the score bias from the attention's input and the ungated bias, or
        None.
      rngs: RNGs for parameter initialization.
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
        """Computes the attention block, [B, N, D], without its residual connection."""
        if self.gate is not None:
            bias = self.gate(x, bias, **options)
        return self.dropout(self.attention(x, mask, bias, **options), **options)

    def feed_forward(self, x: jax.Array, **options: Any) -> jax.Array:
        """Computes the MLP, [B, N, D], without its residual connection."""
        hidden = self.activation_dropout(gelu(self.mlp_in(x, **options)), **options)
        return self.dropout(self.mlp_out(hidden, **options), **options)


class PostNormLayer(TransformerLayer):
    """Layer with a LayerNorm after each residual connection."""

    def __call__(self, x: jax.Array, *inputs: Any, **options: Any) -> jax.Array:
        """Transforms x, [B, N, D]; `inputs` are the mask and bias of `attend`."""
        x = self.attention_norm(x + self.attend(x, *inputs, **options))
        return self.mlp_norm(x + self.feed_forward(x, **options))


class PreNormLayer(TransformerLayer):
    """Layer with a LayerNorm before the attention and before the MLP."""

    def __call__(self, x: jax.Array, *inputs: Any, **options: Any) -> jax.Array:
        """Transforms x, [B, N, D]; `inputs` are the mask and bias of `attend`."""
        x = x + self.attend(self.attention_norm(x), *inputs, **options)
        return x + self.feed_forward(self.mlp_norm(x), **options)


def dtypes(config: Any) -> dict[str, Any]:
    """Returns a config's `dtype` and `param_dtype` as keyword arguments of a layer."""
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def embedding(num_rows: int, config: Any, rngs: nnx.Rngs) -> nnx.Embed:
    """Creates an embedding whose vectors have the config's hidden size and `param_dtype`.

    The caller casts these vectors, which is cheaper than casting the whole table.
    """
    dtype = jnp.dtype(config.param_dtype)
    return nnx.Embed(num_rows, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)


def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact GELU in float32: x times the standard normal CDF."""
    # `jax.nn.gelu` uses erfc, which takes several times as long as erf on CPUs and TPUs.
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * 0.5**0.5))).astype(x.dtype)


def layer_norm(size: int, epsilon: float, config: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Creates a LayerNorm with a config's dtypes."""
    # The fast variance loses precision if a few dimensions are far larger than the others.
    return nnx.LayerNorm(
        size, epsilon=epsilon, use_fast_variance=False, rngs=rngs, **dtypes(config)
    )


def position_buckets(offsets: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each relative position, as in T5 (arXiv 1910.10683).

    Each small distance has a separate bucket. Larger distances share buckets that are spaced
    logarithmically.

    Args:
      offsets: Key positions minus query positions, integers.
      num_buckets: Number of buckets; the upper half is for keys after the query.
      max_distance: Distance beyond which all positions share the last bucket of their half.

    Returns:
      Buckets, integers from 0 to num_buckets - 1 with the shape of `offsets`.
    """
    half = num_buckets // 2
    num_exact = half // 2
    distance = np.abs(offsets)
    # Compute in float32 as in the reference, because rounding decides the bucket at some edges.
    scaled = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(num_exact))
    scaled = scaled / np.float32(np.log(max_distance / num_exact)) * np.float32(half - num_exact)
    far = np.minimum(num_exact + scaled.astype(np.int32), half - 1)
    return np.where(offsets > 0, half, 0) + np.where(distance < num_exact, distance, far)


def relative_bias(embedding: nnx.Embed, config: Any, length: int) -> jax.Array:
    """Returns the position bias for each query and key before gating, [K, N, N]; N is `length`."""
    # Offsets (key - query) in the order 0 ... N - 1, -N ... -1.
    offsets = np.fft.ifftshift(np.arange(-length, length))
    buckets = position_buckets(offsets, config.num_buckets, config.max_distance)
    table = embedding.embedding[...].astype(jnp.float32)[buckets].T  # [K, 2N]
    # Repeat the table of 2N offsets and split the result into rows of 2N - 1. Each row then starts
    # one offset earlier than the previous row, as required for the bias of the next query.
    rows = jnp.tile(table, length)[:, : length * (2 * length - 1)]
    return rows.reshape(-1, length, 2 * length - 1)[..., :length]


def relative_gate(projected: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the gate of the position bias for each query and head, [B, K, N, 1] float32.

    Args:
      projected: Projected input per head, [B, N, K, 8].
      scale: Scale per head, [K].
    """
    gates = projected.astype(jnp.float32)
    gates = jax.nn.sigmoid(gates.reshape(*gates.shape[:-1], 2, 4).sum(-1))  # [B, N, K, 2]
    update, reset = gates[..., 0], gates[..., 1]
    gate = update * (reset * scale.astype(jnp.float32) - 1) + 2  # [B, N, K]
    return jnp.moveaxis(gate, 1, 2)[..., None]
