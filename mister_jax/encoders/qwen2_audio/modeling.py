"""Qwen2-Audio: the Qwen language model with a Whisper-like audio tower (arXiv 2407.10759).

It maps waveforms and prompts to the last hidden states of the language model, without its head.
Shape letters: B clips, S samples, P tokens of the prompt, A audio vectors of 40 ms, N = P - 1 + A,
D hidden size of the language model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.encoders.audio_prompt import AudioPromptOutput, decode_prompt
from mister_jax.encoders.decoder import Decoder
from mister_jax.encoders.qwen2_audio.config import Qwen2AudioConfig
from mister_jax.encoders.whisper import Whisper
from mister_jax.errors import InputError
from mister_jax.nn.dropout import KeySource
from mister_jax.nn.lora import LoRALinear


class AudioTower(Whisper):
    """Whisper's encoder with pairs of positions averaged before the last LayerNorm.

    Attention excludes the padding, so that padding does not change the result.
    """

    def __call__(
        self,
        waveform: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes clips.

        Args:
          waveform: Mono audio at 16 kHz with full scale 1, [B, S]. Padding is not read; longer
            clips are truncated to `max_positions` of 20 ms.
          lengths: Number of samples in each clip, [B] int.
          deterministic: Whether dropout is off.
          rngs: Source of dropout keys.

        Returns:
          Vectors of 40 ms [B, A, hidden_size of the tower], and the number of valid vectors of
          each clip [B] int. A vector is valid if both of its positions are in the clip.
        """
        mel, mel_lengths = self.mel(waveform, lengths)
        x, mask, _ = self._encode(mel, mel_lengths, deterministic=deterministic, rngs=rngs)
        batch_size, num_positions, hidden_size = x.shape
        pairs = x[:, : num_positions // 2 * 2].reshape(batch_size, -1, 2, hidden_size)
        return self.norm(pairs.mean(2)), mask.sum(1) // 2


class Qwen2Audio(nnx.Module):
    """Qwen2-Audio without the language-model head.

    Args:
      config: Configs of the parts.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: Qwen2AudioConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tower = AudioTower(config.tower, rngs=rngs)
        self.projection = LoRALinear(
            config.tower.hidden_size,
            config.decoder.hidden_size,
            quantizable=False,
            dtype=jnp.dtype(config.decoder.dtype),
            param_dtype=jnp.dtype(config.decoder.param_dtype),
            rngs=rngs,
        )
        self.decoder = Decoder(config.decoder, rngs=rngs)

    def __call__(
        self,
        waveform: jax.Array,
        lengths: jax.Array,
        prompt: jax.Array,
        prompt_mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> AudioPromptOutput:
        """Encodes clips, each with its prompt.

        Args:
          waveform: Mono audio at 16 kHz with full scale 1, [B, S], each clip at the start of its
            row.
          lengths: Number of samples in each clip, [B] int.
          prompt: Tokens with one placeholder per prompt, [B, P] int; see `prompt_tokens`.
          prompt_mask: Valid tokens, [B, P] bool.
          deterministic: Whether dropout is off.
          rngs: Source of dropout keys.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        vectors, audio_lengths = self.tower(waveform, lengths, **options)
        return decode_prompt(
            self.decoder,
            prompt,
            prompt_mask,
            self.config.placeholder,
            self.projection(vectors, **options),  # [B, A, D]
            audio_lengths,
            **options,
        )


def prompt_tokens(tokenizer: Any, prompt: str, config: Qwen2AudioConfig) -> list[int]:
    """Tokenizes a prompt with one placeholder for the audio.

    Args:
      tokenizer: Tokenizer of Qwen2-Audio from transformers.
      prompt: Text with `<|AUDIO|>` in place of the audio, such as
        "<|audio_bos|><|AUDIO|><|audio_eos|>What is the emotion of the person?:".
      config: Config of the model.

    Returns:
      Tokens of the prompt, of length P.

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
