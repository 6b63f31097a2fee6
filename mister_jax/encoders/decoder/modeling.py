"""Decoder-only transformers used as encoders: Llama 2 and 3, Qwen2 and 2.5, Vicuna.

They share one architecture: rotary positions, grouped-query attention, SwiGLU and RMSNorm
(arXiv 2302.13971, 2407.21783, 2407.10671). The output is hidden states; the language-model head,
the key-value cache and generation are not implemented. Shape letters: B sequences, N tokens,
D hidden size, K query heads, G key and value heads, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mister_jax.encoders.attention import dot_product_attention
from mister_jax.encoders.decoder.config import DecoderConfig, RopeScaling
from mister_jax.encoders.layers import dtypes
from mister_jax.nn.dropout import KeySource
from mister_jax.nn.lora import LoRALinear, add_lora
from mister_jax.nn.masking import positions_and_segment_mask
from mister_jax.nn.scanned_layers import SAVED_WITH_MLP, ScannedLayers

Rotation = tuple[jax.Array, jax.Array]
"""Cosine and sine of the rotation angles, [B, N, 1, head_dim / 2] each."""


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Returns the rotation angle per position of each pair of dimensions of a head.

    Args:
      head_dim: Size of a head.
      theta: Base of the wavelengths.
      scaling: Scaling of the rotations, or None.

    Returns:
      Angles in radians, [head_dim / 2] float32.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        turns = scaling.original_positions * frequencies / (2 * np.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        unscaled_share = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (unscaled_share + (1 - unscaled_share) / scaling.factor)
    return frequencies.astype(np.float32)


def _rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates x [B, N, heads, head_dim] by its positions (arXiv 2104.09864), in float32."""
    cosine, sine = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class GroupedQueryAttention(nnx.Module):
    """Causal attention in which query heads share key and value heads (arXiv 2305.13245).

    Args:
      config: Config of the model.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.implementation = config.attention_implementation
        query_dim = config.num_heads * config.head_dim
        key_dim = config.num_key_value_heads * config.head_dim
        options = dtypes(config) | {"use_bias": config.query_key_value_bias, "rngs": rngs}
        self.query = LoRALinear(config.hidden_size, query_dim, **options)
        self.key = LoRALinear(config.hidden_size, key_dim, **options)
        self.value = LoRALinear(config.hidden_size, key_dim, **options)
        self.out = LoRALinear(query_dim, config.hidden_size, **options | {"use_bias": False})

    def __call__(
        self, x: jax.Array, mask: jax.Array, rotation: Rotation, **options: Any
    ) -> jax.Array:
        """Transforms x [B, N, D], with mask [B, 1, N, N] bool that leaves each query a key."""

        def split_heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*x.shape[:2], -1, self.head_dim)

        attended = dot_product_attention(
            _rotate(split_heads(self.query(x, **options)), rotation),  # [B, N, K, head_dim]
            _rotate(split_heads(self.key(x, **options)), rotation),  # [B, N, G, head_dim]
            split_heads(self.value(x, **options)),
            mask=mask,
            is_causal=True,
            implementation=self.implementation,
        )
        return self.out(attended.reshape(*x.shape[:2], -1), **options)


class SwiGLU(nnx.Module):
    """Feed-forward block down(silu(gate(x)) * up(x)) (arXiv 2002.05202).

    Args:
      config: Config of the model.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        options = dtypes(config) | {"use_bias": False, "rngs": rngs}
        self.gate = LoRALinear(config.hidden_size, config.mlp_dim, **options)
        self.up = LoRALinear(config.hidden_size, config.mlp_dim, **options)
        self.down = LoRALinear(config.mlp_dim, config.hidden_size, **options)

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        """Transforms x [B, N, D]."""
        gate = checkpoint_name(self.gate(x, **options), SAVED_WITH_MLP)  # [B, N, mlp_dim]
        up = checkpoint_name(self.up(x, **options), SAVED_WITH_MLP)
        hidden = jax.nn.silu(gate) * up
        return self.down(hidden, **options)


