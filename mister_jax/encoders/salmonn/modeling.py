"""SALMONN: Whisper and BEATs heard through a window-level Q-Former by Vicuna (arXiv 2310.13289).

From waveforms and prompts to the last hidden states of the language model; its head is not here.
Clips last from 1 s to 30 s: shorter ones are followed by silence, longer ones cut. Whisper hears
30 s whatever the clip's length, so every clip gives as many tokens, 88. Shape letters: B clips, S
samples, T frames of Whisper (20 ms), P tokens of the prompt, W windows, Q queries of a window, A
speech tokens, N = P - 1 + A, D width of the language model.
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
from mister_jax.encoders.layers import dtypes
from mister_jax.encoders.salmonn.config import QFormerConfig, SalmonnConfig
from mister_jax.encoders.whisper import Whisper
from mister_jax.errors import InputError
from mister_jax.nn import ScannedLayers
from mister_jax.nn.dropout import KeySource
from mister_jax.nn.masking import length_mask


class PostNormAttention(nnx.Module):
    """Attention to all keys, residual, LayerNorm.

    Args:
      key_dim: of keys' and values' input.
      config: the Q-Former's.
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
        """x [B, Q, hidden_size] attends to keys [B, T, key_dim]; gives x anew."""

        def heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*projected.shape[:2], self.num_heads, -1)

        mixed = jax.nn.dot_product_attention(
            heads(self.query(x)), heads(self.key(keys)), heads(self.value(keys))
        )
        return self.norm(x + self.out(mixed.reshape(x.shape)))


class QFormerLayer(nnx.Module):
    """Self-attention of the queries, attention to a window, a feed-forward block.

    Args:
      frame_dim: of the window's frames.
      config: the Q-Former's.
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
        """Queries x [B W, Q, hidden_size] of windows [B W, window, frame_dim] anew; no dropout."""
        x = self.cross_attention(self.attention(x, x), frames)
        return self.mlp_norm(x + self.mlp_out(jax.nn.gelu(self.mlp_in(x), approximate=False)))


class WindowQFormer(nnx.Module):
    """Asks each window of both encoders' frames the same queries.

    Args:
      speech_dim: of Whisper's frames.
      sound_dim: of BEATs' tokens.
      out_dim: D.
      config: sizes.
      rngs: for the initial parameters.
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
        """Makes speech tokens.

        The shorter of the two inputs is followed by zeros, which are attended to.

        Args:
          speech: Whisper's frames [B, T, speech_dim].
          sound: BEATs' tokens, taken one a frame [B, T', sound_dim].
          sound_mask: true at tokens of the clip [B, T'] bool; the others are zeros, too.

        Returns:
          [B, A, D].
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
        )  # B T speech+sound
        starts = config.stride * np.arange(config.num_tokens(length) // config.num_queries)
        windows = frames[:, starts[:, None] + np.arange(config.window)]  # B W window C
        windows = windows.reshape(-1, *windows.shape[2:])
        queries = self.query_norm(self.queries[...])
        queries = jnp.broadcast_to(queries, (windows.shape[0], *queries.shape))  # B*W Q hidden_size
        answers, _ = self.layers(queries, windows)
        tokens = self.projection(answers)  # B*W Q D
        return tokens.reshape(frames.shape[0], -1, tokens.shape[-1])


class Salmonn(nnx.Module):
    """From waveforms and prompts to hidden states.

    Args:
      config: of the parts.
      rngs: for the initial parameters.
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
        """Reads clips, each with its prompt.

        Args:
          waveform: [B, S] at 16 kHz, full scale 1, each clip at the start of its row.
          lengths: samples of each clip [B] int.
          prompt: tokens [B, P] int, one of each prompt the placeholder; see `prompt_tokens`.
          prompt_mask: true at tokens [B, P] bool.
          deterministic: no dropout; BEATs and the Q-Former have none.
          rngs: source of dropout keys.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        speech = self.speech_tokens(waveform, lengths, **options)  # B A D
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
        """What the language model hears of clips: [B, A, D] of [B, S] and [B]."""
        config = self.config
        # Short clips count as longer ones that end in silence.
        heard = length_mask(lengths, waveform.shape[1])
        waveform = jnp.where(heard, waveform, 0)[:, : config.max_samples]
        missing = max(0, config.min_samples - waveform.shape[1])
        waveform = jnp.pad(waveform, ((0, 0), (0, missing)))
        lengths = jnp.clip(lengths, config.min_samples, config.max_samples)

        speech, _ = self.whisper(waveform, lengths, **options)  # B T hidden_size
        fbank = beats.compute_fbank(waveform, config.beats)
        # A clip's own tokens, in whatever batch: those of a batch of one in the official code.
        num_tokens = config.beats.num_tokens(frontends.kaldi_fbank_lengths(lengths))
        token_mask = length_mask(num_tokens, config.beats.num_tokens(fbank.shape[1]))
        return self.qformer(speech, self.beats(fbank, token_mask), token_mask)


def prompt_tokens(tokenizer: Any, prompt: str, config: SalmonnConfig) -> list[int]:
    """A prompt in SALMONN's template, with the placeholder where the speech belongs.

    What stands before the speech and after it are tokenised apart, as in training.

    Args:
      tokenizer: Vicuna's, of transformers.
      prompt: what is asked about the speech, such as "Describe the emotion of the speaker."
      config: of the model.

    Returns:
      P tokens.

    Raises:
      InputError: a tokenizer that does not know how a text begins.
    """
    if tokenizer.bos_token_id is None:
        raise InputError("SALMONN: a tokenizer without bos_token; needed: Vicuna's, which has <s>")

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before, after = tokens("USER: <Speech>"), tokens(f"</Speech> {prompt}\nASSISTANT:")
    return [tokenizer.bos_token_id, *before, config.placeholder, *after]
