"""Augmentation of training speech: gain, noise, speed and spectrogram masks.

There is one `jax.random.key` per clip, so that a clip's augmentation does not depend on the batch
or on padding.
Shape letters: B clips, S samples, F frames, M mel bins.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mister_jax.nn.masking import length_mask


def _uniform(keys: jax.Array, low: float, high: float) -> jax.Array:
    return jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))(keys)


def random_gain(
    waveform: jax.Array, keys: jax.Array, *, low: float = -10.0, high: float = 6.0
) -> jax.Array:
    """Multiplies each clip by a random gain.

    Args:
      waveform: Waveforms, [B, S].
      keys: Keys, one per clip, [B].
      low: Minimum gain in dB.
      high: Maximum gain in dB.

    Returns:
      Waveforms, [B, S]. Values may exceed full scale; they are not clipped.
    """
    return waveform * 10 ** (_uniform(keys, low, high)[:, None] / 20)


def add_noise(
    waveform: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    low: float = 5.0,
    high: float = 30.0,
) -> jax.Array:
    """Adds white noise at a random signal-to-noise ratio to each clip.

    Args:
      waveform: Waveforms, [B, S].
      lengths: Number of samples in each clip, [B] int.
      keys: Keys, one per clip, [B].
      low: Minimum signal-to-noise ratio in dB.
      high: Maximum signal-to-noise ratio in dB.

    Returns:
      Waveforms, [B, S], with unchanged padding.
    """
    mask = length_mask(lengths, waveform.shape[1])
    squares = jnp.where(mask, waveform, 0) ** 2
    power = squares.sum(1) / jnp.maximum(mask.sum(1), 1)
    ratio = _uniform(jax.vmap(jax.random.fold_in, (0, None))(keys, 0), low, high)
    noise = jax.vmap(lambda key: jax.random.normal(key, waveform.shape[1:]))(
        jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    )
    noise = noise * jnp.sqrt(power * 10 ** (-ratio / 10))[:, None]
    return jnp.where(mask, waveform + noise, waveform)


def change_speed(
    waveform: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    low: float = 0.9,
    high: float = 1.1,
) -> tuple[jax.Array, jax.Array]:
    """Changes the speed, and therefore the pitch, of each clip by linear interpolation.

    Args:
      waveform: Waveforms, [B, S].
      lengths: Number of samples in each clip, [B] int.
      keys: Keys, one per clip, [B].
      low: Minimum speed, above 0.
      high: Maximum speed.

    Returns:
      Waveforms, [B, ceil(S / low)], with zeros in the padding, and the new lengths, [B].
    """
    speed = _uniform(keys, low, high)[:, None]
    num_samples = waveform.shape[1]
    clip = jnp.where(length_mask(lengths, num_samples), waveform, 0)
    position = jnp.arange(math.ceil(num_samples / low)) * speed  # [B, S / low]
    before = jnp.minimum(position.astype(jnp.int32), num_samples - 1)
    after = jnp.minimum(before + 1, jnp.maximum(lengths - 1, 0)[:, None])
    fraction = position - before
    left, right = (jnp.take_along_axis(clip, index, axis=1) for index in (before, after))
    new_lengths = jnp.ceil(lengths / speed[:, 0]).astype(jnp.int32)
    valid = length_mask(new_lengths, position.shape[1]) & (position <= lengths[:, None] - 1)
    return jnp.where(valid, left + fraction * (right - left), 0), valid.sum(1)


def mask_spectrogram(
    spectrogram: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    *,
    num_time_masks: int = 2,
    max_frames: int = 50,
    max_frame_share: float = 0.2,
    num_bin_masks: int = 2,
    max_bins: int = 15,
) -> jax.Array:
    """Replaces random intervals of time and frequency with the clip's mean.

    This is SpecAugment (arXiv 1904.08779) without time warping.

    Args:
      spectrogram: Spectrograms, [B, F, M].
      mask: Valid frames, [B, F] bool; padding comes after them.
      keys: Keys, one per clip, [B].
      num_time_masks: Number of time masks.
      max_frames: Maximum length of a time mask in frames.
      max_frame_share: Maximum length of a time mask as a fraction of the clip's frames.
      num_bin_masks: Number of frequency masks.
      max_bins: Maximum width of a frequency mask in mel bins.

    Returns:
      Spectrograms, [B, F, M], with unchanged padding.
    """
    count = mask.sum(1)
    valid = mask[..., None]
    values = jnp.where(valid, spectrogram, 0)
    mean = values.sum((1, 2)) / jnp.maximum(count * spectrogram.shape[2], 1)

    def random_stretches(
        key: jax.Array, size: jax.Array, number: int, max_length: jax.Array, positions: jax.Array
    ) -> jax.Array:
        """Returns a mask of `number` random intervals within the first `size` positions."""
        length_key, start_key = jax.random.split(key)
        lengths = jax.random.uniform(length_key, (number,)) * (max_length + 1)
        lengths = jnp.minimum(lengths.astype(jnp.int32), max_length)
        num_starts = size - lengths + 1
        starts = (jax.random.uniform(start_key, (number,)) * num_starts).astype(jnp.int32)
        starts, ends = starts[:, None], (starts + lengths)[:, None]
        return ((positions >= starts) & (positions < ends)).any(0)

    def masked_cells(key: jax.Array, count: jax.Array) -> jax.Array:
        """Returns which cells of a clip's spectrogram are masked, [F, M]."""
        time_key, bin_key = jax.random.split(key)
        _, num_frames, num_bins = spectrogram.shape
        longest = jnp.minimum(max_frames, (max_frame_share * count).astype(jnp.int32))
        frames = random_stretches(time_key, count, num_time_masks, longest, jnp.arange(num_frames))
        widest = jnp.asarray(min(max_bins, num_bins))
        bins = random_stretches(
            bin_key, jnp.asarray(num_bins), num_bin_masks, widest, jnp.arange(num_bins)
        )
        return frames[:, None] | bins

    masked = jax.vmap(masked_cells)(keys, count) & valid
    return jnp.where(masked, mean[:, None, None].astype(spectrogram.dtype), spectrogram)
