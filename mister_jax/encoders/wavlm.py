"""wav2vec 2.0, HuBERT and WavLM: speech encoders with one vector per 20 ms of audio.

The three models share one architecture (arXiv 2006.11477, 2106.07447, 2110.13900): convolutions
over the waveform, a positional convolution and a transformer. WavLM adds a gated relative position
bias. Heads and the masking in training are not implemented. Shape letters: B clips, S samples,
N frames of 20 ms, C convolution channels, D hidden size, K heads, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.config_checks import check_at_least, check_rates, invalid_field
from mister_jax.convert import key_table as keys
from mister_jax.encoders import frontends, hf_config
from mister_jax.encoders.layers import (
    PostNormLayer,
    PreNormLayer,
    dtypes,
    gelu,
    layer_norm,
    relative_bias,
    relative_gate,
)
from mister_jax.nn import ScannedLayers
from mister_jax.nn.dropout import Dropout, KeySource
from mister_jax.nn.lora import LoRALinear, add_lora
from mister_jax.nn.masking import length_mask

# Maps the fields of `WavLMConfig` to their names in a config.json and defaults in transformers.
_FIELDS: dict[str, tuple[str, Any]] = {
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "mlp_dim": ("intermediate_size", 3072),
    "conv_dims": ("conv_dim", (512,) * 7),
    "conv_kernels": ("conv_kernel", (10, 3, 3, 3, 3, 2, 2)),
    "conv_strides": ("conv_stride", (5, 2, 2, 2, 2, 2, 2)),
    "conv_bias": ("conv_bias", False),
    "conv_norm": ("feat_extract_norm", "group"),
    "projection_norm": ("feat_proj_layer_norm", True),
    "position_kernel": ("num_conv_pos_embeddings", 128),
    "position_groups": ("num_conv_pos_embedding_groups", 16),
    "norm_first": ("do_stable_layer_norm", False),
    "layer_norm_epsilon": ("layer_norm_eps", 1e-5),
    "dropout": ("hidden_dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.1),
    "projection_dropout": ("feat_proj_dropout", 0.0),
}
_WAVLM_FIELDS: dict[str, tuple[str, Any]] = {
    "num_buckets": ("num_buckets", 320),
    "max_distance": ("max_bucket_distance", 800),
}
# Options in a config.json that have only one supported value.
_FIXED_FIELDS = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "conv_pos_batch_norm": False,
    "add_adapter": False,
    "adapter_attn_dim": None,
}
_LARGE: dict[str, Any] = {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096}
_MODEL_TYPES = ("wav2vec2", "hubert", "wavlm")


@dataclasses.dataclass(frozen=True)
class WavLMConfig(hf_config.EncoderConfig):
    """Config of `WavLM`; the defaults match WavLM Base.

    Attributes:
      conv_dims: Number of channels C of each convolution over the waveform.
      conv_kernels: Kernel size of each convolution.
      conv_strides: Stride of each convolution.
      conv_bias: Whether the convolutions have a bias.
      conv_norm: Norm of the convolutions: "group" normalizes each channel of the first
        convolution over time; "layer" normalizes the channels at each time step, after every
        convolution.
      projection_norm: Whether a LayerNorm precedes the projection from C to D.
      position_kernel: Kernel size of the positional convolution.
      position_groups: Number of groups of the positional convolution; divides `hidden_size`.
      num_buckets: Total number of relative-position buckets for both directions. 0 disables the
        relative position bias, which only WavLM has.
      max_distance: Distance beyond which positions share the last bucket of their direction.
      norm_first: Whether a LayerNorm precedes each block and another one follows the last layer, as
        in the large models. Otherwise, a LayerNorm follows each residual connection.
      normalize: Whether the waveform is normalized to zero mean and unit variance. The value must
        match pretraining; the config of the feature extractor stores it as `do_normalize`.
      layer_norm_epsilon: Epsilon of the transformer's LayerNorms.
      dropout: Dropout rate on the transformer's input and each block's output.
      projection_dropout: Dropout rate on the projected output of the convolutions.

    The LoRA targets are "query", "key", "value" and "out" in the attention, "mlp_in" and "mlp_out"
    in the MLP, "/projection" (a complete path) after the convolutions, and "gate/projection" in
    WavLM's relative position bias.
    """

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    conv_dims: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_norm: Literal["group", "layer"] = "group"
    projection_norm: bool = True
    position_kernel: int = 128
    position_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    norm_first: bool = False
    normalize: bool = False
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    projection_dropout: float = 0.1

    def __post_init__(self):
        sizes = "hidden_size num_layers num_heads mlp_dim position_kernel position_groups"
        check_at_least(self, 1, *sizes.split())
        rates = "dropout attention_dropout activation_dropout projection_dropout"
        check_rates(self, *rates.split())
        for name in ("num_heads", "position_groups"):
            if self.hidden_size % getattr(self, name):
                raise invalid_field(self, name, f"divisors of hidden_size={self.hidden_size}")
        convolutions = (self.conv_dims, self.conv_kernels, self.conv_strides)
        equally_many = len(set(map(len, convolutions))) == 1
        if not equally_many or not all(min(sizes, default=0) > 0 for sizes in convolutions):
            raise ValueError(
                f"WavLMConfig.conv_dims={self.conv_dims}, conv_kernels={self.conv_kernels}, "
                f"conv_strides={self.conv_strides}; allowed: the same number of positive sizes, at "
                "least one"
            )
        if self.conv_norm not in ("group", "layer"):
            raise invalid_field(self, "conv_norm", "'group' and 'layer'")
        if self.num_buckets < 0 or self.num_buckets % 4 or self.max_distance < self.num_buckets:
            allowed = f"multiples of 4 up to max_distance={self.max_distance}"
            raise invalid_field(self, "num_buckets", allowed)

    @classmethod
    def wav2vec2_base(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of wav2vec 2.0 Base (94M parameters), with `changes`."""
        return cls(**{"num_buckets": 0, "normalize": True, **changes})

    @classmethod
    def hubert_base(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of HuBERT Base (94M parameters), with `changes`."""
        return cls(**{"num_buckets": 0, "normalize": True, **changes})

    @classmethod
    def wav2vec2_large(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of wav2vec 2.0 Large (316M parameters), with `changes`.

        This is the LibriSpeech model, which has the norms of the base models. The Libri-Light and
        XLS-R models have the norms of HuBERT Large.
        """
        return cls.wav2vec2_base(**{**_LARGE, **changes})

    @classmethod
    def hubert_large(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of HuBERT Large (315M parameters), with `changes`."""
        norms = {"conv_norm": "layer", "norm_first": True, "conv_bias": True}
        return cls.hubert_base(**{**_LARGE, **norms, **changes})

    @classmethod
    def wavlm_base(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of WavLM Base (94M parameters), with `changes`."""
        return cls(**changes)

    @classmethod
    def wavlm_base_plus(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of WavLM Base+ (Base trained on more audio), with `changes`."""
        return cls(**changes)

    @classmethod
    def wavlm_large(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of WavLM Large (315M parameters), with `changes`."""
        norms = {"conv_norm": "layer", "norm_first": True, "normalize": True}
        return cls(**{**_LARGE, **norms, **changes})

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], **changes: Any) -> WavLMConfig:
        """Reads a `config.json` with model type "wav2vec2", "hubert" or "wavlm".

        Missing fields have the defaults of transformers. `do_normalize`, which `read_config` adds
        from the feature extractor, defaults to the value of the published models. `changes` replace
        values of the config.

        Raises:
          InputError: The value of a field is not supported.
        """
        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise hf_config.unsupported("model_type", model_type, ", ".join(_MODEL_TYPES))
        hf_config.check_fixed(config, _FIXED_FIELDS)
        is_wavlm = model_type == "wavlm"
        fields = hf_config.read_fields(config, _FIELDS | (_WAVLM_FIELDS if is_wavlm else {}))
        if not is_wavlm:
            fields["num_buckets"] = 0
        published = not is_wavlm or fields["conv_norm"] == "layer"
        fields |= hf_config.read_fields(config, {"normalize": ("do_normalize", published)})
        return hf_config.make_config(cls, fields | changes)

    def num_frames(self, num_samples: Any) -> Any:
        """Returns the number of frames N in a clip with S samples, for an int or an array."""
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            num_samples = (num_samples - kernel) // stride + 1
        return num_samples * (num_samples > 0)

    @property
    def frame_size(self) -> int:
        """Receptive field of one frame in samples."""
        size = 1
        pairs = zip(self.conv_kernels, self.conv_strides, strict=True)
        for kernel, stride in reversed(list(pairs)):
            size = (size - 1) * stride + kernel
        return size


class MaskedChannelNorm(nnx.Module):
    """GroupNorm with one channel per group, computed over the valid steps of each sequence."""

    def __init__(self, config: WavLMConfig):
        num_channels, param_dtype = config.conv_dims[0], jnp.dtype(config.param_dtype)
        self.dtype = jnp.dtype(config.dtype)
        self.scale = nnx.Param(jnp.ones(num_channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_channels, param_dtype))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Normalizes x, [B, T, C], with statistics over the valid steps in the mask, [B, T]."""
        x, mask = x.astype(jnp.float32), mask[..., None]
        count = jnp.maximum(mask.sum(1, keepdims=True), 1)
        centered = x - jnp.where(mask, x, 0).sum(1, keepdims=True) / count
        variance = jnp.where(mask, centered**2, 0).sum(1, keepdims=True) / count  # [B, 1, C]
        normalized = centered * jax.lax.rsqrt(variance + 1e-5)
        return (normalized * self.scale[...] + self.bias[...]).astype(self.dtype)


class WaveformEncoder(nnx.Module):
    """Convolutions over the waveform, each followed by an optional norm and then GELU."""

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
            MaskedChannelNorm(config) if config.conv_norm == "group" else None
        )
        self.norms = nnx.List(
            layer_norm(dim, 1e-5, config, rngs) for dim in dims if config.conv_norm == "layer"
        )

    def __call__(self, waveform: jax.Array, lengths: jax.Array) -> jax.Array:
        """Encodes waveforms, [B, S], that are zero after `lengths`, [B]; returns [B, N, C]."""
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
    """Relative position bias with one gate per query and head (arXiv 2110.13900)."""

    def __init__(self, config: WavLMConfig, *, rngs: nnx.Rngs):
        options = dtypes(config)
        self.num_heads = config.num_heads
        self.projection = LoRALinear(
            config.hidden_size // config.num_heads, 8, quantizable=False, **options, rngs=rngs
        )
        self.scale = nnx.Param(jnp.ones(config.num_heads, options["param_dtype"]))

    def __call__(self, x: jax.Array, position_bias: jax.Array, **options: Any) -> jax.Array:
        """Returns the gated bias, [B, K, N, N], for x, [B, N, D], and a bias, [K, N, N] float32."""
        heads = x.reshape(*x.shape[:2], self.num_heads, -1)  # [B, N, K, head_dim]
        return relative_gate(self.projection(heads, **options), self.scale[...]) * position_bias


class WavLM(nnx.Module):
    """Encoder for wav2vec 2.0, HuBERT and WavLM.

    Args:
      config: Model config.
      rngs: RNGs for parameter initialization.
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
        layer_class = PreNormLayer if config.norm_first else PostNormLayer

        def make_layer(rngs: nnx.Rngs) -> nnx.Module:
            return layer_class(
                config,
                epsilon=epsilon,
                activation_dropout=config.activation_dropout,
                gate=GatedBias(config, rngs=rngs) if config.num_buckets else None,
                rngs=rngs,
            )

        self.layers = ScannedLayers(make_layer, config.num_layers, remat=config.remat, rngs=rngs)
        if config.lora is not None:
            add_lora(self, config.lora, rngs=rngs)

    def __call__(
        self,
        waveform: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """Encodes clips.

        The result for a clip does not depend on the rest of the batch, and equals the result of
        transformers for a batch of one clip. In larger batches, the group norm of transformers
        includes the padding.

        Args:
          waveform: Mono 16 kHz audio in [-1, 1], [B, S]; padding is ignored.
          lengths: Number of samples in each clip, [B] int.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.
          output_hidden_states: Whether to also return all hidden states.

        Returns:
          Hidden states, [B, N, D], and the mask of valid frames, [B, N] bool. N is
          `config.num_frames(S)`, at least 1; a clip shorter than `config.frame_size` has no valid
          frame. With `output_hidden_states`, also all hidden states, [L + 1, B, N, D]: the input of
          the first layer and the output of each layer, before the large models' last LayerNorm.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
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
            mask[:, None, None],
            self.relative_bias(x.shape[1]),
            output_hidden_states=output_hidden_states,
            **options,
        )
        last = self.norm(last) if config.norm_first else last
        if layers is None:
            return last, mask
        return last, mask, jnp.concatenate([x[None], layers])

    def relative_bias(self, num_frames: int) -> jax.Array | None:
        """Returns the relative position bias before gating, [K, N, N] float32.

        The result is None if `num_buckets` is 0.
        """
        if self.position_bias is None:
            return None
        return relative_bias(self.position_bias, self.config, num_frames)


NAME_RULES = keys.NameRules(
    prefixes=("", "wav2vec2.", "hubert.", "wavlm."),
    # Newer checkpoints use the names on the left for the gain and direction of weight
    # normalization.
    renamed={
        r"parametrizations\.weight\.original0$": "weight_g",
        r"parametrizations\.weight\.original1$": "weight_v",
    },
    unused=(r"^masked_spec_embed$",),
    heads=(
        r"^(quantizer|project_hid|project_q)\.",
        r"^(lm_head|classifier|projector|layer_weights|objective|tdnn)\b",
    ),
)
"""Variants of tensor names in wav2vec 2.0 and HuBERT checkpoints."""
WAVLM_NAME_RULES = dataclasses.replace(
    NAME_RULES, lora_bypassed=(r"\.attention\.(q_proj|k_proj|v_proj|out_proj)$",)
)
"""Variants of tensor names in WavLM checkpoints."""

# Maps a layer's modules to their names in transformers.
_LINEARS = {
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.out_proj",
    "mlp_in": "feed_forward.intermediate_dense",
    "mlp_out": "feed_forward.output_dense",
}
_NORMS = {"attention_norm": "layer_norm", "mlp_norm": "final_layer_norm"}


def key_table(config: WavLMConfig) -> keys.KeyTable:
    """Returns the tensor names in `Wav2Vec2Model`, `HubertModel` or `WavLMModel`."""
    num_layers = config.num_layers
    table = {
        **keys.linear("projection", "feature_projection.projection"),
        **keys.weight_norm_conv("position_convolution", "encoder.pos_conv_embed.conv"),
        **keys.norm("norm", "encoder.layer_norm"),
    }
    if config.projection_norm:
        table |= keys.norm("projection_norm", "feature_projection.layer_norm")
    for index in range(len(config.conv_dims)):
        path, name = "waveform_encoder", f"feature_extractor.conv_layers.{index}"
        table |= keys.conv(f"{path}/convolutions/{index}", f"{name}.conv", bias=config.conv_bias)
        if config.conv_norm == "layer":
            table |= keys.norm(f"{path}/norms/{index}", f"{name}.layer_norm")
        elif index == 0:
            table |= keys.norm(f"{path}/channel_norm", f"{name}.layer_norm")
    for path, name in _LINEARS.items():
        table |= keys.linear(f"layers/layers/{path}", f"encoder.layers.{{}}.{name}", num_layers)
    for path, name in _NORMS.items():
        table |= keys.norm(f"layers/layers/{path}", f"encoder.layers.{{}}.{name}", num_layers)
    if config.num_buckets:
        attention = "encoder.layers.{}.attention"
        gate, gate_name = "layers/layers/gate", f"{attention}.gru_rel_pos"
        table["position_bias/embedding"] = keys.parameter(
            f"{attention.format(0)}.rel_attn_embed.weight"
        )
        table |= keys.linear(f"{gate}/projection", f"{gate_name}_linear", num_layers)
        table[f"{gate}/scale"] = keys.Source(
            keys.layer_names(f"{gate_name}_const", num_layers),
            stacked=True,
            combine=lambda scales: scales[0].reshape(-1),
            split=lambda scale: [scale.reshape(1, -1, 1, 1)],
        )
    return table
