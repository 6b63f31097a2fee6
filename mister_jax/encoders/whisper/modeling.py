"""Whisper's encoder (arXiv 2212.04356): a vector every 20 ms of a clip of up to 30 s.

The decoder is not here. Whisper was trained on clips padded to 30 s with silence, which it attends
to like speech. Shape letters: B clips, S samples, F frames of 10 ms, M Mel bins, N positions of
20 ms, D width, K heads, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.encoders import augment, frontends
from mister_jax.encoders.layers import SelfAttention, dtypes, layer_norm
from mister_jax.encoders.whisper.config import SAMPLES_PER_POSITION, WhisperConfig
from mister_jax.nn import ScannedLayers
from mister_jax.nn.dropout import Dropout, KeySource
from mister_jax.nn.lora import LoRALinear, add_lora
from mister_jax.nn.masking import length_mask


def _norm(config: WhisperConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layer_norm(config.hidden_size, 1e-5, config, rngs)


def _sinusoids(num_positions: int, hidden_size: int) -> np.ndarray:
    """Sines, then cosines, of wave lengths from 2 pi to 10,000 times that, [N, D] float32."""
    rates = np.exp(-np.log(10_000) * np.arange(hidden_size // 2) / max(1, hidden_size // 2 - 1))
    angles = np.arange(num_positions)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class WhisperLayer(nnx.Module):
    """Self-attention and a feed-forward block, each on a normed input and added to it.

    Args:
      config: the model's.
    """

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        hidden_size, options = config.hidden_size, dtypes(config) | {"rngs": rngs}
        self.attention_norm = _norm(config, rngs)
        self.attention = SelfAttention(
            hidden_size,
            config.num_heads,
            key_bias=False,
            dropout=config.attention_dropout,
            implementation=config.attention_implementation,
            **options,
        )
        self.mlp_norm = _norm(config, rngs)
        self.mlp_in = LoRALinear(hidden_size, config.mlp_dim, **options)
        self.mlp_out = LoRALinear(config.mlp_dim, hidden_size, **options)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)

    def __call__(
        self,
        x: jax.Array,
        key_mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """x [B, N, D] anew, attending where key_mask [B, N]."""
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        attended = self.attention(self.attention_norm(x), key_mask[:, None, None], **options)
        x = x + self.dropout(attended, **options)
        hidden = jax.nn.gelu(self.mlp_in(self.mlp_norm(x), **options), approximate=False)
        hidden = self.activation_dropout(hidden, **options)
        return x + self.dropout(self.mlp_out(hidden, **options), **options)


class Whisper(nnx.Module):
    """The encoder.

    Args:
      config: sizes and options.
      rngs: for the initial parameters.
    """

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        hidden_size, options = config.hidden_size, dtypes(config) | {"rngs": rngs}
        self.config = config
        self.convolution = nnx.Conv(config.num_mel_bins, hidden_size, (3,), padding=1, **options)
        self.strided_convolution = nnx.Conv(
            hidden_size, hidden_size, (3,), strides=2, padding=1, **options
        )
        self.positions = nnx.Param(
            jnp.asarray(_sinusoids(config.max_positions, hidden_size), options["param_dtype"])
        )
        self.dropout = Dropout(config.dropout)
        self.layers = ScannedLayers(
            lambda rngs: WhisperLayer(config, rngs=rngs),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = _norm(config, rngs)
        if config.lora is not None:
            add_lora(self, config.lora, rngs=rngs)

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
          waveform: mono at 16 kHz, full scale 1 [B, S]. What is behind a clip is not read; what a
            clip has behind `max_positions` of 20 ms is cut.
          lengths: samples of each clip [B] int.
          deterministic: no dropout.
          rngs: source of dropout keys.

        Returns:
          hidden states [B, N, D], and true at the clip's positions [B, N] bool. N is
          `max_positions`, or with `trim` what S samples need, if less.
        """
        mel, mel_lengths = self.mel(waveform, lengths)
        hidden, mask = self.from_mel(mel, mel_lengths, deterministic=deterministic, rngs=rngs)
        num_positions = self.num_positions(waveform.shape[1])
        return hidden[:, :num_positions], mask[:, :num_positions]

    def num_positions(self, num_samples: int) -> int:
        """N of a batch of S samples."""
        if not self.config.trim:
            return self.config.max_positions
        needed = max(1, -(-num_samples // SAMPLES_PER_POSITION))
        return min(needed, self.config.max_positions)

    def mel(self, waveform: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What `from_mel` reads of clips: spectrograms [B, F, M] and their lengths [B]."""
        # The convolutions of a clip's last position see two frames behind it.
        num_frames = 2 * self.num_positions(waveform.shape[1]) + 2
        mel = frontends.log_mel(
            waveform,
            lengths,
            num_mel_bins=self.config.num_mel_bins,
            num_frames=num_frames,
            window_frames=2 * self.config.max_positions,
        )
        return mel, frontends.log_mel_lengths(lengths)

    def from_mel(
        self,
        mel: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes spectrograms.

        Args:
          mel: of `frontends.log_mel` [B, F, M], F even and at most twice `max_positions`. It is
            read behind the clip, too, where silence must be.
          lengths: frames of each clip [B] int.
          deterministic: no dropout.
          rngs: source of dropout keys.

        Returns:
          hidden states [B, F / 2, D], and true at the clip's positions [B, F / 2] bool.
        """
        x, mask, _ = self._run(mel, lengths, False, deterministic=deterministic, rngs=rngs)
        return self.norm(x), mask

    def layer_outputs(
        self,
        waveform: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Like calling it, but for all layers, and the final LayerNorm is not applied.

        Returns:
          what the first layer read and what each layer gave [L + 1, B, N, D], and true at the
          clip's positions [B, N] bool.
        """
        mel, mel_lengths = self.mel(waveform, lengths)
        _, mask, layers = self._run(mel, mel_lengths, True, deterministic=deterministic, rngs=rngs)
        assert layers is not None
        num_positions = self.num_positions(waveform.shape[1])
        return layers[:, :, :num_positions], mask[:, :num_positions]

    def _masked(
        self,
        mel: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Spectrograms as training sees them."""
        if deterministic or not self.config.mask_spectrogram:
            return mel
        if rngs is None:
            raise ValueError("mask_spectrogram needs rngs (nnx.Rngs or PerExampleRngs) in training")
        key = rngs.dropout()
        keys = key if key.shape else jax.random.split(key, len(mel))
        mask = length_mask(lengths, mel.shape[1])
        return augment.mask_spectrogram(mel, mask, keys)

    def _run(
        self, mel: jax.Array, lengths: jax.Array, output_hidden_states: bool, **options: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        num_positions = mel.shape[1] // 2
        mel = self._masked(mel, lengths, **options)
        if mel.shape[1] % 2 or num_positions > self.config.max_positions:
            raise ValueError(
                f"{mel.shape[1]} frames; allowed is an even number up to "
                f"{2 * self.config.max_positions}"
            )
        x = jax.nn.gelu(self.convolution(mel), approximate=False)
        x = jax.nn.gelu(self.strided_convolution(x), approximate=False)  # B N D
        # The table is not learned, and `optim` does not let it decay. A parameter nevertheless: it
        # is of the checkpoint.
        positions = jax.lax.stop_gradient(self.positions[:num_positions]).astype(x.dtype)
        x = self.dropout(x + positions, **options)
        mask = length_mask(-(-lengths // 2), num_positions)
        key_mask = mask if self.config.trim else jnp.ones_like(mask)
        last, layers = self.layers(
            x, key_mask, output_hidden_states=output_hidden_states, **options
        )
        return last, mask, None if layers is None else jnp.concatenate([x[None], layers])
