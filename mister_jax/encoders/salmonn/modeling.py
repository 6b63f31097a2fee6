"""SALMONN: Whisper and BEATs, connected to Vicuna by a window-level Q-Former (arXiv 2310.13289).

It maps waveforms and prompts to the last hidden states of the language model, without its head.
Clips last from 1 s to 30 s: shorter ones are padded with silence, longer ones are truncated.
Whisper always encodes 30 s, so that every clip gives 88 tokens. Shape letters: B clips, S samples,
T frames of Whisper (20 ms), P tokens of the prompt, W windows, Q queries of a window, A speech
tokens, N = P - 1 + A, D hidden size of the language model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.encoders import beats, frontends
from mister_jax.encoders.audio_prompt import AudioPromptOutput, decode_prompt
from mister_jax.encoders.beats import Beats
from mister_jax.encoders.decoder import Decoder
from mister_jax.encoders.layers import dtypes, gelu
from mister_jax.encoders.salmonn.config import QFormerConfig, SalmonnConfig
from mister_jax.encoders.whisper import Whisper
from mister_jax.errors import InputError
from mister_jax.nn import ScannedLayers
from mister_jax.nn.dropout import KeySource
from mister_jax.nn.masking import length_mask


class PostNormAttention(nnx.Module):
    """Attention to all keys, followed by a residual and a LayerNorm.

    Args:
      key_dim: Size of the input of keys and values.
      config: Config of the Q-Former.
      rngs: Source of the initial parameters.
    """

    def __init__(self, key_dim: int, config: QFormerConfig, *, rngs: nnx.Rngs):
        hidden_size = config.hidden_size
        options = dtypes(config) | {"rngs": rngs}
        self.num_heads = config.num_heads
        self.query = nnx.Linear(hidden_size, hidden_size, **options)
        self.key = nnx.Linear(key_dim, hidden_size, **options)
        self.value = nnx.Linear(key_dim, hidden_size, **options)
        self.out = nnx.Linear(hidden_size, hidden_size, **options)
        self.norm = nnx.LayerNorm(hidden_size, epsilon=config.layer_norm_epsilon, **options)

    def __call__(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        """Transforms queries x [B, Q, hidden_size] by attention to keys [B, T, key_dim]."""

        def split_heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*projected.shape[:2], self.num_heads, -1)

        attended = jax.nn.dot_product_attention(
            split_heads(self.query(x)), split_heads(self.key(keys)), split_heads(self.value(keys))
        )
        return self.norm(x + self.out(attended.reshape(x.shape)))


class QFormerLayer(nnx.Module):
    """Self-attention of the queries, cross-attention to a window, and a feed-forward block.

    Args:
      frame_dim: Size of the window's frames.
      config: Config of the Q-Former.
      rngs: Source of the initial parameters.
    """

    def __init__(self, frame_dim: int, config: QFormerConfig, *, rngs: nnx.Rngs):
        hidden_size = config.hidden_size
        options = dtypes(config) | {"rngs": rngs}
        self.attention = PostNormAttention(hidden_size, config, rngs=rngs)
        self.cross_attention = PostNormAttention(frame_dim, config, rngs=rngs)
        self.mlp_in = nnx.Linear(hidden_size, config.mlp_dim, **options)
        self.mlp_out = nnx.Linear(config.mlp_dim, hidden_size, **options)
        self.mlp_norm = nnx.LayerNorm(hidden_size, epsilon=config.layer_norm_epsilon, **options)

    def __call__(
        self,
        x: jax.Array,
        frames: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Transforms queries x [B W, Q, hidden_size] of windows [B W, window, frame_dim].

        There is no dropout.
        """
        x = self.cross_attention(self.attention(x, x), frames)
        return self.mlp_norm(x + self.mlp_out(gelu(self.mlp_in(x))))


