"""wav2vec 2.0, HuBERT and WavLM: encoders with a vector for every 20 ms of a waveform.

They share one architecture (arXiv 2006.11477, 2106.07447, 2110.13900): convolutions over the
waveform, a positional convolution, and a transformer, which has gated relative positions in WavLM.
Heads and the masking of latents are not implemented. Shape letters: B clips, S samples, N frames of
20 ms, C convolution channels, D width, K heads, W width of a head, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mister_jax.encoders import audio
from mister_jax.encoders.attention import SelfAttention
from mister_jax.encoders.beats import position_buckets
from mister_jax.encoders.fields import (
    check_fixed,
    check_positive,
    check_rates,
    layer_norm,
    read,
    types_of,
)
from mister_jax.errors import InputError
from mister_jax.nn import Stack
from mister_jax.nn.attention import Implementation
from mister_jax.nn.dropout import Dropout, KeySource
from mister_jax.nn.lora import LoRAConfig, LoRALinear, add_lora
from mister_jax.nn.stack import Remat

# Field of `WavLMConfig` -> its name in a config.json and the default of transformers.
_HUGGINGFACE: dict[str, tuple[str, Any]] = {
    "width": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "hidden_width": ("intermediate_size", 3072),
    "convolution_widths": ("conv_dim", (512,) * 7),
    "convolution_kernels": ("conv_kernel", (10, 3, 3, 3, 3, 2, 2)),
    "convolution_strides": ("conv_stride", (5, 2, 2, 2, 2, 2, 2)),
    "convolution_bias": ("conv_bias", False),
    "convolution_norm": ("feat_extract_norm", "group"),
    "projection_norm": ("feat_proj_layer_norm", True),
    "position_kernel": ("num_conv_pos_embeddings", 128),
    "position_groups": ("num_conv_pos_embedding_groups", 16),
    "norm_first": ("do_stable_layer_norm", False),
    "layer_norm_epsilon": ("layer_norm_eps", 1e-5),
    "dropout": ("hidden_dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "hidden_dropout": ("activation_dropout", 0.1),
    "projection_dropout": ("feat_proj_dropout", 0.0),
}
_HUGGINGFACE_WAVLM: dict[str, tuple[str, Any]] = {
    "num_buckets": ("num_buckets", 320),
    "max_distance": ("max_bucket_distance", 800),
}
# Supported values of the options that change the architecture.
_HUGGINGFACE_FIXED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "conv_pos_batch_norm": False,
    "add_adapter": False,
    "adapter_attn_dim": None,
}
_LARGE: dict[str, Any] = {"width": 1024, "num_layers": 24, "num_heads": 16, "hidden_width": 4096}
_MODEL_TYPES = ("wav2vec2", "hubert", "wavlm")


@dataclasses.dataclass(frozen=True)
class WavLMConfig:
    """Sizes and options of `WavLM`; the defaults are those of WavLM Base.

    Attributes:
      width: Hidden size D.
      num_layers: Number of layers L.
      num_heads: Number of heads K; divides `width`.
      hidden_width: Hidden size of the feed-forward blocks.
      convolution_widths: Channels C of each convolution over the waveform.
      convolution_kernels: Kernel size of each convolution, in steps of the previous one.
      convolution_strides: Stride of each convolution, in steps of the previous one.
      convolution_bias: Whether the convolutions have a bias.
      convolution_norm: Norm of the convolutions: "group" normalizes each channel of the first one
        over time, "layer" each step of all of them over the channels.
      projection_norm: Whether a LayerNorm precedes the projection of the convolutions to D.
      position_kernel: Kernel size of the positional convolution.
      position_groups: Groups of the positional convolution; divides `width`.
      num_buckets: Buckets of relative positions, both directions together; 0 for models without
        relative positions, which are all but WavLM.
      max_distance: Distance from which on relative positions share a bucket.
      norm_first: Whether the LayerNorms precede the blocks and one follows the last, as in the
        large models, instead of following each residual.
      normalise: Whether the waveform is normalized to zero mean and unit variance. The feature
        extractor of a model says what it was trained with (`do_normalize`).
      layer_norm_epsilon: Epsilon of the transformer's LayerNorms.
      dropout: Dropout rate on the transformer's input and each block's output.
      attention_dropout: Dropout rate on the attention weights.
      hidden_dropout: Dropout rate in the feed-forward blocks.
      projection_dropout: Dropout rate on the projected output of the convolutions.
      lora: Low-rank paths, or None. Targets are "query", "key" and "value" of the attention,
        "attention/out", "hidden" and "layers/out" of the feed-forward block, "/projection" of the
        convolutions, and "gate/projection" of WavLM's relative positions.
      remat: Rematerialization, see `mister_jax.nn.Stack`.
      attention_implementation: Implementation of `jax.nn.dot_product_attention`.
      dtype: Type of the computation; statistics of norms, softmaxes and gates are float32.
      param_dtype: Type of the parameters.
    """

    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    hidden_width: int = 3072
    convolution_widths: tuple[int, ...] = (512,) * 7
    convolution_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    convolution_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    convolution_bias: bool = False
    convolution_norm: Literal["group", "layer"] = "group"
    projection_norm: bool = True
    position_kernel: int = 128
    position_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    norm_first: bool = False
    normalise: bool = False
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.0
    projection_dropout: float = 0.1
    lora: LoRAConfig | None = None
    remat: Remat = "none"
    attention_implementation: Implementation | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        sizes = "width num_layers num_heads hidden_width position_kernel position_groups"
        check_positive(self, sizes.split())
        rates = "dropout attention_dropout hidden_dropout projection_dropout"
        check_rates(self, rates.split())
        for name in ("num_heads", "position_groups"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"WavLMConfig.{name}={getattr(self, name)}: must divide width={self.width}"
                )
        parts = (self.convolution_widths, self.convolution_kernels, self.convolution_strides)
        if len(set(map(len, parts))) > 1 or not all(min(part, default=0) > 0 for part in parts):
            raise ValueError(
                f"WavLMConfig.convolution_widths, kernels and strides {parts}: must be as many of "
                "each, at least one, and positive"
            )
        if self.convolution_norm not in ("group", "layer"):
            raise ValueError(
                f"WavLMConfig.convolution_norm={self.convolution_norm!r}: allowed are 'group' and "
                "'layer'"
            )
        if self.num_buckets < 0 or self.num_buckets % 4 or self.max_distance < self.num_buckets:
            raise ValueError(
                f"WavLMConfig.num_buckets={self.num_buckets}: must be a multiple of 4 and not "
                f"above max_distance={self.max_distance}"
            )

    @classmethod
    def wav2vec2_base(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of wav2vec 2.0 Base (94 M parameters), with `changes`."""
        return cls(**{"num_buckets": 0, "normalise": True, **changes})

    @classmethod
    def hubert_base(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of HuBERT Base (94 M parameters), with `changes`."""
        return cls(**{"num_buckets": 0, "normalise": True, **changes})

    @classmethod
    def wav2vec2_large(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of wav2vec 2.0 Large (316 M parameters), with `changes`.

        This is the model of LibriSpeech, with the norms of the base models. The models of
        Libri-Light and XLS-R have the norms of HuBERT Large.
        """
        return cls.wav2vec2_base(**{**_LARGE, **changes})

    @classmethod
    def hubert_large(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of HuBERT Large (315 M parameters), with `changes`."""
        norms = {"convolution_norm": "layer", "norm_first": True, "convolution_bias": True}
        return cls.hubert_base(**{**_LARGE, **norms, **changes})

    @classmethod
    def wavlm_base(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of WavLM Base (94 M parameters), with `changes`."""
        return cls(**changes)

    @classmethod
    def wavlm_base_plus(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of WavLM Base+ (Base trained on more audio), with `changes`."""
        return cls(**changes)

    @classmethod
    def wavlm_large(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of WavLM Large (315 M parameters), with `changes`."""
        norms = {"convolution_norm": "layer", "norm_first": True, "normalise": True}
        return cls(**{**_LARGE, **norms, **changes})

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], **changes: Any) -> WavLMConfig:
        """Reads a `config.json` of model type "wav2vec2", "hubert" or "wavlm", with `changes`.

        Absent fields have the default values of transformers. Whether the waveform is normalized
        is stored with the feature extractor; `hub.read_config` adds its `do_normalize`. Without
        it, the value is that of the published models.

        Raises:
          InputError: A field has a value that this architecture does not support.
        """
        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise InputError(
                f"config.json: model_type={model_type!r}: allowed are {', '.join(_MODEL_TYPES)}"
            )
        check_fixed(config, _HUGGINGFACE_FIXED)
        is_wavlm = model_type == "wavlm"
        fields = read(config, _HUGGINGFACE | (_HUGGINGFACE_WAVLM if is_wavlm else {}))
        if not is_wavlm:
            fields["num_buckets"] = 0
        published = not is_wavlm or fields["convolution_norm"] == "layer"
        fields |= read(config, {"normalise": ("do_normalize", published)})
        try:
            return cls(**{**fields, **changes})
        except ValueError as error:
            raise InputError(f"config.json: {error}") from error

    def num_frames(self, num_samples: Any) -> Any:
        """Returns the frames N of a clip of S samples, an int or an array; 0 below one frame."""
        for kernel, stride in zip(self.convolution_kernels, self.convolution_strides, strict=True):
            num_samples = (num_samples - kernel) // stride + 1
        return num_samples * (num_samples > 0)

    @property
    def frame_size(self) -> int:
        """Receptive field of one frame in samples."""
        size = 1
        pairs = zip(self.convolution_kernels, self.convolution_strides, strict=True)
        for kernel, stride in reversed(list(pairs)):
            size = (size - 1) * stride + kernel
        return size


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


class MaskedChannelNorm(nnx.Module):
    """GroupNorm with one channel per group, over the valid steps of each sequence.

    Args:
      width: Number of channels C.
      dtype: Type of the output; the statistics are float32.
      param_dtype: Type of the parameters.
    """

    def __init__(
        self, width: int, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32
    ):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(width, param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Normalizes x [B, N, C] with the statistics of the steps where mask [B, N] is true."""
        x, mask = x.astype(jnp.float32), mask[..., None]
        count = jnp.maximum(mask.sum(1, keepdims=True), 1)
        centred = x - jnp.where(mask, x, 0).sum(1, keepdims=True) / count
        variance = jnp.where(mask, centred**2, 0).sum(1, keepdims=True) / count  # B 1 C
        normed = centred * jax.lax.rsqrt(variance + 1e-5)
        return (normed * self.scale[...] + self.bias[...]).astype(self.dtype)


class WaveformEncoder(nnx.Module):
    """Convolutions over the waveform, with the norms of the config and GELU.

    Args:
      config: Config of the model.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: WavLMConfig, *, rngs: nnx.Rngs):
        options = types_of(config)
        widths = config.convolution_widths
        self.strides = config.convolution_strides
        self.kernel_sizes = config.convolution_kernels
        self.convolutions = nnx.List(
            nnx.Conv(
                wide_in,
                wide_out,
                (kernel,),
                strides=stride,
                padding="VALID",
                use_bias=config.convolution_bias,
                **options,
                rngs=rngs,
            )
            for wide_in, wide_out, kernel, stride in zip(
                (1, *widths[:-1]), widths, self.kernel_sizes, self.strides, strict=True
            )
        )
        self.channel_norm = nnx.data(
            MaskedChannelNorm(widths[0], **options) if config.convolution_norm == "group" else None
        )
        self.norms = nnx.List(
            layer_norm(width, 1e-5, config, rngs)
            for width in widths
            if config.convolution_norm == "layer"
        )

    def __call__(self, waveform: jax.Array, lengths: jax.Array) -> jax.Array:
        """Encodes waveform [B, S], zero from `lengths` [B] on; returns [B, N, C]."""
        x = waveform[..., None]
        for index, convolution in enumerate(self.convolutions):
            x = convolution(x)
            lengths = (lengths - self.kernel_sizes[index]) // self.strides[index] + 1
            if index == 0 and self.channel_norm is not None:
                x = self.channel_norm(x, audio.length_mask(lengths, x.shape[1]))
            if self.norms:
                x = self.norms[index](x)
            x = _gelu(x)
        return x


class GatedBias(nnx.Module):
    """Gate of each query and head for the relative position bias.

    Args:
      config: Config of the model.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: WavLMConfig, *, rngs: nnx.Rngs):
        options = types_of(config)
        self.num_heads = config.num_heads
        self.projection = LoRALinear(
            config.width // config.num_heads, 8, quantizable=False, **options, rngs=rngs
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
        heads = x.reshape(*x.shape[:2], self.num_heads, -1)  # B N K W
        gates = self.projection(heads, deterministic=deterministic, rngs=rngs)  # B N K 8
        gates = gates.astype(jnp.float32)
        gates = jax.nn.sigmoid(gates.reshape(*gates.shape[:-1], 2, 4).sum(-1))  # B N K 2
        update, reset = gates[..., 0], gates[..., 1]
        gate = update * (reset * self.scale[...].astype(jnp.float32) - 1) + 2  # B N K
        return jnp.moveaxis(gate, 1, 2)[..., None] * position_bias


class TransformerLayer(nnx.Module):
    """Modules that both types of layers share.

    Args:
      config: Config of the model.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: WavLMConfig, *, rngs: nnx.Rngs):
        width, options = config.width, types_of(config) | {"rngs": rngs}
        self.gate = nnx.data(GatedBias(config, rngs=rngs) if config.num_buckets else None)
        self.attention = SelfAttention(
            width,
            config.num_heads,
            dropout=config.attention_dropout,
            implementation=config.attention_implementation,
            **options,
        )
        self.attention_norm = layer_norm(width, config.layer_norm_epsilon, config, rngs)
        self.hidden = LoRALinear(width, config.hidden_width, **options)
        self.out = LoRALinear(config.hidden_width, width, **options)
        self.hidden_norm = layer_norm(width, config.layer_norm_epsilon, config, rngs)
        self.dropout = Dropout(config.dropout)
        self.hidden_dropout = Dropout(config.hidden_dropout)

    def attend(
        self, x: jax.Array, key_mask: jax.Array, position_bias: jax.Array | None, **options: Any
    ) -> jax.Array:
        """Returns the attention's residual for x [B, N, D]."""
        bias = None
        if self.gate is not None and position_bias is not None:
            bias = self.gate(x, position_bias, **options)
        return self.dropout(self.attention(x, key_mask[:, None, None], bias, **options), **options)

    def transform(self, x: jax.Array, **options: Any) -> jax.Array:
        """Returns the feed-forward block's residual for x [B, N, D]."""
        hidden = self.hidden_dropout(_gelu(self.hidden(x, **options)), **options)
        return self.dropout(self.out(hidden, **options), **options)


