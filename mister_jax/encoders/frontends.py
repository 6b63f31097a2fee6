"""Front ends: from a padded batch of waveforms to what speech encoders read.

Whisper's log-Mel spectrogram, Kaldi's filter bank and wav2vec 2.0's normalisation, all in JAX and
without weights. Waveforms are mono, 16 kHz, full scale 1, each clip at the start of its row. No
result for a clip depends on what stands behind it, be it NaN. Shape letters: B clips, S samples,
F frames, M Mel bins.
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

_FBANK_FFT = 512
_PRE_EMPHASIS = 0.97


def frames(waveform: jax.Array, size: int, step: int, count: int) -> jax.Array:
    """Overlapping frames, by static slices instead of a gather.

    Args:
      waveform: [B, S]; behind its end are zeros.
      size: samples of a frame.
      step: samples from a frame's start to the next one's.
      count: F.

    Returns:
      [B, F, size].
    """
    parts = -(-size // step)
    needed = (count + parts - 1) * step
    waveform = jnp.pad(waveform, ((0, 0), (0, max(0, needed - waveform.shape[1]))))[:, :needed]
    blocks = waveform.reshape(waveform.shape[0], -1, step)
    shifted = [blocks[:, part : part + count] for part in range(parts)]
    return jnp.concatenate(shifted, axis=-1)[..., :size]


@jax.jit
def normalize(waveform: jax.Array, lengths: jax.Array) -> jax.Array:
    """Zero mean and unit variance over each clip's samples, as wav2vec 2.0 reads it.

    Args:
      waveform: [B, S].
      lengths: samples of each clip [B] int.

    Returns:
      [B, S] float32, zero behind the clip.
    """
    mask = length_mask(lengths, waveform.shape[1])
    count = jnp.maximum(mask.sum(1, keepdims=True), 1)
    waveform = jnp.where(mask, waveform, 0).astype(jnp.float32)
    centred = jnp.where(mask, waveform - waveform.sum(1, keepdims=True) / count, 0)
    variance = (centred**2).sum(1, keepdims=True) / count
    return centred / jnp.sqrt(variance + 1e-7)


def _triangles(points: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Filter m rises from edge m to m + 1 and falls to m + 2; its values at points, [points, M]."""
    rising = (points[:, None] - edges[:-2]) / np.diff(edges[:-1])
    falling = (edges[2:] - points[:, None]) / np.diff(edges[1:])
    return np.maximum(0, np.minimum(rising, falling))


