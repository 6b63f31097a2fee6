"""Audio inside the prompt of a language model, for SALMONN and Qwen2-Audio.

A prompt holds a placeholder token, which is replaced with the vectors of the clip. Shape letters:
B clips, P tokens of the prompt, A audio vectors, N = P - 1 + A, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.encoders.decoder import Decoder
from mister_jax.nn.dropout import KeySource


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AudioPromptOutput:
    """Output of a speech LLM.

    Attributes:
      hidden_states: Hidden states of the last layer, [B, N, D], meaningless outside `mask`.
      mask: Positions of the prompt and the audio, [B, N] bool; padding follows them.
      audio_mask: Positions of the audio, [B, N] bool.
    """

    hidden_states: jax.Array
    mask: jax.Array
    audio_mask: jax.Array


def splice_audio(
    prompt: jax.Array,
    prompt_mask: jax.Array,
    is_placeholder: jax.Array,
    audio: jax.Array,
    audio_lengths: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Replaces the placeholder of each prompt with the vectors of its clip.

    Args:
      prompt: Embedded tokens, [B, P, D], padded on either side.
      prompt_mask: Valid tokens, [B, P] bool.
      is_placeholder: Position of the placeholder, at most one per prompt, [B, P] bool. A prompt
        without a placeholder gets no audio.
      audio: Audio vectors, [B, A, D] with A > 0.
      audio_lengths: Number of valid vectors of each clip, which come first, [B] int.

    Returns:
      Sequence [B, N, D], padded with zeros on the right; its mask [B, N] bool; and the mask of its
      audio [B, N] bool.
    """
    num_tokens = prompt.shape[1]
    sizes = jnp.where(is_placeholder, audio_lengths[:, None], 1) * prompt_mask  # [B, P]
    ends = jnp.cumsum(sizes, axis=1)
    position = jnp.arange(num_tokens - 1 + audio.shape[1])
    # A position belongs to the first token that ends after it.
    token = jax.vmap(lambda end: jnp.searchsorted(end, position, side="right"))(ends)  # [B, N]
    mask = token < num_tokens
    token = jnp.where(mask, token, 0)
    audio_mask = mask & jnp.take_along_axis(is_placeholder, token, axis=1)
    start = jnp.take_along_axis(ends - sizes, token, axis=1)
    index = jnp.where(audio_mask, num_tokens + position - start, token)
    vectors = jnp.concatenate([prompt, audio.astype(prompt.dtype)], axis=1)  # [B, P + A, D]
    sequence = jnp.take_along_axis(vectors, index[..., None], axis=1)
    return jnp.where(mask[..., None], sequence, 0), mask, audio_mask


class SpeechLLM(nnx.Module):
    """Language model that reads clips inside its prompt, without the head.

    Subclasses create `decoder`, the language model. The token `placeholder` in their config stands
    for the audio and need not be in the vocabulary.
    """

    config: Any
    decoder: Decoder

    def encode_audio(
        self, waveform: jax.Array, lengths: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Returns audio vectors [B, A, D] of clips, and the number of valid ones of each [B]."""
        raise NotImplementedError

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
        audio, audio_lengths = self.encode_audio(waveform, lengths, **options)
        is_placeholder = prompt == self.config.placeholder
        embedded = self.decoder.embed(jnp.where(prompt_mask & ~is_placeholder, prompt, 0))
        sequence, mask, audio_mask = splice_audio(
            embedded, prompt_mask, is_placeholder, audio, audio_lengths
        )
        hidden_states = self.decoder(embeddings=sequence, attention_mask=mask, **options)
        return AudioPromptOutput(hidden_states, mask, audio_mask)


class PromptedSpeech(nnx.Module):
    """Speech LLM with one fixed prompt, called like the other speech encoders.

    Args:
      model: Speech LLM.
      prompt: Tokens of the prompt with one placeholder.
      pool_over_prompt: Whether the returned mask covers all positions instead of the audio alone.
    """

    def __init__(self, model: Any, prompt: Sequence[int], *, pool_over_prompt: bool = False):
        self.model = model
        self.config = model.config
        self.prompt = tuple(prompt)
        self.pool_over_prompt = pool_over_prompt

    def __call__(
        self, waveform: jax.Array, lengths: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes clips.

        Args:
          waveform: Mono audio at 16 kHz with full scale 1, [B, S].
          lengths: Number of samples in each clip, [B] int.
          **options: Further arguments of the model's call.

        Returns:
          Hidden states [B, N, D], and the mask of the positions to pool [B, N] bool.
        """
        prompt = jnp.broadcast_to(jnp.array(self.prompt), (len(waveform), len(self.prompt)))
        output = self.model(waveform, lengths, prompt, jnp.ones(prompt.shape, bool), **options)
        return output.hidden_states, output.mask if self.pool_over_prompt else output.audio_mask