class DecoderLayer(nnx.Module):
    """Attention and SwiGLU, each with an RMSNorm before it and a residual.

    Args:
      config: Config of the model.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        options = dtypes(config) | {"epsilon": config.norm_epsilon, "rngs": rngs}
        self.attention_norm = nnx.RMSNorm(config.hidden_size, **options)
        self.attention = GroupedQueryAttention(config, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.hidden_size, **options)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        rotation: Rotation,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Transforms x [B, N, D], with mask [B, 1, N, N] (query, key) bool."""
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        x = x + self.attention(self.attention_norm(x), mask, rotation, **options)
        return x + self.mlp(self.mlp_norm(x), **options)


class Decoder(nnx.Module):
    """Decoder-only transformer that returns the hidden states of whole sequences.

    Args:
      config: Sizes and options.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        # The embedding computes in its parameters' type: casting the whole table would cost more
        # than casting the rows that are looked up.
        param_dtype = jnp.dtype(config.param_dtype)
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=param_dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.layers = ScannedLayers(
            lambda rngs: DecoderLayer(config, rngs=rngs),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = nnx.RMSNorm(
            config.hidden_size, epsilon=config.norm_epsilon, rngs=rngs, **dtypes(config)
        )
        if config.lora is not None:
            add_lora(self, config.lora, rngs=rngs)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Returns the embeddings [B, N, D] of tokens [B, N] int."""
        return self.embedding(input_ids).astype(self.config.dtype)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        embeddings: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        rngs: KeySource | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """Encodes a batch of sequences.

        A token attends to itself and the tokens before it in its sequence, or segment. Outputs in
        padding are finite but have no meaning, and no output depends on the content of the padding.

        Args:
          input_ids: Tokens, [B, N] int.
          attention_mask: Whether a position holds a token, [B, N] bool; padding may be on either
            side. All true by default.
          embeddings: Token embeddings [B, N, D], instead of `input_ids`.
          positions: Positions, [B, N] int. By default the number of tokens before in the sequence,
            or segment, so that padding on either side gives the same positions.
          segment_ids: Number that changes from each sequence of a row to the next, [B, N] int, for
            several sequences packed in a row.
          deterministic: Whether dropout is off.
          rngs: Source of dropout keys.
          output_hidden_states: Whether to return all hidden states too.

        Returns:
          Hidden states of the last layer after the final norm, [B, N, D]. With
          `output_hidden_states` also all hidden states, [L + 1, B, N, D]: the embeddings and the
          output of each layer, the last one normalized, as in transformers.

        Raises:
          ValueError: Neither or both of `input_ids` and `embeddings` are given.
        """
        if (input_ids is None) == (embeddings is None):
            raise ValueError("Decoder: pass either input_ids or embeddings")
        x = embeddings if input_ids is None else self.embed(input_ids)
        assert x is not None
        mask = jnp.ones(x.shape[:2], bool) if attention_mask is None else attention_mask
        mask = jnp.asarray(mask).astype(bool)
        x = jnp.where(mask[..., None], x, 0).astype(self.config.dtype)  # [B, N, D]
        default_positions, same_sequence = positions_and_segment_mask(mask, segment_ids)
        positions = default_positions if positions is None else positions
        frequencies = rope_frequencies(
            self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        )
        angles = positions[..., None, None] * frequencies  # [B, N, 1, head_dim / 2]
        last, outputs = self.layers(
            x,
            same_sequence,
            (jnp.cos(angles), jnp.sin(angles)),
            deterministic=deterministic,
            rngs=rngs,
            output_hidden_states=output_hidden_states,
        )
        last = self.norm(last)
        if outputs is None:
            return last
        return last, jnp.concatenate([x[None], outputs[:-1], last[None]])
