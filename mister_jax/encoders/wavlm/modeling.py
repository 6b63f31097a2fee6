"""wav2vec 2.0, HuBERT and WavLM: speech encoders with one vector per 20 ms of audio.

They share one architecture (arXiv 2006.11477, 2106.07447, 2110.13900): convolutions over the
waveform, a positional convolution and a transformer, in WavLM with gated relative positions. Heads
and the masking of latents are not implemented. Shape letters: B clips, S samples, N frames of
20 ms, C convolution channels, D hidden size, K heads, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mister_jax.encoders import frontends
from mister_jax.encoders.layers import SelfAttention, dtypes, gelu, layer_norm
from mister_jax.encoders.relative_position import position_buckets
from mister_jax.encoders.wavlm.config import WavLMConfig
from mister_jax.nn import ScannedLayers
from mister_jax.nn.dropout import Dropout, KeySource
from mister_jax.nn.lora import LoRALinear, add_lora
from mister_jax.nn.masking import length_mask


class MaskedChannelNorm(nnx.Module):
    """GroupNorm with one channel per group, over the valid steps of each sequence.

    Args:
      num_channels: Number of channels C.
      dtype: Type of the output; the statistics are float32.
      param_dtype: Type of the parameters.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(num_channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_channels, param_dtype))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Normalizes x [B, N, C] with the statistics of the steps where mask [B, N] is true."""
        x, mask = x.astype(jnp.float32), mask[..., None]
        count = jnp.maximum(mask.sum(1, keepdims=True), 1)
        centered = x - jnp.where(mask, x, 0).sum(1, keepdims=True) / count
        variance = jnp.where(mask, centered**2, 0).sum(1, keepdims=True) / count  # [B, 1, C]
        normalized = centered * jax.lax.rsqrt(variance + 1e-5)
        return (normalized * self.scale[...] + self.bias[...]).astype(self.dtype)


class WaveformEncoder(nnx.Module):
    """Convolutions over the waveform, each followed by GELU, with the norms of the config.

    Args:
      config: Config of the model.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: WavLMConfig, *, rngs: nnx.Rngs):
        options = dtypes(config)
        dims = config.conv_dims
        self.strides = config.conv_strides
        self.kernel_sizes = config.conv_kernels
        self.convolutions = nnx.List(
            nnx.Conv(
                in_dim,
                out_dim,
                (kernel_size,),
                strides=stride,
                padding="VALID",
                use_bias=config.conv_bias,
                **options,
                rngs=rngs,
            )
            for in_dim, out_dim, kernel_size, stride in zip(
                (1, *dims[:-1]), dims, self.kernel_sizes, self.strides, strict=True
            )
        )
        self.channel_norm = nnx.data(
            MaskedChannelNorm(dims[0], **options) if config.conv_norm == "group" else None
        )
        self.norms = nnx.List(
            layer_norm(dim, 1e-5, config, rngs) for dim in dims if config.conv_norm == "layer"
        )

    def __call__(self, waveform: jax.Array, lengths: jax.Array) -> jax.Array:
        """Encodes waveform [B, S], zero from `lengths` [B] on; returns [B, N, C]."""
        x = waveform[..., None]
        for index, convolution in enumerate(self.convolutions):
            x = convolution(x)
            lengths = (lengths - self.kernel_sizes[index]) // self.strides[index] + 1
            if index == 0 and self.channel_norm is not None:
                x = self.channel_norm(x, length_mask(lengths, x.shape[1]))
            if self.norms:
                x = self.norms[index](x)
            x = gelu(x)
        return x


