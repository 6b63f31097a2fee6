"""Audio among the tokens of a prompt: what the encoders that read speech with an LLM share.

A prompt holds a placeholder token where the audio belongs; here the clip's vectors take its
place. Shape letters: B clips, P tokens of the prompt, A audio vectors, N = P - 1 + A, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.encoders.decoder import Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AudioPromptOutput:
    """What a speech LLM gives; hidden states outside `mask` have no meaning.

    Attributes:
      hidden: of the last layer [B, N, D].
      mask: true at the prompt's and the audio's positions, which come first [B, N] bool.
      audio_mask: true at the audio's positions [B, N] bool.
    """

    hidden: jax.Array
    mask: jax.Array
    audio_mask: jax.Array


def splice_audio(
    prompt: jax.Array,
    prompt_mask: jax.Array,
    is_placeholder: jax.Array,
    audio: jax.Array,
    audio_lengths: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Puts each clip's vectors in its prompt, in place of the placeholder.

    Padding, on whichever side it was, ends on the right.

    Args:
      prompt: embedded tokens [B, P, D].
      prompt_mask: true at tokens [B, P] bool.
      is_placeholder: true at the one token the audio replaces [B, P] bool; a prompt without one
        gets no audio.
      audio: vectors [B, A, D], at least one.
      audio_lengths: how many of them, from the first, are the clip's [B] int.

    Returns:
      The sequence [B, N, D], zero in padding; its mask [B, N] bool; and which of it is audio
      [B, N] bool.
    """
    num_tokens = prompt.shape[1]
    widths = jnp.where(is_placeholder, audio_lengths[:, None], 1) * prompt_mask  # B P
    ends = jnp.cumsum(widths, axis=1)
    position = jnp.arange(num_tokens - 1 + audio.shape[1])
    # A place belongs to the first token that ends behind it.
    token = jax.vmap(lambda end: jnp.searchsorted(end, position, side="right"))(ends)  # B N
    mask = token < num_tokens
    token = jnp.where(mask, token, 0)

    def of_token(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, token, axis=1)

    audio_mask = mask & of_token(is_placeholder)
    index = jnp.where(audio_mask, num_tokens + position - of_token(ends - widths), token)
    parts = jnp.concatenate([prompt, audio.astype(prompt.dtype)], axis=1)  # B P+A D
    sequence = jnp.take_along_axis(parts, index[..., None], axis=1)
    return jnp.where(mask[..., None], sequence, 0), mask, audio_mask


def decode_prompt(
    decoder: Decoder,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    placeholder: int,
    audio: jax.Array,
    audio_lengths: jax.Array,
    **options: Any,
) -> AudioPromptOutput:
    """Reads prompts with each clip's vectors in place of the placeholder.

    Args:
      decoder: the language model.
      prompt: tokens [B, P] int, one of each prompt the placeholder, which need not be a token of
        the language model.
      prompt_mask: true at tokens [B, P] bool.
      placeholder: stands for the audio.
      audio: vectors [B, A, D].
      audio_lengths: how many of them, from the first, are the clip's [B] int.
      **options: of the language model's call.
    """
    is_placeholder = prompt == placeholder
    embedded = decoder.embed(jnp.where(prompt_mask & ~is_placeholder, prompt, 0))
    sequence, mask, audio_mask = splice_audio(
        embedded, prompt_mask, is_placeholder, audio, audio_lengths
    )
    hidden = decoder(embeddings=sequence, attention_mask=mask, **options)
    return AudioPromptOutput(hidden, mask, audio_mask)


class PromptedSpeech(nnx.Module):
    """A speech LLM that is asked the same of every clip, called as other speech encoders are.

    Args:
      model: called with clips, lengths, prompts and their mask, gives an `AudioPromptOutput`.
      prompt: its tokens, one of them the placeholder.
      pool_over_prompt: all positions count as the clip's, those of the prompt too; else those of its audio.
    """

    def __init__(self, model: Any, prompt: Sequence[int], *, pool_over_prompt: bool = False):
        self.model = model
        self.prompt = tuple(prompt)
        self.pool_over_prompt = pool_over_prompt

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def __call__(
        self, waveform: jax.Array, lengths: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states [B, N, D], and true at those to be read [B, N] bool, of [B, S] and [B]."""
        prompt = jnp.broadcast_to(jnp.array(self.prompt), (len(waveform), len(self.prompt)))
        output = self.model(waveform, lengths, prompt, jnp.ones(prompt.shape, bool), **options)
        return output.hidden, output.mask if self.pool_over_prompt else output.audio_mask
