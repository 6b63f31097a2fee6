"""Whisper's encoder (arXiv 2212.04356), with one vector per 20 ms of a clip of up to 30 s.

The decoder is not implemented. Whisper was trained on clips padded to 30 s with silence, and
attends to the silence like to speech. Shape letters: B clips, S samples, F frames of 10 ms,
M mel bins, N positions of 20 ms, D hidden size, K heads, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.encoders import augment, frontends
from mister_jax.encoders.layers import SelfAttention, dtypes, gelu, layer_norm
from mister_jax.encoders.whisper.config import SAMPLES_PER_POSITION, WhisperConfig
from mister_jax.nn import ScannedLayers
from mister_jax.nn.dropout import Dropout, KeySource
from mister_jax.nn.lora import LoRALinear, add_lora
from mister_jax.nn.masking import length_mask


def _norm(config: WhisperConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layer_norm(config.hidden_size, 1e-5, config, rngs)


def _sinusoids(num_positions: int, hidden_size: int) -> np.ndarray:
    """Returns sines and cosines with wavelengths from 2 pi to 20,000 pi, [N, D] float32."""
    rates = np.exp(-np.log(10_000) * np.arange(hidden_size // 2) / max(1, hidden_size // 2 - 1))
    angles = np.arange(num_positions)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class WhisperLayer(nnx.Module):
    """Self-attention and a feed-forward block, each with a LayerNorm before it and a residual.

    Args:
      config: Config of the model.
      rngs: Source of the initial parameters.
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
        """Transforms x [B, N, D] with attention to the positions where key_mask [B, N] is true."""
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        attended = self.attention(self.attention_norm(x), key_mask[:, None, None], **options)
        x = x + self.dropout(attended, **options)
        hidden = gelu(self.mlp_in(self.mlp_norm(x), **options))
        hidden = self.activation_dropout(hidden, **options)
        return x + self.dropout(self.mlp_out(hidden, **options), **options)


class Whisper(nnx.Module):
    """Whisper's encoder.

    Args:
      config: Sizes and options.
      rngs: Source of the initial parameters.
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
          waveform: Mono audio at 16 kHz with full scale 1, [B, S]. Padding is not read. Clips
            longer than `max_positions` times 20 ms are truncated.
          lengths: Number of samples in each clip, [B] int.
          deterministic: Whether dropout is off.
          rngs: Source of dropout keys.

        Returns:
          Hidden states [B, N, D], and a mask of the clip's positions [B, N] bool. N is
          `max_positions`. With `trim`, it is only as large as S samples need, up to
          `max_positions`.
        """
        mel, mel_lengths = self.mel(waveform, lengths)
        hidden, mask = self.from_mel(mel, mel_lengths, deterministic=deterministic, rngs=rngs)
        num_positions = self.num_positions(waveform.shape[1])
        return hidden[:, :num_positions], mask[:, :num_positions]

    def num_positions(self, num_samples: int) -> int:
        """Returns the number of positions N of a batch of S samples."""
        if not self.config.trim:
            return self.config.max_positions
        num_positions = max(1, -(-num_samples // SAMPLES_PER_POSITION))
        return min(num_positions, self.config.max_positions)

    def mel(self, waveform: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes the input of `from_mel`: spectrograms [B, F, M] and their lengths [B]."""
        # The receptive field of a clip's last position includes two frames after the clip.
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
          mel: Spectrograms from `frontends.log_mel`, [B, F, M], with F even and at most twice
            `max_positions`. Padding is read, so it must be silence.
          lengths: Frames of each clip, [B] int.
          deterministic: Whether dropout is off.
          rngs: Source of dropout keys.

        Returns:
          Hidden states [B, F / 2, D], and a mask of the clip's positions [B, F / 2] bool.
        """
        x, mask, _ = self._encode(mel, lengths, deterministic=deterministic, rngs=rngs)
        return self.norm(x), mask

    def layer_outputs(
        self,
        waveform: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes clips as `__call__`, without the last LayerNorm.

        Returns:
          Input of the first layer and output of each layer [L + 1, B, N, D], and a mask of the
          clip's positions [B, N] bool.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        mel, mel_lengths = self.mel(waveform, lengths)
        _, mask, layers = self._encode(mel, mel_lengths, output_hidden_states=True, **options)
        assert layers is not None
        num_positions = self.num_positions(waveform.shape[1])
        return layers[:, :, :num_positions], mask[:, :num_positions]

    def _augment(
        self,
        mel: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Masks parts of the spectrograms in training, if the config says so."""
        if deterministic or not self.config.mask_spectrogram:
            return mel
        if rngs is None:
            raise ValueError(
                "mask_spectrogram needs rngs (an nnx.Rngs or PerExampleRngs) in training"
            )
        key = rngs.dropout()
        keys = key if key.shape else jax.random.split(key, len(mel))
        return augment.mask_spectrogram(mel, length_mask(lengths, mel.shape[1]), keys)

    def _encode(
        self,
        mel: jax.Array,
        lengths: jax.Array,
        *,
        output_hidden_states: bool = False,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns the last layer's output, the mask, and if requested all layers' outputs."""
        num_frames, max_frames = mel.shape[1], 2 * self.config.max_positions
        if num_frames % 2 or num_frames > max_frames:
            raise ValueError(f"{num_frames} frames; allowed: an even number up to {max_frames}")
        mel = self._augment(mel, lengths, **options)
        x = gelu(self.convolution(mel))
        x = gelu(self.strided_convolution(x))  # [B, N, D]
        # The positions are a parameter because checkpoints contain them, but they are not trained;
        # `optim` excludes them from weight decay.
        positions = jax.lax.stop_gradient(self.positions[: x.shape[1]]).astype(x.dtype)
        x = self.dropout(x + positions, **options)
        mask = length_mask(-(-lengths // 2), x.shape[1])
        key_mask = mask if self.config.trim else jnp.ones_like(mask)
        last, layers = self.layers(
            x, key_mask, output_hidden_states=output_hidden_states, **options
        )
        return last, mask, None if layers is None else jnp.concatenate([x[None], layers])
