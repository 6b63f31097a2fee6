"""Sizes and options of Whisper's encoder, and how they are read from a config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mister_jax.config_checks import check_at_least, check_rates
from mister_jax.encoders import frontends
from mister_jax.encoders.hf_config import check_fixed, read_fields
from mister_jax.errors import InputError
from mister_jax.nn.attention import Implementation
from mister_jax.nn.lora import LoRAConfig
from mister_jax.nn.scanned_layers import Remat

SAMPLES_PER_POSITION = 2 * frontends.FRAME_STEP

# Field of `WhisperConfig` -> its name in a config.json and the default of transformers.
_FIELDS: dict[str, tuple[str, Any]] = {
    "num_mel_bins": ("num_mel_bins", 80),
    "hidden_size": ("d_model", 384),
    "num_layers": ("encoder_layers", 4),
    "num_heads": ("encoder_attention_heads", 6),
    "mlp_dim": ("encoder_ffn_dim", 1536),
    "max_positions": ("max_source_positions", 1500),
    "dropout": ("dropout", 0.0),
    "attention_dropout": ("attention_dropout", 0.0),
    "activation_dropout": ("activation_dropout", 0.0),
}


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """Sizes and options of `Whisper`; the default sizes are those of large-v3.

    Attributes:
      num_mel_bins: Number of mel bins M.
      hidden_size: Hidden size D, even.
      num_layers: Number of layers L.
      num_heads: Number of heads K; divides `hidden_size`.
      mlp_dim: Hidden size of the feed-forward blocks.
      max_positions: Positions N of the padded clip, 1500 for 30 s.
      trim: Whether to cut the padding down to the longest clip of the batch, and to mask the rest
        of the padding in attention. Otherwise clips are padded to `max_positions`, and attention
        includes the padding, as in the reference. With trimming, time and memory are
        proportional to the length of the audio, but the outputs change: the convolutions give the
        same output as the reference, but attention does not include the silence after the clip. The
        size of the change depends on the weights and the clip. For a tiny model with random weights
        and clips of a fifth to a half of the window, it is 0.3 to 0.6 standard deviations of the
        outputs. Use the same setting for training and extraction.
      dropout: Dropout rate on the transformer's input and each block's output.
      attention_dropout: Dropout rate on the attention weights.
      activation_dropout: Dropout rate in the feed-forward blocks.
      mask_spectrogram: Whether to mask stretches of time and of mel bins in training, see
        `augment.mask_spectrogram`.
      lora: Low-rank paths, or None. Targets are "query", "key", "value" and "out" of the attention,
        and "mlp_in" and "mlp_out" of the feed-forward blocks.
      remat: Rematerialization, see `mister_jax.nn.ScannedLayers`.
      attention_implementation: Implementation of `jax.nn.dot_product_attention`.
      dtype: Type of the computation; spectrograms and softmaxes are float32.
      param_dtype: Type of the parameters.
    """

    num_mel_bins: int = 128
    hidden_size: int = 1280
    num_layers: int = 32
    num_heads: int = 20
    mlp_dim: int = 5120
    max_positions: int = 1500
    trim: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    mask_spectrogram: bool = False
    lora: LoRAConfig | None = None
    remat: Remat = "none"
    attention_implementation: Implementation | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        sizes = "num_mel_bins hidden_size num_layers num_heads mlp_dim max_positions"
        check_at_least(self, 1, *sizes.split())
        check_rates(self, "dropout", "attention_dropout", "activation_dropout")
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise ValueError(
                f"WhisperConfig.hidden_size={self.hidden_size}; allowed: even multiples of "
                f"num_heads={self.num_heads}"
            )

    @property
    def max_samples(self) -> int:
        """Maximum samples of a clip; longer clips are truncated."""
        return self.max_positions * SAMPLES_PER_POSITION

    @classmethod
    def tiny(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper tiny (8 M parameters), with `changes`."""
        return cls._with_sizes(384, 4, 6, **changes)

    @classmethod
    def base(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper base (21 M parameters), with `changes`."""
        return cls._with_sizes(512, 6, 8, **changes)

    @classmethod
    def small(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper small (88 M parameters), with `changes`."""
        return cls._with_sizes(768, 12, 12, **changes)

    @classmethod
    def medium(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper medium (307 M parameters), with `changes`."""
        return cls._with_sizes(1024, 24, 16, **changes)

    @classmethod
    def large_v2(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper large-v2 (637 M parameters), with `changes`."""
        return cls._with_sizes(1280, 32, 20, **changes)

    @classmethod
    def large_v3(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper large-v3 (637 M parameters), with `changes`."""
        return cls(**changes)

    @classmethod
    def _with_sizes(
        cls, hidden_size: int, num_layers: int, num_heads: int, **changes: Any
    ) -> WhisperConfig:
        sizes = {
            "num_mel_bins": 80,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "mlp_dim": 4 * hidden_size,
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], **changes: Any) -> WhisperConfig:
        """Reads the encoder's part of a `config.json` of model type "whisper", with `changes`.

        Absent fields have the default values of transformers.

        Raises:
          InputError: A field has a value that this architecture does not support.
        """
        check_fixed(config, {"model_type": "whisper", "activation_function": "gelu"})
        fields = read_fields(config, _FIELDS)
        try:
            return cls(**{**fields, **changes})
        except ValueError as error:
            raise InputError(f"config.json: {error}") from error
