"""Augmentation of speech in training: gain, noise, speed, and masks on spectrograms.

Each clip has a key of its own, so what happens to it depends neither on its batch nor on its
padding. Shape letters: B clips, S samples, F frames, M bins.
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
    """Makes each clip louder or softer.

    Args:
      waveform: [B, S].
      keys: typed keys [B], one a clip.
      low: least gain, dB.
      high: greatest gain, dB.

    Returns:
      [B, S]; a loud clip may pass full scale and is not clipped.
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
    """Adds white noise at a random ratio of the clip's power to the noise's.

    Args:
      waveform: [B, S].
      lengths: samples of each clip [B] int.
      keys: typed keys [B], one a clip.
      low: least ratio, dB.
      high: greatest ratio, dB.

    Returns:
      [B, S]; as it was behind the clip.
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
    """Plays each clip faster or slower, pitch and all, by linear interpolation.

    Args:
      waveform: [B, S].
      lengths: samples of each clip [B] int.
      keys: typed keys [B], one a clip.
      low: least speed, above 0.
      high: greatest speed.

    Returns:
      [B, S / low], rounded up, zero behind the clip; and the new lengths [B].
    """
    speed = _uniform(keys, low, high)[:, None]
    num_samples = waveform.shape[1]
    clip = jnp.where(length_mask(lengths, num_samples), waveform, 0)
    place = jnp.arange(math.ceil(num_samples / low)) * speed  # B S / low
    before = jnp.minimum(place.astype(jnp.int32), num_samples - 1)
    after = jnp.minimum(before + 1, jnp.maximum(lengths - 1, 0)[:, None])
    part = place - before
    left, right = (jnp.take_along_axis(clip, index, axis=1) for index in (before, after))
    new_lengths = jnp.ceil(lengths / speed[:, 0]).astype(jnp.int32)
    valid = length_mask(new_lengths, place.shape[1]) & (place <= lengths[:, None] - 1)
    return jnp.where(valid, left + part * (right - left), 0), valid.sum(1)


def mask_spectrogram(
    spectrogram: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    *,
    time_masks: int = 2,
    time_width: int = 50,
    time_part: float = 0.2,
    bin_masks: int = 2,
    bin_width: int = 15,
) -> jax.Array:
    """SpecAugment (arXiv 1904.08779) without warping: random stretches become the clip's mean.

    Args:
      spectrogram: [B, F, M].
      mask: true at the clip's frames, which come first [B, F] bool.
      keys: typed keys [B], one a clip.
      time_masks: stretches of frames.
      time_width: frames of the widest.
      time_part: of the clip's frames, that the widest has at most.
      bin_masks: stretches of bins.
      bin_width: bins of the widest.

    Returns:
      [B, F, M]; as it was behind the clip.
    """
    count = mask.sum(1)
    valid = mask[..., None]
    values = jnp.where(valid, spectrogram, 0)
    mean = values.sum((1, 2)) / jnp.maximum(count * spectrogram.shape[2], 1)

    def stretches(key: jax.Array, size: jax.Array, number: int, widest: jax.Array) -> jax.Array:
        """Starts and ends [number], of widths 0 ... widest within size."""
        width_key, start_key = jax.random.split(key)
        widths = jax.random.uniform(width_key, (number,)) * (widest + 1)
        widths = jnp.minimum(widths.astype(jnp.int32), widest)
        room = size - widths + 1
        starts = (jax.random.uniform(start_key, (number,)) * room).astype(jnp.int32)
        return jnp.stack([starts, starts + widths])

    def hidden(key: jax.Array, count: jax.Array) -> jax.Array:
        """Cells of one clip that are masked, [F, M]."""
        time_key, bin_key = jax.random.split(key)
        widest = jnp.minimum(time_width, (time_part * count).astype(jnp.int32))
        times = stretches(time_key, count, time_masks, widest)[..., None]
        num_bins = jnp.asarray(spectrogram.shape[2])
        bins = stretches(bin_key, num_bins, bin_masks, jnp.minimum(bin_width, num_bins))[..., None]
        frame, place = jnp.arange(spectrogram.shape[1]), jnp.arange(spectrogram.shape[2])
        rows = ((frame >= times[0]) & (frame < times[1])).any(0)
        columns = ((place >= bins[0]) & (place < bins[1])).any(0)
        return rows[:, None] | columns

    masked = jax.vmap(hidden)(keys, count) & valid
    return jnp.where(masked, mean[:, None, None].astype(spectrogram.dtype), spectrogram)
