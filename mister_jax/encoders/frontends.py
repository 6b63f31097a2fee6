"""Front ends of speech encoders: functions that turn waveforms into an encoder's input.

This module has Whisper's log-mel spectrogram, Kaldi's filter bank and wav2vec 2.0's normalization.
Waveforms are mono, at 16 kHz and in [-1, 1], with padding after each clip. Padding, even NaN, does
not affect valid samples or frames. Shape letters: B clips, S samples, F frames, M mel bins.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mister_jax.nn.masking import length_mask

SAMPLE_RATE = 16_000
FRAME_STEP = 160  # samples, 10 ms
FRAME_SIZE = 400  # samples, 25 ms

_FBANK_FFT_SIZE = 512
_PRE_EMPHASIS = 0.97


def split_frames(waveform: jax.Array, size: int, step: int, num_frames: int) -> jax.Array:
    """Splits waveforms into overlapping frames with static slices instead of a gather.

    Args:
      waveform: Waveforms, [B, S]; zero-padded if the frames need more samples.
      size: Number of samples per frame.
      step: Number of samples from the start of one frame to the start of the next.
      num_frames: Number of frames F.

    Returns:
      Frames, [B, F, size].
    """
    blocks_per_frame = -(-size // step)
    num_samples = (num_frames + blocks_per_frame - 1) * step
    padding = max(0, num_samples - waveform.shape[1])
    waveform = jnp.pad(waveform, ((0, 0), (0, padding)))[:, :num_samples]
    blocks = waveform.reshape(waveform.shape[0], -1, step)
    shifted = [blocks[:, shift : shift + num_frames] for shift in range(blocks_per_frame)]
    return jnp.concatenate(shifted, axis=-1)[..., :size]


@jax.jit
def normalize(waveform: jax.Array, lengths: jax.Array) -> jax.Array:
    """Normalizes each clip to zero mean and unit variance, as wav2vec 2.0 expects.

    Args:
      waveform: Waveforms, [B, S].
      lengths: Number of samples in each clip, [B] int.

    Returns:
      Normalized waveforms, [B, S] float32, with zeros in the padding.
    """
    mask = length_mask(lengths, waveform.shape[1])
    count = jnp.maximum(mask.sum(1, keepdims=True), 1)
    waveform = jnp.where(mask, waveform, 0).astype(jnp.float32)
    centered = jnp.where(mask, waveform - waveform.sum(1, keepdims=True) / count, 0)
    variance = (centered**2).sum(1, keepdims=True) / count
    return centered / jnp.sqrt(variance + 1e-7)


def _triangular_filters(points: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Evaluates M triangular filters at the given points; returns the values, [points, M].

    Filter m rises from edge m to edge m + 1 and falls to edge m + 2.
    """
    rising = (points[:, None] - edges[:-2]) / np.diff(edges[:-1])
    falling = (edges[2:] - points[:, None]) / np.diff(edges[1:])
    return np.maximum(0, np.minimum(rising, falling))


