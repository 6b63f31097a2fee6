"""Qwen2-Audio: the Qwen language model with a Whisper-like audio tower (arXiv 2407.10759).

Qwen2-Audio maps waveforms and prompts to the language model's last hidden states. The
language-model head is not implemented. Shape letters: B clips, S samples, P prompt tokens, A audio
vectors (40 ms each), which replace one prompt token, N = P - 1 + A positions, D hidden size of the
language model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from mister_jax.convert.key_table import KeyTable, NameRules, linear
from mister_jax.encoders import decoder, whisper
from mister_jax.encoders.audio_prompt import SpeechLLM
from mister_jax.encoders.decoder import Decoder, DecoderConfig
from mister_jax.encoders.hf_config import (
    SHARED_OPTIONS,
    read_fields,
    select_options,
    unsupported,
)
from mister_jax.encoders.layers import dtypes
from mister_jax.encoders.whisper import Whisper, WhisperConfig
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRALinear

# Defaults in transformers for fields that are missing in a config.json.
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
    """Config of `Qwen2Audio`.

    Attributes:
      tower: Config of the audio tower; `trim` must be True. `tower.max_positions` limits the clip
        length.
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
    def qwen2_audio_7b(cls, **changes: Any) -> Qwen2AudioConfig:
        """Returns the config of Qwen2-Audio-7B and -7B-Instruct (8.4 billion parameters).

        The `changes` apply to the language model's config, for example `lora` or `remat`. Changes
        named in `SHARED_OPTIONS` also apply to the tower's config.
        """
        sizes = {"vocab_size": 156032, "query_key_value_bias": True}
        shared = select_options(changes, *SHARED_OPTIONS)
        return cls(WhisperConfig.large_v3(**shared), DecoderConfig.vicuna_7b(**sizes | changes))

    @classmethod
    def from_huggingface(
        cls,
        config: Mapping[str, Any],
        *,
        tower: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Qwen2AudioConfig:
        """Reads a `config.json` with model type "qwen2_audio".

        Missing fields have the defaults of transformers. `tower` contains further fields of the
        tower's config, such as `mask_spectrogram`. For the `changes`, see `qwen2_audio_7b`.

        Raises:
          InputError: The value of a field is not supported.
        """
        if config.get("model_type") != "qwen2_audio":
            raise unsupported("model_type", config.get("model_type"), "'qwen2_audio'")
        audio = _part(config, "audio_config", _AUDIO_DEFAULTS)
        if audio["model_type"] != _AUDIO_DEFAULTS["model_type"]:
            allowed = repr(_AUDIO_DEFAULTS["model_type"])
            raise unsupported("audio_config.model_type", audio["model_type"], allowed)
        text = _part(config, "text_config", _TEXT_DEFAULTS)
        tower_changes = select_options(changes, *SHARED_OPTIONS) | dict(tower or {})
        return cls(
            WhisperConfig.from_huggingface({**audio, "model_type": "whisper"}, **tower_changes),
            DecoderConfig.from_huggingface(text, **changes),
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
        """Maximum number of samples in a clip; longer clips are truncated."""
        return self.tower.max_samples


def _part(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a nested object of a config.json, with defaults for missing fields."""
    part = config.get(name) or {}
    if not isinstance(part, Mapping):
        raise unsupported(name, part, "a JSON object")
    return {**defaults, **part}


class AudioTower(Whisper):
    """Whisper encoder that averages pairs of positions before the last LayerNorm.

    The attention ignores padding, so padding does not change the result.
    """

    def __call__(
        self, waveform: jax.Array, lengths: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes clips; for the arguments, see `Whisper`.

        Returns:
          Vectors, [B, A, hidden_size of the tower], and the number of valid vectors per clip, [B]
          int. A vector is valid if both of its positions are in the clip.
        """
        mel, mel_lengths = self.mel(waveform, lengths)
        x, mask, _ = self._encode(mel, mel_lengths, **options)
        batch_size, num_positions, hidden_size = x.shape
        pairs = x[:, : num_positions // 2 * 2].reshape(batch_size, -1, 2, hidden_size)
        return self.norm(pairs.mean(2)), mask.sum(1) // 2


class Qwen2Audio(SpeechLLM):
    """Qwen2-Audio without the language-model head.

    Args:
      config: Model config.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, config: Qwen2AudioConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tower = AudioTower(config.tower, rngs=rngs)
        self.projection = LoRALinear(
            config.tower.hidden_size,
            config.decoder.hidden_size,
            quantizable=False,
            **dtypes(config.decoder),
            rngs=rngs,
        )
        self.decoder = Decoder(config.decoder, rngs=rngs)

    def encode_audio(
        self, waveform: jax.Array, lengths: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes clips with the tower and the projection; see `SpeechLLM.encode_audio`."""
        vectors, audio_lengths = self.tower(waveform, lengths, **options)
        return self.projection(vectors, **options), audio_lengths


def prompt_tokens(tokenizer: Any, prompt: str, config: Qwen2AudioConfig) -> list[int]:
    """Tokenizes a prompt, such as the default in `registry.ARCHITECTURES`.

    Raises:
      InputError: The prompt does not have exactly one placeholder.
    """
    tokens = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    count = tokens.count(config.placeholder)
    if count != 1:
        raise InputError(
            f"prompt {prompt!r}: {count} tokens {config.placeholder} (<|AUDIO|>); allowed: one"
        )
    return tokens


NAME_RULES = NameRules(
    prefixes=("", "model."),
    # transformers 5 names the modules `language_model.layers`; released checkpoints and
    # transformers 4 use `language_model.model.layers`.
    renamed={r"^(model\.)?language_model\.(?!model\.|lm_head\.)": r"\1language_model.model."},
    unused=decoder.NAME_RULES.unused,
    heads=(r"^(language_model\.)?lm_head\.",),
    module_names={r"^language_model\.model\.": "language_model."},
)
"""Variants of tensor names in checkpoints."""


def key_table(config: Qwen2AudioConfig) -> KeyTable:
    """Returns the tensor names in a released checkpoint for each parameter of `Qwen2Audio`."""
    table = linear("projection", "multi_modal_projector.linear")
    for path, source in whisper.key_table(config.tower).items():
        names = tuple(f"audio_tower.{name.removeprefix('encoder.')}" for name in source.names)
        table[f"tower/{path}"] = dataclasses.replace(source, names=names)
    for path, source in decoder.key_table(config.decoder, "language_model.model.").items():
        table[f"decoder/{path}"] = source
    return table