class WindowQFormer(nnx.Module):
    """Q-Former that applies the same queries to each window of both encoders' frames.

    Args:
      speech_dim: Feature size of Whisper's output frames.
      sound_dim: Feature size of BEATs' output tokens.
      out_dim: Size D of the speech tokens.
      config: Sizes of the Q-Former.
      rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        speech_dim: int,
        sound_dim: int,
        out_dim: int,
        config: QFormerConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        options = dtypes(config) | {"rngs": rngs}
        input_norm = {"epsilon": config.input_norm_epsilon, **options}
        self.speech_norm = nnx.LayerNorm(speech_dim, **input_norm)
        self.sound_norm = nnx.LayerNorm(sound_dim, **input_norm)
        queries = 0.02 * jax.random.normal(rngs.params(), (config.num_queries, config.hidden_size))
        self.queries = nnx.Param(queries.astype(options["param_dtype"]))
        self.query_norm = nnx.LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_epsilon, **options
        )
        self.layers = ScannedLayers(
            lambda rngs: QFormerLayer(speech_dim + sound_dim, config, rngs=rngs),
            config.num_layers,
            rngs=rngs,
        )
        self.projection = nnx.Linear(config.hidden_size, out_dim, **options)

    def __call__(self, speech: jax.Array, sound: jax.Array, sound_mask: jax.Array) -> jax.Array:
        """Computes the speech tokens of clips.

        The shorter of the two inputs is padded with zeros, which are attended to.

        Args:
          speech: Whisper's frames, [B, T, speech_dim].
          sound: BEATs' tokens, [B, T', sound_dim]; token n is combined with frame n.
          sound_mask: Valid tokens, [B, T'] bool; the others become zeros.

        Returns:
          Speech tokens, [B, A, D].
        """
        config = self.config
        sound = jnp.where(sound_mask[..., None], self.sound_norm(sound), 0)
        length = max(speech.shape[1], sound.shape[1])
        frames = jnp.concatenate(
            [
                jnp.pad(part, ((0, 0), (0, length - part.shape[1]), (0, 0)))
                for part in (self.speech_norm(speech), sound)
            ],
            axis=-1,
        )  # [B, T, speech_dim + sound_dim]
        starts = config.stride * np.arange(config.num_tokens(length) // config.num_queries)
        windows = frames[:, starts[:, None] + np.arange(config.window)]
        windows = windows.reshape(-1, *windows.shape[2:])  # [B W, window, speech_dim + sound_dim]
        queries = self.query_norm(self.queries[...])
        queries = jnp.broadcast_to(queries, (windows.shape[0], *queries.shape))
        hidden, _ = self.layers(queries, windows)  # [B W, Q, hidden_size]
        tokens = self.projection(hidden)  # [B W, Q, D]
        return tokens.reshape(frames.shape[0], -1, tokens.shape[-1])


class Salmonn(nnx.Module):
    """SALMONN without the language-model head.

    Args:
      config: Configs of the parts.
      rngs: Source of the initial parameters.
    """

    def __init__(self, config: SalmonnConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.whisper = Whisper(config.whisper, rngs=rngs)
        self.beats = Beats(config.beats, rngs=rngs)
        self.qformer = WindowQFormer(
            config.whisper.hidden_size,
            config.beats.hidden_size,
            config.decoder.hidden_size,
            config.qformer,
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
          deterministic: Whether dropout is off; BEATs and the Q-Former have none.
          rngs: Source of dropout keys.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        speech = self.speech_tokens(waveform, lengths, **options)  # [B, A, D]
        return decode_prompt(
            self.decoder,
            prompt,
            prompt_mask,
            self.config.placeholder,
            speech,
            jnp.full(len(lengths), speech.shape[1]),
            **options,
        )

    def speech_tokens(self, waveform: jax.Array, lengths: jax.Array, **options: Any) -> jax.Array:
        """Computes the language model's input [B, A, D] for clips [B, S] of `lengths` [B]."""
        config = self.config
        valid = length_mask(lengths, waveform.shape[1])
        waveform = jnp.where(valid, waveform, 0)[:, : config.max_samples]
        padding = max(0, config.min_samples - waveform.shape[1])
        waveform = jnp.pad(waveform, ((0, 0), (0, padding)))
        # The silence after a short clip counts as part of the clip.
        lengths = jnp.clip(lengths, config.min_samples, config.max_samples)

        speech, _ = self.whisper(waveform, lengths, **options)  # [B, T, hidden_size of Whisper]
        fbank = beats.compute_fbank(waveform, config.beats)
        # The mask of a clip does not depend on its batch. It equals that of the official code for a
        # batch of one clip.
        num_tokens = config.beats.num_tokens(frontends.kaldi_fbank_lengths(lengths))
        token_mask = length_mask(num_tokens, config.beats.num_tokens(fbank.shape[1]))
        return self.qformer(speech, self.beats(fbank, token_mask), token_mask)


def prompt_tokens(tokenizer: Any, prompt: str, config: SalmonnConfig) -> list[int]:
    """Tokenizes a prompt in SALMONN's template, with a placeholder for the speech.

    The texts before and after the speech are tokenized separately, as in training.

    Args:
      tokenizer: Vicuna's tokenizer from transformers.
      prompt: Instruction about the speech, such as "Describe the emotion of the speaker."
      config: Config of the model.

    Returns:
      Tokens of the prompt, of length P.

    Raises:
      InputError: The tokenizer has no token for the start of a text.
    """
    if tokenizer.bos_token_id is None:
        raise InputError(
            "SALMONN: tokenizer without bos_token; allowed: Vicuna's tokenizer, which has <s>"
        )

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before, after = tokenize("USER: <Speech>"), tokenize(f"</Speech> {prompt}\nASSISTANT:")
    return [tokenizer.bos_token_id, *before, config.placeholder, *after]
