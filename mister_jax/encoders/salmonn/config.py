"""Configs of the parts of SALMONN."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mister_jax.encoders import frontends
from mister_jax.encoders.beats import BeatsConfig
from mister_jax.encoders.decoder import DecoderConfig
from mister_jax.encoders.whisper import WhisperConfig
from mister_jax.errors import InputError
from mister_jax.nn.attention import Implementation
from mister_jax.nn.lora import LoRAConfig


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Sizes of `WindowQFormer`; the defaults are SALMONN's.

    Attributes:
      hidden_size: Size of the queries.
      num_layers: Number of layers.
      num_heads: Number of attention heads; divides `hidden_size`.
      mlp_dim: Hidden size of the feed-forward blocks.
      num_queries: Number of queries Q per window.
      window: Number of frames per window.
      stride: Number of frames from the start of one window to the start of the next.
      layer_norm_epsilon: Epsilon of the layers' LayerNorms.
      input_norm_epsilon: Epsilon of the LayerNorms of the inputs.
      dtype: Type of the computation.
      param_dtype: Type of the parameters.
    """

    hidden_size: int = 768
    num_layers: int = 2
    num_heads: int = 12
    mlp_dim: int = 3072
    num_queries: int = 1
    window: int = 17
    stride: int = 17
    layer_norm_epsilon: float = 1e-12
    input_norm_epsilon: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"QFormerConfig.hidden_size={self.hidden_size}; allowed: multiples of "
                f"num_heads={self.num_heads}"
            )

    def num_tokens(self, num_frames: int) -> int:
        """Returns the number of tokens A for T frames; an incomplete last window gives none."""
        return self.num_queries * max(0, (num_frames - self.window) // self.stride + 1)


@dataclasses.dataclass(frozen=True)
class SalmonnConfig:
    """Configs of the parts of `Salmonn`.

    Attributes:
      whisper: Config of the speech encoder, without `trim`; its positions limit the length of a
        clip.
      beats: Config of the encoder of other sounds.
      qformer: Config of the Q-Former between the encoders and the language model.
      decoder: Config of the language model, with LoRA.
      min_samples: Length to which shorter clips are padded with silence.
      placeholder: Token that stands for the speech in a prompt; not in the vocabulary.
    """

    whisper: WhisperConfig
    beats: BeatsConfig
    qformer: QFormerConfig
    decoder: DecoderConfig
    min_samples: int = frontends.SAMPLE_RATE
    placeholder: int = -1

    def __post_init__(self):
        if self.whisper.trim:
            raise ValueError("SalmonnConfig.whisper.trim=True; allowed: False")
        if self.min_samples > self.max_samples:
            raise ValueError(
                f"SalmonnConfig.min_samples={self.min_samples}; allowed: at most "
                f"{self.max_samples}, Whisper's limit"
            )

    @classmethod
    def salmonn_7b(
        cls,
        *,
        dtype: str = "float32",
        param_dtype: str = "float32",
        attention_implementation: Implementation | None = None,
        **changes: Any,
    ) -> SalmonnConfig:
        """Returns the config of SALMONN-7B: Whisper large-v2, BEATs iter3+, Vicuna 7B v1.5.

        Args:
          dtype: Type of the computation in all parts.
          param_dtype: Type of the parameters of all parts, except those of LoRA.
          attention_implementation: Implementation of the attention in Whisper and the language
            model.
          **changes: Further fields of the language model's config, such as `remat`.
        """
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        common = types | {"attention_implementation": attention_implementation}
        lora = LoRAConfig(rank=8, alpha=32, dropout=0.1, targets=("query", "value"))
        return cls(
            whisper=WhisperConfig.large_v2(trim=False, **common),
            beats=BeatsConfig.iter3_plus(**types),
            qformer=QFormerConfig(**types),
            decoder=DecoderConfig.vicuna_7b(**{"lora": lora, **common, **changes}),
        )

    @classmethod
    def salmonn_13b(cls, **changes: Any) -> SalmonnConfig:
        """Returns the config of SALMONN-13B: that of `salmonn_7b` with Vicuna 13B v1.1."""
        sizes: dict[str, Any] = {
            "hidden_size": 5120,
            "mlp_dim": 13824,
            "num_layers": 40,
            "num_heads": 40,
            "num_key_value_heads": 40,
            "norm_epsilon": 1e-6,
        }
        return cls.salmonn_7b(**{**sizes, **changes})

    @classmethod
    def from_parts(
        cls,
        backbone_config: Mapping[str, Any],
        *,
        dtype: str = "float32",
        param_dtype: str = "float32",
        tower: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> SalmonnConfig:
        """Reads the configs of the four checkpoints, as `speech.read_backbone_config` returns them.

        Args:
          backbone_config: Dict with the keys "whisper" and "vicuna" (contents of their config.json
            files), "beats" (the `cfg` in its checkpoint) and "qformer" (fields of
            `QFormerConfig`).
          dtype: Type of the computation in all parts.
          param_dtype: Type of the parameters of all parts, except those of LoRA.
          tower: Further fields of Whisper's config, such as `mask_spectrogram`.
          **changes: Further fields of the language model's config, such as `lora` or `remat`.

        Raises:
          InputError: A field has a value that the architectures do not support.
        """
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        whisper = dict(tower or {}) | types | {"trim": False}
        try:
            return cls(
                WhisperConfig.from_huggingface(backbone_config["whisper"], **whisper),
                BeatsConfig.from_checkpoint(backbone_config["beats"], **types),
                QFormerConfig(**backbone_config["qformer"], **types),
                DecoderConfig.from_huggingface(backbone_config["vicuna"], **types | changes),
            )
        except ValueError as error:
            raise InputError(f"SALMONN: {error}") from error

    @property
    def max_samples(self) -> int:
        """Maximum samples of a clip; longer clips are truncated."""
        return self.whisper.max_samples

    @property
    def hidden_size(self) -> int:
        """Hidden size D of the language model."""
        return self.decoder.hidden_size

    @property
    def num_speech_tokens(self) -> int:
        """Number of speech tokens A, the same for every clip."""
        return self.qformer.num_tokens(self.whisper.max_positions)
