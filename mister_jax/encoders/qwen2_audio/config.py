"""Configs of the parts of Qwen2-Audio, and how they are read from a config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mister_jax.encoders.decoder import DecoderConfig
from mister_jax.encoders.hf_config import read_fields, unsupported
from mister_jax.encoders.whisper import WhisperConfig
from mister_jax.nn.attention import Implementation

# Defaults of transformers for absent fields of a config.json.
_AUDIO_DEFAULTS = {
    "model_type": "qwen2_audio_encoder",
    "num_mel_bins": 128,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "max_source_positions": 1500,
}
_TEXT_DEFAULTS = {"model_type": "qwen2"}
_PLACEHOLDER = 151646  # <|AUDIO|>


@dataclasses.dataclass(frozen=True)
class Qwen2AudioConfig:
    """Configs of the parts of `Qwen2Audio`.

    Attributes:
      tower: Config of the audio encoder, with `trim`; its positions limit the length of a clip.
      decoder: Config of the language model.
      placeholder: Token that stands for the audio in a prompt.
    """

    tower: WhisperConfig
    decoder: DecoderConfig
    placeholder: int = _PLACEHOLDER

    def __post_init__(self):
        if not self.tower.trim:
            raise ValueError("Qwen2AudioConfig.tower.trim=False; allowed: True")

    @classmethod
    def qwen2_audio_7b(
        cls,
        *,
        dtype: str = "float32",
        param_dtype: str = "float32",
        attention_implementation: Implementation | None = None,
        **changes: Any,
    ) -> Qwen2AudioConfig:
        """Returns the config of Qwen2-Audio-7B and -7B-Instruct (8.4 billion parameters).

        Args:
          dtype: Type of the computation.
          param_dtype: Type of the parameters, except those of LoRA.
          attention_implementation: Implementation of the attention.
          **changes: Further fields of the language model's config, such as `lora` or `remat`.
        """
        common: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "attention_implementation": attention_implementation,
        }
        sizes: dict[str, Any] = {
            "vocab_size": 156032,
            "hidden_size": 4096,
            "mlp_dim": 11008,
            "num_layers": 32,
            "num_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "query_key_value_bias": True,
        }
        return cls(WhisperConfig.large_v3(**common), DecoderConfig(**sizes | common | changes))

    @classmethod
    def from_huggingface(
        cls,
        config: Mapping[str, Any],
        *,
        dtype: str = "float32",
        param_dtype: str = "float32",
        attention_implementation: Implementation | None = None,
        tower: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Qwen2AudioConfig:
        """Reads a `config.json` of model type "qwen2_audio".

        Args:
          config: Content of the file. Absent fields have the default values of transformers.
          dtype: Type of the computation.
          param_dtype: Type of the parameters, except those of LoRA.
          attention_implementation: Implementation of the attention.
          tower: Further fields of the tower's config, such as `lora` or `mask_spectrogram`.
          **changes: Further fields of the language model's config, such as `lora` or `remat`.

        Raises:
          InputError: A field has a value that this architecture does not support.
        """
        if config.get("model_type") != "qwen2_audio":
            raise unsupported("model_type", config.get("model_type"), "'qwen2_audio'")
        audio = _part(config, "audio_config", _AUDIO_DEFAULTS)
        if audio["model_type"] != _AUDIO_DEFAULTS["model_type"]:
            allowed = repr(_AUDIO_DEFAULTS["model_type"])
            raise unsupported("audio_config.model_type", audio["model_type"], allowed)
        text = _part(config, "text_config", _TEXT_DEFAULTS)
        common: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "attention_implementation": attention_implementation,
        }
        tower_changes = common | dict(tower or {})
        return cls(
            WhisperConfig.from_huggingface({**audio, "model_type": "whisper"}, **tower_changes),
            DecoderConfig.from_huggingface(text, **common | changes),
            **read_fields(config, {"placeholder": ("audio_token_index", _PLACEHOLDER)}),
        )

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the language model."""
        return self.decoder.vocab_size

    @property
    def hidden_size(self) -> int:
        """Hidden size D of the language model."""
        return self.decoder.hidden_size

    @property
    def max_samples(self) -> int:
        """Maximum samples of a clip; longer clips are truncated."""
        return self.tower.max_samples


def _part(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of one part of a config.json, with defaults for the absent ones."""
    part = config.get(name) or {}
    if not isinstance(part, Mapping):
        raise unsupported(name, part, "a JSON object")
    return {**defaults, **part}