class NormLastLayer(TransformerLayer):
    """Layer with a LayerNorm after each residual, as in the base models."""

    def __call__(
        self, x: jax.Array, key_mask: jax.Array, position_bias: jax.Array | None, **options: Any
    ) -> jax.Array:
        """Transforms x [B, N, D], with key_mask [B, N] and position_bias [K, N, N] or None."""
        x = self.attention_norm(x + self.attend(x, key_mask, position_bias, **options))
        return self.hidden_norm(x + self.transform(x, **options))


class NormFirstLayer(TransformerLayer):
    """Layer with a LayerNorm before each block, as in the large models."""

    def __call__(
        self, x: jax.Array, key_mask: jax.Array, position_bias: jax.Array | None, **options: Any
    ) -> jax.Array:
        """Transforms x [B, N, D], with key_mask [B, N] and position_bias [K, N, N] or None."""
        x = x + self.attend(self.attention_norm(x), key_mask, position_bias, **options)
        return x + self.transform(self.hidden_norm(x), **options)


class WavLM(nnx.Module):
    """Encoder of wav2vec 2.0, HuBERT and WavLM.

    Args:
      config: Sizes and options.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: WavLMConfig, *, rngs: nnx.Rngs):
        channels, width, taps = config.convolution_widths[-1], config.width, config.position_kernel
        options = types_of(config) | {"rngs": rngs}
        self.config = config
        self.waveform_encoder = WaveformEncoder(config, rngs=rngs)
        self.projection_norm = nnx.data(
            layer_norm(channels, config.layer_norm_epsilon, config, rngs)
            if config.projection_norm
            else None
        )
        self.projection = LoRALinear(channels, width, quantizable=False, **options)
        self.projection_dropout = Dropout(config.projection_dropout)
        self.position_convolution = nnx.Conv(
            width,
            width,
            (taps,),
            padding=[(taps // 2, (taps - 1) // 2)],
            feature_group_count=config.position_groups,
            **options,
        )
        self.position_bias = nnx.data(
            nnx.Embed(config.num_buckets, config.num_heads, **options)
            if config.num_buckets
            else None
        )
        self.norm = layer_norm(width, config.layer_norm_epsilon, config, rngs)
        self.dropout = Dropout(config.dropout)
        layer = NormFirstLayer if config.norm_first else NormLastLayer
        self.layers = Stack(
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

        The result of a clip equals that of the reference for this clip alone. (In a batch, the
        reference includes padding in the statistics of the group norm.)

        Args:
          waveform: Mono audio at 16 kHz with full scale 1, [B, S]; padding is not read.
          lengths: Samples of each clip, [B] int.
          deterministic: Whether dropout is off.
          rngs: Source of dropout keys.

        Returns:
          Hidden states [B, N, D], and a mask of the clip's frames [B, N] bool. N is
          `config.num_frames(S)`, at least 1; a clip shorter than `config.frame_size` has no frame.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        x, mask, _ = self._run(waveform, lengths, False, **options)
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
        _, mask, layers = self._run(waveform, lengths, True, **options)
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
        table = self.position_bias.embedding[...].astype(jnp.float32)[buckets].T  # K 2N
        # Rows of 2N - 1 from a repeated row of 2N: each starts one offset before the previous one.
        size = 2 * num_frames
        rows = jnp.tile(table, num_frames)[:, : num_frames * (size - 1)]
        return rows.reshape(-1, num_frames, size - 1)[..., :num_frames]

    def _run(
        self, waveform: jax.Array, lengths: jax.Array, collect: bool, **options: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        config = self.config
        short = max(0, config.frame_size - waveform.shape[1])
        lengths = jnp.minimum(lengths, waveform.shape[1])
        waveform = jnp.pad(waveform, ((0, 0), (0, short)))
        if config.normalise:
            waveform = audio.normalise(waveform, lengths)
        else:
            waveform = jnp.where(audio.length_mask(lengths, waveform.shape[1]), waveform, 0)
        x = self.waveform_encoder(waveform, lengths)  # B N C
        mask = audio.length_mask(config.num_frames(lengths), x.shape[1])
        if self.projection_norm is not None:
            x = self.projection_norm(x)
        x = self.projection_dropout(self.projection(x, **options), **options)
        x = jnp.where(mask[..., None], x, 0)  # B N D
        x = x + _gelu(self.position_convolution(x))
        x = self.dropout(x if config.norm_first else self.norm(x), **options)
        bias = self.relative_bias(x.shape[1])
        last, layers = self.layers(x, mask, bias, collect=collect, **options)
        return last, mask, None if layers is None else jnp.concatenate([x[None], layers])
