"""Config of X."""

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
      hidden_size: of the queries.
      num_layers: L.
      num_heads: divides `hidden_size`.
      mlp_dim: of the feed-forward blocks.
      num_queries: Q, of each window.
      window: frames of a window.
      stride: frames from a window's start to the next one's.
      layer_norm_epsilon: of the layers.
      input_norm_epsilon: of the LayerNorms of what comes in.
      dtype: of the computation.
      param_dtype: of the parameters.
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
                f"QFormerConfig.hidden_size={self.hidden_size}: must be a multiple of "
                f"num_heads={self.num_heads}"
            )

    def num_tokens(self, num_frames: int) -> int:
        """A of T frames; those behind the last whole window are not heard."""
        return self.num_queries * max(0, (num_frames - self.window) // self.stride + 1)


@dataclasses.dataclass(frozen=True)
class SalmonnConfig:
    """The parts of `Salmonn`.

    Attributes:
      whisper: encoder of speech, without `trim`; its positions say how long a clip may be.
      beats: encoder of other sound.
      qformer: between both and the language model.
      decoder: the language model, with LoRA.
      min_samples: a shorter clip is followed by silence to this length.
      placeholder: stands for the speech in a prompt, and is no token of the language model.
    """

    whisper: WhisperConfig
    beats: BeatsConfig
    qformer: QFormerConfig
    decoder: DecoderConfig
    min_samples: int = frontends.SAMPLE_RATE
    placeholder: int = -1

    def __post_init__(self):
        if self.whisper.trim:
            raise ValueError("SalmonnConfig.whisper.trim=True: must be False")
        if self.min_samples > self.max_samples:
            raise ValueError(
                f"SalmonnConfig.min_samples={self.min_samples}: must not be above "
                f"{self.max_samples}, which Whisper has positions for"
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
        """SALMONN-7B: Whisper large-v2, BEATs iter3+, Vicuna 7B v1.5.

        Args:
          dtype: of all parts' computation.
          param_dtype: of all parts' parameters, but for LoRA's.
          attention_implementation: of Whisper and the language model.
          **changes: further fields of the language model's config, such as `remat`.
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
        """SALMONN-13B: as `salmonn_7b`, but with Vicuna 13B v1.1."""
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
        described: Mapping[str, Any],
        *,
        dtype: str = "float32",
        param_dtype: str = "float32",
        tower: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> SalmonnConfig:
        """Reads what is known of the four checkpoints, see `speech.read_backbone_config`.

        Args:
          described: content of "whisper"'s and "vicuna"'s config.json, the "cfg" of "beats" and the
            "qformer"'s sizes.
          dtype: of all parts' computation.
          param_dtype: of all parts' parameters, but for LoRA's.
          tower: further fields of Whisper's config, such as `mask_spectrogram`.
          **changes: further fields of the language model's config, such as `lora` or `remat`.

        Raises:
          InputError: a field with a value that the architectures do not have.
        """
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        whisper = dict(tower or {}) | types | {"trim": False}
        try:
            return cls(
                WhisperConfig.from_huggingface(described["whisper"], **whisper),
                BeatsConfig.from_checkpoint(described["beats"], **types),
                QFormerConfig(**described["qformer"], **types),
                DecoderConfig.from_huggingface(described["vicuna"], **types | changes),
            )
        except ValueError as error:
            raise InputError(f"SALMONN: {error}") from error

    @property
    def max_samples(self) -> int:
        """Samples that Whisper has positions for; what a clip has behind them is cut."""
        return self.whisper.max_samples

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.decoder.hidden_size

    @property
    def num_speech_tokens(self) -> int:
        """A, the same for every clip."""
        return self.qformer.num_tokens(self.whisper.max_positions)
