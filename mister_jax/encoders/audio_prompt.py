"""Audio in a language model's prompt, for SALMONN and Qwen2-Audio.

The clip's vectors replace a placeholder token in the prompt. Shape letters: B clips, P prompt
tokens, A audio vectors, N = P - 1 + A positions, D hidden size.
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
      hidden_states: Hidden states of the last layer, [B, N, D]; meaningless outside `mask`.
      mask: Positions of the prompt and the audio, [B, N] bool. Padding comes after them.
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
    """Replaces each prompt's placeholder with the vectors of its clip.

    Args:
      prompt: Embedded tokens, [B, P, D], padded on either side.
      prompt_mask: Valid tokens, [B, P] bool.
      is_placeholder: Whether a token is the placeholder, [B, P] bool; at most one per prompt. A
        prompt without a placeholder gets no audio.
      audio: Audio vectors, [B, A, D] with A > 0.
      audio_lengths: Number of valid vectors of each clip, [B] int; padding comes after them.

    Returns:
      Sequences, [B, N, D], zero-padded on the right; the mask of valid positions, [B, N] bool; and
      the mask of audio positions, [B, N] bool.
    """
    num_tokens = prompt.shape[1]
    sizes = jnp.where(is_placeholder, audio_lengths[:, None], 1) * prompt_mask  # [B, P]
    ends = jnp.cumsum(sizes, axis=1)
    position = jnp.arange(num_tokens - 1 + audio.shape[1])
    # An output position belongs to the first token whose end is greater than the position.
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
    """Speech LLM: a language model without a head, whose prompt contains a clip.

    Subclasses create the attribute `decoder`, the language model. The config's `placeholder` is the
    token that stands for the audio. This token need not be in the vocabulary.
    """

    config: Any
    decoder: Decoder

    def encode_audio(
        self, waveform: jax.Array, lengths: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Returns each clip's audio vectors, [B, A, D], and the number of valid vectors, [B]."""
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
          waveform: Mono 16 kHz audio in [-1, 1], [B, S], each clip at the start of its row.
          lengths: Number of samples in each clip, [B] int.
          prompt: Tokens with one placeholder per prompt, [B, P] int; see `prompt_tokens`.
          prompt_mask: Valid tokens, [B, P] bool.
          deterministic: Whether to disable dropout.
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
    """Speech LLM with a fixed prompt and the interface of the other speech encoders.

    Args:
      model: Speech LLM.
      prompt: Prompt tokens with one placeholder.
      pool_over_prompt: Whether the returned mask covers all positions instead of only the audio.
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
          waveform: Mono 16 kHz audio in [-1, 1], [B, S].
          lengths: Number of samples in each clip, [B] int.
          **options: Further arguments of the model's call.

        Returns:
          Hidden states, [B, N, D], and the positions to pool over, [B, N] bool.
        """
        prompt = jnp.broadcast_to(jnp.array(self.prompt), (len(waveform), len(self.prompt)))
        output = self.model(waveform, lengths, prompt, jnp.ones(prompt.shape, bool), **options)
        return output.hidden_states, output.mask if self.pool_over_prompt else output.audio_mask
