"""Sizes and options of wav2vec 2.0, HuBERT and WavLM, and how they are read from a config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mister_jax.config_checks import check_at_least, check_rates
from mister_jax.encoders.hf_config import check_fixed, read_fields
from mister_jax.errors import InputError
from mister_jax.nn.attention import Implementation
from mister_jax.nn.lora import LoRAConfig
from mister_jax.nn.scanned_layers import Remat

# Field of `WavLMConfig` -> its name in a config.json and the default of transformers.
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
# Supported values of the options that change the architecture.
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
class WavLMConfig:
    """Sizes and options of `WavLM`; the defaults are those of WavLM Base.

    Attributes:
      hidden_size: Hidden size D.
      num_layers: Number of layers L.
      num_heads: Number of heads K; divides `hidden_size`.
      mlp_dim: Hidden size of the feed-forward blocks.
      conv_dims: Channels C of each convolution over the waveform.
      conv_kernels: Kernel size of each convolution, in steps of the previous one.
      conv_strides: Stride of each convolution, in steps of the previous one.
      conv_bias: Whether the convolutions have a bias.
      conv_norm: Norm of the convolutions: "group" normalizes each channel of the first one
        over time, "layer" each step of all of them over the channels.
      projection_norm: Whether a LayerNorm precedes the projection of the convolutions to D.
      position_kernel: Kernel size of the positional convolution.
      position_groups: Groups of the positional convolution; divides `hidden_size`.
      num_buckets: Total number of relative-position buckets for both directions. 0 disables
        relative positions; of the supported models, only WavLM uses them.
      max_distance: Distance beyond which positions share the last bucket of their direction.
      norm_first: Whether the LayerNorms precede the blocks and one follows the last, as in the
        large models, instead of following each residual.
      normalize: Whether the waveform is normalized to zero mean and unit variance. Must be as in
        training, which a model's feature extractor records (`do_normalize`).
      layer_norm_epsilon: Epsilon of the transformer's LayerNorms.
      dropout: Dropout rate on the transformer's input and each block's output.
      attention_dropout: Dropout rate on the attention weights.
      activation_dropout: Dropout rate in the feed-forward blocks.
      projection_dropout: Dropout rate on the projected output of the convolutions.
      lora: Low-rank paths, or None. Targets are "query", "key", "value" and "out" of the attention,
        "mlp_in" and "mlp_out" of the feed-forward blocks, "/projection" of the convolutions, and
        "gate/projection" of WavLM's relative positions.
      remat: Rematerialization, see `mister_jax.nn.ScannedLayers`.
      attention_implementation: Implementation of `jax.nn.dot_product_attention`.
      dtype: Type of the computation; statistics of norms, softmaxes and gates are float32.
      param_dtype: Type of the parameters.
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
    lora: LoRAConfig | None = None
    remat: Remat = "none"
    attention_implementation: Implementation | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        sizes = "hidden_size num_layers num_heads mlp_dim position_kernel position_groups"
        check_at_least(self, 1, *sizes.split())
        rates = "dropout attention_dropout activation_dropout projection_dropout"
        check_rates(self, *rates.split())
        for name in ("num_heads", "position_groups"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"WavLMConfig.{name}={getattr(self, name)}; allowed: divisors of "
                    f"hidden_size={self.hidden_size}"
                )
        convolutions = (self.conv_dims, self.conv_kernels, self.conv_strides)
        equally_many = len(set(map(len, convolutions))) == 1
        if not equally_many or not all(min(sizes, default=0) > 0 for sizes in convolutions):
            raise ValueError(
                f"WavLMConfig.conv_dims={self.conv_dims}, conv_kernels={self.conv_kernels}, "
                f"conv_strides={self.conv_strides}; allowed: equally many positive sizes, at least "
                "one"
            )
        if self.conv_norm not in ("group", "layer"):
            raise ValueError(
                f"WavLMConfig.conv_norm={self.conv_norm!r}; allowed: 'group' and 'layer'"
            )
        if self.num_buckets < 0 or self.num_buckets % 4 or self.max_distance < self.num_buckets:
            raise ValueError(
                f"WavLMConfig.num_buckets={self.num_buckets}; allowed: multiples of 4 up to "
                f"max_distance={self.max_distance}"
            )

    @classmethod
    def wav2vec2_base(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of wav2vec 2.0 Base (94 M parameters), with `changes`."""
        return cls(**{"num_buckets": 0, "normalize": True, **changes})

    @classmethod
    def hubert_base(cls, **changes: Any) -> WavLMConfig:
        """Returns the config of HuBERT Base (94 M parameters), with `changes`."""
        return cls(**{"num_buckets": 0, "normalize": True, **changes})

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
        norms = {"conv_norm": "layer", "norm_first": True, "conv_bias": True}
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
        norms = {"conv_norm": "layer", "norm_first": True, "normalize": True}
        return cls(**{**_LARGE, **norms, **changes})

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], **changes: Any) -> WavLMConfig:
        """Reads a `config.json` of model type "wav2vec2", "hubert" or "wavlm", with `changes`.

        Absent fields have the default values of transformers. Whether the waveform is normalized
        is stored with the feature extractor; `read_config` adds its `do_normalize`. Without
        it, the value is that of the published models.

        Raises:
          InputError: A field has a value that this architecture does not support.
        """
        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise InputError(
                f"config.json: model_type={model_type!r}; allowed: {', '.join(_MODEL_TYPES)}"
            )
        check_fixed(config, _FIXED_FIELDS)
        is_wavlm = model_type == "wavlm"
        fields = read_fields(config, _FIELDS | (_WAVLM_FIELDS if is_wavlm else {}))
        if not is_wavlm:
            fields["num_buckets"] = 0
        published = not is_wavlm or fields["conv_norm"] == "layer"
        fields |= read_fields(config, {"normalize": ("do_normalize", published)})
        try:
            return cls(**{**fields, **changes})
        except ValueError as error:
            raise InputError(f"config.json: {error}") from error

    def num_frames(self, num_samples: Any) -> Any:
        """Returns the number of frames N of a clip of S samples, for an int or an array."""
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