class GatedBias(nnx.Module):
    """Relative position bias with one gate per query and head (arXiv 2110.13900).

    Args:
      config: Config of the model.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: WavLMConfig, *, rngs: nnx.Rngs):
        options = dtypes(config)
        self.num_heads = config.num_heads
        self.projection = LoRALinear(
            config.hidden_size // config.num_heads, 8, quantizable=False, **options, rngs=rngs
        )
        self.scale = nnx.Param(jnp.ones(config.num_heads, options["param_dtype"]))

    def __call__(
        self,
        x: jax.Array,
        position_bias: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Gates the position bias.

        Args:
          x: Input of the attention, [B, N, D].
          position_bias: Bias of each query and key, [K, N, N] float32.
          deterministic: Whether dropout is off.
          rngs: Source of dropout keys.

        Returns:
          Gated bias, [B, K, N, N] float32.
        """
        heads = x.reshape(*x.shape[:2], self.num_heads, -1)  # [B, N, K, head_dim]
        gates = self.projection(heads, deterministic=deterministic, rngs=rngs)  # [B, N, K, 8]
        gates = gates.astype(jnp.float32)
        gates = jax.nn.sigmoid(gates.reshape(*gates.shape[:-1], 2, 4).sum(-1))  # [B, N, K, 2]
        update, reset = gates[..., 0], gates[..., 1]
        gate = update * (reset * self.scale[...].astype(jnp.float32) - 1) + 2  # [B, N, K]
        return jnp.moveaxis(gate, 1, 2)[..., None] * position_bias


class TransformerLayer(nnx.Module):
    """Modules that both types of layers share.

    Args:
      config: Config of the model.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: WavLMConfig, *, rngs: nnx.Rngs):
        hidden_size, options = config.hidden_size, dtypes(config) | {"rngs": rngs}
        self.gate = nnx.data(GatedBias(config, rngs=rngs) if config.num_buckets else None)
        self.attention = SelfAttention(
            hidden_size,
            config.num_heads,
            dropout=config.attention_dropout,
            implementation=config.attention_implementation,
            **options,
        )
        self.attention_norm = layer_norm(hidden_size, config.layer_norm_epsilon, config, rngs)
        self.mlp_in = LoRALinear(hidden_size, config.mlp_dim, **options)
        self.mlp_out = LoRALinear(config.mlp_dim, hidden_size, **options)
        self.mlp_norm = layer_norm(hidden_size, config.layer_norm_epsilon, config, rngs)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)

    def attend(
        self, x: jax.Array, key_mask: jax.Array, position_bias: jax.Array | None, **options: Any
    ) -> jax.Array:
        """Returns the attention's residual for x [B, N, D]."""
        bias = None
        if self.gate is not None and position_bias is not None:
            bias = self.gate(x, position_bias, **options)
        return self.dropout(self.attention(x, key_mask[:, None, None], bias, **options), **options)

    def feed_forward(self, x: jax.Array, **options: Any) -> jax.Array:
        """Returns the feed-forward block's residual for x [B, N, D]."""
        hidden = self.activation_dropout(gelu(self.mlp_in(x, **options)), **options)
        return self.dropout(self.mlp_out(hidden, **options), **options)


class PostNormLayer(TransformerLayer):
    """Layer with a LayerNorm after each residual, as in the base models."""

    def __call__(
        self, x: jax.Array, key_mask: jax.Array, position_bias: jax.Array | None, **options: Any
    ) -> jax.Array:
        """Transforms x [B, N, D], with key_mask [B, N] and position_bias [K, N, N] or None."""
        x = self.attention_norm(x + self.attend(x, key_mask, position_bias, **options))
        return self.mlp_norm(x + self.feed_forward(x, **options))


class PreNormLayer(TransformerLayer):
    """Layer with a LayerNorm before each block, as in the large models."""

    def __call__(
        self, x: jax.Array, key_mask: jax.Array, position_bias: jax.Array | None, **options: Any
    ) -> jax.Array:
        """Transforms x [B, N, D], with key_mask [B, N] and position_bias [K, N, N] or None."""
        x = x + self.attend(self.attention_norm(x), key_mask, position_bias, **options)
        return x + self.feed_forward(self.mlp_norm(x), **options)