@functools.lru_cache
def slaney_filters(num_mel_bins: int) -> np.ndarray:
    """Returns Whisper's mel filters for a 400-point spectrum, [201, M] float32.

    The filters are triangles with unit area from 0 to 8 kHz on Slaney's mel scale, which is linear
    up to 1 kHz and logarithmic above.
    """
    top = SAMPLE_RATE / 2
    step = np.log(6.4) / 27  # log(frequency) per mel above 1 kHz, which is 15 mel.
    edges = np.linspace(0, 15 + np.log(top / 1000) / step, num_mel_bins + 2)
    edges = np.where(edges < 15, edges * 200 / 3, 1000 * np.exp((edges - 15) * step))
    filters = _triangular_filters(np.linspace(0, top, FRAME_SIZE // 2 + 1), edges)
    return (filters * 2 / (edges[2:] - edges[:-2])).astype(np.float32)


@functools.lru_cache
def kaldi_filters(num_mel_bins: int, low: float = 20.0, high: float = 8000.0) -> np.ndarray:
    """Returns Kaldi's mel filters for a 512-point spectrum, [257, M] float32.

    The filters are triangles with height 1 on the scale ln(1 + f / 700), from `low` to `high` Hz.
    The last frequency has weight 0 in all filters. A narrow filter may be zero at all frequencies.
    """
    edges = np.linspace(np.log1p(low / 700), np.log1p(high / 700), num_mel_bins + 2)
    frequencies = np.arange(_FBANK_FFT_SIZE // 2) * (SAMPLE_RATE / _FBANK_FFT_SIZE)
    filters = _triangular_filters(np.log1p(frequencies / 700), edges)
    return np.pad(filters, ((0, 1), (0, 0))).astype(np.float32)


def _power(spectrum: jax.Array) -> jax.Array:
    return spectrum.real**2 + spectrum.imag**2


def _apply_filters(power: jax.Array, filters: np.ndarray) -> jax.Array:
    return jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)


def log_mel_lengths(lengths: jax.Array) -> jax.Array:
    """Returns the number of `log_mel` frames centered inside clips of `lengths` [B] samples."""
    return -(-lengths // FRAME_STEP)


@functools.partial(jax.jit, static_argnames=("num_mel_bins", "num_frames", "window_frames"))
def log_mel(
    waveform: jax.Array,
    lengths: jax.Array,
    *,
    num_mel_bins: int = 80,
    num_frames: int | None = None,
    window_frames: int = 3000,
) -> jax.Array:
    """Computes Whisper's log-mel spectrogram (arXiv 2212.04356) of clips padded with silence.

    The log10 of the mel power, x, is clipped from below at the clip's maximum - 8 and scaled to
    (x + 4) / 4.

    Args:
      waveform: Waveforms, [B, S].
      lengths: Number of samples in each clip, [B] int.
      num_mel_bins: Number of mel bins M: 128 for large-v3 and 80 for older models.
      num_frames: Number of frames F to compute; `window_frames` by default. F should cover the
        longest clip and the two frames after the clip, which overlap its last samples. With fewer
        frames, the values are correct only if no omitted frame contains the clip's maximum.
      window_frames: Number of frames in a padded clip; longer clips are truncated.

    Returns:
      Spectrograms, [B, F, M] float32. Frames that contain no samples of the clip have the clip's
      minimum value, which represents silence.
    """
    num_frames = window_frames if num_frames is None else min(num_frames, window_frames)
    window, half = window_frames * FRAME_STEP, FRAME_SIZE // 2
    # Only the last frame depends on the reflection at the end of the window.
    num_samples = window if num_frames == window_frames else num_frames * FRAME_STEP + half
    waveform = jnp.where(length_mask(lengths, waveform.shape[1]), waveform, 0)[:, :num_samples]
    waveform = waveform.astype(jnp.float32)
    waveform = jnp.pad(waveform, ((0, 0), (0, num_samples - waveform.shape[1])))
    waveform = jnp.pad(waveform, ((0, 0), (half, half)), mode="reflect")
    frames = split_frames(waveform, FRAME_SIZE, FRAME_STEP, num_frames)  # [B, F, 400]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME_SIZE) / FRAME_SIZE)
    power = _power(jnp.fft.rfft(frames * hann.astype(np.float32)))  # [B, F, 201]
    mel = _apply_filters(power, slaney_filters(num_mel_bins))  # [B, F, M]
    log_power = jnp.log10(jnp.maximum(mel, 1e-10))
    return (jnp.maximum(log_power, log_power.max((1, 2), keepdims=True) - 8) + 4) / 4


def kaldi_fbank_lengths(lengths: jax.Array) -> jax.Array:
    """Returns the number of `kaldi_fbank` frames in clips of `lengths` [B] samples."""
    return jnp.maximum(0, (lengths - FRAME_SIZE) // FRAME_STEP + 1)


@functools.partial(jax.jit, static_argnames="num_mel_bins")
def kaldi_fbank(waveform: jax.Array, *, num_mel_bins: int = 128) -> jax.Array:
    """Computes Kaldi's log-mel filter bank.

    The frames are 25 ms long and start every 10 ms. Samples after the last complete frame are
    ignored. Each frame is shifted to zero mean, pre-emphasized with coefficient 0.97 and multiplied
    by a Povey window. The mel filters are applied to the 512-point power spectrum. The result is
    clipped from below at float32's epsilon before the natural logarithm. Dither and the energy
    feature are not implemented.

    Args:
      waveform: Waveforms, [B, S]. Kaldi's full scale is 2^15; if a model expects this scale,
        multiply the input by 2^15.
      num_mel_bins: Number of mel bins M, from 20 Hz to 8 kHz.

    Returns:
      Filter banks, [B, F, M] float32, with F = 1 + (S - 400) // 160, at least 1. A frame depends
      only on the 400 samples in it; `kaldi_fbank_lengths` returns how many frames are valid.
    """
    num_frames = max(0, waveform.shape[1] - FRAME_SIZE) // FRAME_STEP + 1
    frames = split_frames(waveform.astype(jnp.float32), FRAME_SIZE, FRAME_STEP, num_frames)
    frames = frames - frames.mean(-1, keepdims=True)  # [B, F, 400]
    # In Kaldi's pre-emphasis, the first sample of a frame is its own predecessor.
    previous = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    frames = frames - _PRE_EMPHASIS * previous
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME_SIZE) / (FRAME_SIZE - 1))
    povey = (hann**0.85).astype(np.float32)
    power = _power(jnp.fft.rfft(frames * povey, _FBANK_FFT_SIZE))  # [B, F, 257]
    mel = _apply_filters(power, kaldi_filters(num_mel_bins))
    return jnp.log(jnp.maximum(mel, np.finfo(np.float32).eps))