@functools.lru_cache
def slaney_filters(num_mel_bins: int) -> np.ndarray:
    """Whisper's Mel filters over the 201 bins of a 400-point spectrum, [201, M] float32.

    Triangles on Slaney's scale (linear to 1 kHz, then logarithmic) from 0 to 8 kHz, of unit area.
    """
    top = SAMPLE_RATE / 2
    step = np.log(6.4) / 27  # above 1 kHz, where the scale is at 15
    edges = np.linspace(0, 15 + np.log(top / 1000) / step, num_mel_bins + 2)
    edges = np.where(edges < 15, edges * 200 / 3, 1000 * np.exp((edges - 15) * step))
    filters = _triangles(np.linspace(0, top, FRAME_SIZE // 2 + 1), edges)
    return (filters * 2 / (edges[2:] - edges[:-2])).astype(np.float32)


@functools.lru_cache
def kaldi_filters(num_mel_bins: int, low: float = 20.0, high: float = 8000.0) -> np.ndarray:
    """Kaldi's Mel filters over the 257 bins of a 512-point spectrum, [257, M] float32.

    Triangles on the scale ln(1 + f / 700) of height 1; the last bin is not used. A narrow filter
    may hold no bin at all.
    """
    edges = np.linspace(np.log1p(low / 700), np.log1p(high / 700), num_mel_bins + 2)
    frequencies = np.arange(_FBANK_FFT // 2) * (SAMPLE_RATE / _FBANK_FFT)
    filters = _triangles(np.log1p(frequencies / 700), edges)
    return np.pad(filters, ((0, 1), (0, 0))).astype(np.float32)


def _power(spectrum: jax.Array) -> jax.Array:
    return spectrum.real**2 + spectrum.imag**2


def _filtered(power: jax.Array, filters: np.ndarray) -> jax.Array:
    return jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)


def log_mel_lengths(lengths: jax.Array) -> jax.Array:
    """Frames of `log_mel` whose centre is in the clip, of `lengths` [B] samples."""
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
    """Whisper's log-Mel spectrogram (arXiv 2212.04356) of clips padded to 30 s with silence.

    log10 of the Mel power, cut 8 below the clip's maximum, plus 4, divided by 4. The frames that
    are not asked for are not computed, and those given are the same as with them.

    Args:
      waveform: [B, S].
      lengths: samples of each clip [B] int.
      num_mel_bins: M, 80 or, from large-v3 on, 128.
      num_frames: F, how many from the first; all by default. Fewer than the clips have, plus two
        which see their last samples, is right only if what is left out is not the loudest.
      window_frames: of the padded clip; what a clip has behind it is cut.

    Returns:
      [B, F, M] float32. Frames behind a clip hold its floor, that of silence.
    """
    num_frames = window_frames if num_frames is None else min(num_frames, window_frames)
    window, half = window_frames * FRAME_STEP, FRAME_SIZE // 2
    # Reflection at the window's end is seen by its last frame alone.
    needed = window if num_frames == window_frames else num_frames * FRAME_STEP + half
    waveform = jnp.where(length_mask(lengths, waveform.shape[1]), waveform, 0)[:, :needed]
    waveform = waveform.astype(jnp.float32)
    waveform = jnp.pad(waveform, ((0, 0), (0, needed - waveform.shape[1])))
    waveform = jnp.pad(waveform, ((0, 0), (half, half)), mode="reflect")
    framed = frames(waveform, FRAME_SIZE, FRAME_STEP, num_frames)  # B F 400
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME_SIZE) / FRAME_SIZE)
    power = _power(jnp.fft.rfft(framed * hann.astype(np.float32)))  # B F 201
    mel = jnp.log10(jnp.maximum(_filtered(power, slaney_filters(num_mel_bins)), 1e-10))  # B F M
    return (jnp.maximum(mel, mel.max((1, 2), keepdims=True) - 8) + 4) / 4


def kaldi_fbank_lengths(lengths: jax.Array) -> jax.Array:
    """Frames of `kaldi_fbank` that are wholly in the clip, of `lengths` [B] samples."""
    return jnp.maximum(0, (lengths - FRAME_SIZE) // FRAME_STEP + 1)


@functools.partial(jax.jit, static_argnames="num_mel_bins")
def kaldi_fbank(waveform: jax.Array, *, num_mel_bins: int = 128) -> jax.Array:
    """Kaldi's log-Mel filter bank.

    Frames of 25 ms every 10 ms, none across the end; of each the mean is taken out, pre-emphasis
    0.97, Povey window, 512-point power spectrum, natural logarithm with float32's epsilon for its
    floor. No dither, no energy.

    Args:
      waveform: [B, S]. Kaldi's full scale is 2^15; scale it first where a model expects that.
      num_mel_bins: M, from 20 Hz to 8 kHz.

    Returns:
      [B, F, M] float32, F = 1 + (S - 400) // 160 and at least 1. A frame depends on its own 400
      samples alone; `kaldi_fbank_lengths` tells which are the clip's.
    """
    count = max(0, waveform.shape[1] - FRAME_SIZE) // FRAME_STEP + 1
    framed = frames(waveform.astype(jnp.float32), FRAME_SIZE, FRAME_STEP, count)  # B F 400
    framed = framed - framed.mean(-1, keepdims=True)
    # The first sample's predecessor is itself.
    before = jnp.concatenate([framed[..., :1], framed[..., :-1]], axis=-1)
    framed = framed - _PRE_EMPHASIS * before
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME_SIZE) / (FRAME_SIZE - 1))
    povey = (hann**0.85).astype(np.float32)
    power = _power(jnp.fft.rfft(framed * povey, _FBANK_FFT))  # B F 257
    mel = _filtered(power, kaldi_filters(num_mel_bins))
    return jnp.log(jnp.maximum(mel, np.finfo(np.float32).eps))