class WavLM(nnx.Module):
    """Encoder of wav2vec 2.0, HuBERT and WavLM.

    Args:
      config: Sizes and options.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: WavLMConfig, *, rngs: nnx.Rngs):
        hidden_size, kernel_size = config.hidden_size, config.position_kernel
        epsilon, options = config.layer_norm_epsilon, dtypes(config) | {"rngs": rngs}
        self.config = config
        self.waveform_encoder = WaveformEncoder(config, rngs=rngs)
        self.projection_norm = nnx.data(
            layer_norm(config.conv_dims[-1], epsilon, config, rngs)
            if config.projection_norm
            else None
        )
        self.projection = LoRALinear(
            config.conv_dims[-1], hidden_size, quantizable=False, **options
        )
        self.projection_dropout = Dropout(config.projection_dropout)
        self.position_convolution = nnx.Conv(
            hidden_size,
            hidden_size,
            (kernel_size,),
            padding=[(kernel_size // 2, (kernel_size - 1) // 2)],
            feature_group_count=config.position_groups,
            **options,
        )
        self.position_bias = nnx.data(
            nnx.Embed(config.num_buckets, config.num_heads, **options)
            if config.num_buckets
            else None
        )
        self.norm = layer_norm(hidden_size, epsilon, config, rngs)
        self.dropout = Dropout(config.dropout)
        layer = PreNormLayer if config.norm_first else PostNormLayer
        self.layers = ScannedLayers(
            lambda rngs: layer(config, rngs=rngs),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )
        if config.lora is not None:
            add_lora(self, config.lora, rngs=rngs)

    def __call__(
        self,
        waveform: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes clips.

        The result for a clip equals that of the reference for this clip alone. (In a batch, the
        reference includes padding in the statistics of the group norm.)

        Args:
          waveform: Mono audio at 16 kHz with full scale 1, [B, S]; padding is not read.
          lengths: Number of samples in each clip, [B] int.
          deterministic: Whether dropout is off.
          rngs: Source of dropout keys.

        Returns:
          Hidden states [B, N, D], and a mask of the clip's frames [B, N] bool. N is
          `config.num_frames(S)`, at least 1; a clip shorter than `config.frame_size` has no frame.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        x, mask, _ = self._encode(waveform, lengths, **options)
        return (self.norm(x) if self.config.norm_first else x), mask

    def layer_outputs(
        self,
        waveform: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes clips as `__call__`, without the last LayerNorm of the large models.

        Returns:
          Input of the first layer and output of each layer [L + 1, B, N, D], and a mask of the
          clip's frames [B, N] bool.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        _, mask, layers = self._encode(waveform, lengths, output_hidden_states=True, **options)
        assert layers is not None
        return layers, mask

    def relative_bias(self, num_frames: int) -> jax.Array | None:
        """Returns the ungated bias, [K, N, N] (query, key) float32, or None without buckets."""
        if self.position_bias is None:
            return None
        config = self.config
        # Offsets key - query in the order 0 ... N - 1, -N ... -1.
        offsets = np.fft.ifftshift(np.arange(-num_frames, num_frames))
        buckets = position_buckets(offsets, config.num_buckets, config.max_distance)
        table = self.position_bias.embedding[...].astype(jnp.float32)[buckets].T  # [K, 2N]
        # Repeat the table, of 2N offsets, and cut the result into rows of 2N - 1. Each row then
        # starts one offset earlier than the row above it, as the bias of the next query must.
        size = 2 * num_frames
        rows = jnp.tile(table, num_frames)[:, : num_frames * (size - 1)]
        return rows.reshape(-1, num_frames, size - 1)[..., :num_frames]

    def _encode(
        self,
        waveform: jax.Array,
        lengths: jax.Array,
        *,
        output_hidden_states: bool = False,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns the last layer's output, the mask, and if requested all layers' outputs."""
        config = self.config
        lengths = jnp.minimum(lengths, waveform.shape[1])
        padding = max(0, config.frame_size - waveform.shape[1])
        waveform = jnp.pad(waveform, ((0, 0), (0, padding)))
        if config.normalize:
            waveform = frontends.normalize(waveform, lengths)
        else:
            waveform = jnp.where(length_mask(lengths, waveform.shape[1]), waveform, 0)
        x = self.waveform_encoder(waveform, lengths)  # [B, N, C]
        mask = length_mask(config.num_frames(lengths), x.shape[1])
        if self.projection_norm is not None:
            x = self.projection_norm(x)
        x = self.projection_dropout(self.projection(x, **options), **options)
        x = jnp.where(mask[..., None], x, 0)  # [B, N, D]
        x = x + gelu(self.position_convolution(x))
        x = self.dropout(x if config.norm_first else self.norm(x), **options)
        last, layers = self.layers(
            x,
            mask,
            self.relative_bias(x.shape[1]),
            output_hidden_states=output_hidden_states,
            **options,
        )
        return last, mask, None if layers is None else jnp.concatenate([x[None], layers])
