"""SALMONN: Whisper and BEATs heard through a window-level Q-Former by Vicuna (arXiv 2310.13289).

From waveforms and prompts to the last hidden states of the language model; its head is not here.
Clips last from 1 s to 30 s: shorter ones are followed by silence, longer ones cut. Whisper hears
30 s whatever the clip's length, so every clip gives as many tokens, 88. Shape letters: B clips, S
samples, T frames of Whisper (20 ms), P tokens of the prompt, W windows, Q queries of a window, A
speech tokens, N = P - 1 + A, D width of the language model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.encoders import audio, beats
from mister_jax.encoders.audio_prompt import AudioPromptOutput, decode_prompt
from mister_jax.encoders.beats import Beats, BeatsConfig
from mister_jax.encoders.decoder import Decoder, DecoderConfig
from mister_jax.encoders.fields import types_of
from mister_jax.encoders.whisper import Whisper, WhisperConfig
from mister_jax.errors import InputError
from mister_jax.nn import Stack
from mister_jax.nn.attention import Implementation
from mister_jax.nn.dropout import KeySource
from mister_jax.nn.lora import LoRAConfig


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Sizes of `WindowQFormer`; the defaults are SALMONN's.

    Attributes:
      width: of the queries.
      num_layers: L.
      num_heads: divides `width`.
      hidden_width: of the feed-forward blocks.
      num_queries: Q, of each window.
      window: frames of a window.
      stride: frames from a window's start to the next one's.
      layer_norm_epsilon: of the layers.
      input_norm_epsilon: of the LayerNorms of what comes in.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    width: int = 768
    num_layers: int = 2
    num_heads: int = 12
    hidden_width: int = 3072
    num_queries: int = 1
    window: int = 17
    stride: int = 17
    layer_norm_epsilon: float = 1e-12
    input_norm_epsilon: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(
                f"QFormerConfig.width={self.width}: must be a multiple of "
                f"num_heads={self.num_heads}"
            )

    def num_tokens(self, num_frames: int) -> int:
        """A of T frames; those behind the last whole window are not heard."""
        return self.num_queries * max(0, (num_frames - self.window) // self.stride + 1)


class PostNormAttention(nnx.Module):
    """Attention to all keys, residual, LayerNorm.

    Args:
      key_width: of keys' and values' input.
      config: the Q-Former's.
    """

    def __init__(self, key_width: int, config: QFormerConfig, *, rngs: nnx.Rngs):
        width = config.width
        options = types_of(config) | {"rngs": rngs}
        self.num_heads = config.num_heads
        self.query = nnx.Linear(width, width, **options)
        self.key = nnx.Linear(key_width, width, **options)
        self.value = nnx.Linear(key_width, width, **options)
        self.out = nnx.Linear(width, width, **options)
        self.norm = nnx.LayerNorm(width, epsilon=config.layer_norm_epsilon, **options)

    def __call__(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        """x [B, Q, width] attends to keys [B, T, key_width]; gives x anew."""

        def heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*projected.shape[:2], self.num_heads, -1)

        mixed = jax.nn.dot_product_attention(
            heads(self.query(x)), heads(self.key(keys)), heads(self.value(keys))
        )
        return self.norm(x + self.out(mixed.reshape(x.shape)))


class QFormerLayer(nnx.Module):
    """Self-attention of the queries, attention to a window, a feed-forward block.

    Args:
      frame_width: of the window's frames.
      config: the Q-Former's.
    """

    def __init__(self, frame_width: int, config: QFormerConfig, *, rngs: nnx.Rngs):
        width = config.width
        options = types_of(config) | {"rngs": rngs}
        self.attention = PostNormAttention(width, config, rngs=rngs)
        self.cross_attention = PostNormAttention(frame_width, config, rngs=rngs)
        self.hidden = nnx.Linear(width, config.hidden_width, **options)
        self.out = nnx.Linear(config.hidden_width, width, **options)
        self.out_norm = nnx.LayerNorm(width, epsilon=config.layer_norm_epsilon, **options)

    def __call__(
        self,
        x: jax.Array,
        frames: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Queries x [B W, Q, width] of windows [B W, window, frame_width] anew; no dropout."""
        x = self.cross_attention(self.attention(x, x), frames)
        return self.out_norm(x + self.out(jax.nn.gelu(self.hidden(x), approximate=False)))


class WindowQFormer(nnx.Module):
    """Asks each window of both encoders' frames the same queries.

    Args:
      speech_width: of Whisper's frames.
      sound_width: of BEATs' tokens.
      out_width: D.
      config: sizes.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        speech_width: int,
        sound_width: int,
        out_width: int,
        config: QFormerConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        options = types_of(config) | {"rngs": rngs}
        input_norm = {"epsilon": config.input_norm_epsilon, **options}
        self.speech_norm = nnx.LayerNorm(speech_width, **input_norm)
        self.sound_norm = nnx.LayerNorm(sound_width, **input_norm)
        queries = 0.02 * jax.random.normal(rngs.params(), (config.num_queries, config.width))
        self.queries = nnx.Param(queries.astype(options["param_dtype"]))
        self.query_norm = nnx.LayerNorm(config.width, epsilon=config.layer_norm_epsilon, **options)
        self.layers = Stack(
            lambda rngs: QFormerLayer(speech_width + sound_width, config, rngs=rngs),
            config.num_layers,
            rngs=rngs,
        )
        self.projection = nnx.Linear(config.width, out_width, **options)

    def __call__(self, speech: jax.Array, sound: jax.Array, sound_mask: jax.Array) -> jax.Array:
        """Makes speech tokens.

        The shorter of the two inputs is followed by zeros, which are attended to.

        Args:
          speech: Whisper's frames [B, T, speech_width].
          sound: BEATs' tokens, taken one a frame [B, T', sound_width].
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
        queries = jnp.broadcast_to(queries, (windows.shape[0], *queries.shape))  # B*W Q width
        answers, _ = self.layers(queries, windows)
        tokens = self.projection(answers)  # B*W Q D
        return tokens.reshape(frames.shape[0], -1, tokens.shape[-1])


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
    min_samples: int = audio.SAMPLE_RATE
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
            "width": 5120,
            "mlp_width": 13824,
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
        """Reads what is known of the four checkpoints, see `speech.describe`.

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
    def width(self) -> int:
        """D."""
        return self.decoder.width

    @property
    def num_speech_tokens(self) -> int:
        """A, the same for every clip."""
        return self.qformer.num_tokens(self.whisper.max_positions)


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
            config.whisper.width,
            config.beats.width,
            config.decoder.width,
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
        heard = audio.length_mask(lengths, waveform.shape[1])
        waveform = jnp.where(heard, waveform, 0)[:, : config.max_samples]
        missing = max(0, config.min_samples - waveform.shape[1])
        waveform = jnp.pad(waveform, ((0, 0), (0, missing)))
        lengths = jnp.clip(lengths, config.min_samples, config.max_samples)

        speech, _ = self.whisper(waveform, lengths, **options)  # B T width
        fbank = beats.features(waveform, config.beats)
        # A clip's own tokens, in whatever batch: those of a batch of one in the official code.
        num_tokens = config.beats.num_tokens(audio.kaldi_fbank_lengths(lengths))
        token_mask = audio.length_mask(num_tokens, config.beats.num_tokens(fbank.shape[1]))
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
