"""Augmentation has the right strength, depends on keys, and does not change padding."""

import functools

import jax
import numpy as np
import pytest

from mister_jax.encoders import augment

LENGTHS = np.array([4000, 1500, 0])
KEYS = jax.random.split(jax.random.key(0), 3)


def waveform(num_samples=4000):
    tone = np.sin(np.arange(num_samples) * 0.1) * np.array([[1.0], [0.1], [1.0]])
    mask = np.arange(num_samples) < LENGTHS[:, None]
    return np.where(mask, tone, np.nan).astype(np.float32)


def spectrogram(num_frames=60):
    values = np.random.default_rng(0).normal(size=(3, 60, 20)).astype(np.float32)
    return np.pad(values, ((0, 0), (0, num_frames - 60), (0, 0)), constant_values=np.nan)


def frame_mask(num_frames=60):
    return np.arange(num_frames) < np.array([[60], [30], [0]])


def test_gain_is_in_its_range():
    keys = jax.random.split(jax.random.key(0), 200)
    random_gain = jax.jit(functools.partial(augment.random_gain, low=-6, high=6))
    gained = np.asarray(random_gain(np.ones((200, 5), np.float32), keys))
    decibels = 20 * np.log10(gained)
    assert -6 <= decibels.min() < -4 and 4 < decibels.max() <= 6
    np.testing.assert_array_equal(gained, np.broadcast_to(gained[:, :1], gained.shape))


def test_noise_has_the_requested_ratio():
    add_noise = jax.jit(functools.partial(augment.add_noise, low=10, high=10))
    noisy = np.asarray(add_noise(waveform(), LENGTHS, KEYS))
    for row, clean, length in zip(noisy, waveform(), LENGTHS, strict=True):
        added = row[:length] - clean[:length]
        if length:
            ratio = 10 * np.log10((clean[:length] ** 2).mean() / (added**2).mean())
            assert ratio == pytest.approx(10, abs=0.5)
        np.testing.assert_array_equal(row[length:], clean[length:])


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.25])
def test_speed_changes_length_and_pitch(speed):
    change_speed = jax.jit(functools.partial(augment.change_speed, low=speed, high=speed))
    changed, lengths = map(np.asarray, change_speed(waveform(), LENGTHS, KEYS))
    assert changed.shape[1] == np.ceil(4000 / speed)
    np.testing.assert_allclose(lengths, LENGTHS / speed, atol=1)
    assert np.isfinite(changed).all()
    for row, length, amplitude in zip(changed, lengths, (1, 0.1), strict=False):
        expected = amplitude * np.sin(np.arange(length) * 0.1 * speed)
        np.testing.assert_allclose(row[:length], expected, atol=2e-3)
        np.testing.assert_array_equal(row[length:], 0)


def test_masked_stretches_hold_the_mean_of_the_clip():
    clean, mask = spectrogram(), frame_mask()
    mask_spectrogram = functools.partial(augment.mask_spectrogram, max_frames=9, max_bins=4)
    masked = np.asarray(jax.jit(mask_spectrogram)(clean, mask, KEYS))
    for index, count in enumerate((60, 30)):
        changed = masked[index] != clean[index]
        assert changed[:count].any() and not changed[count:].any()
        rows, columns = changed[:count].all(1), changed[:count].all(0)
        np.testing.assert_array_equal(changed[:count], rows[:, None] | columns)
        assert rows.sum() <= 18 and columns.sum() <= 8
        np.testing.assert_allclose(masked[index][changed], clean[index, :count].mean(), atol=1e-6)
    np.testing.assert_array_equal(masked[2], clean[2])


def test_masks_have_every_length_up_to_the_maximum():
    keys = jax.random.split(jax.random.key(0), 300)
    values = np.arange(300 * 40 * 10, dtype=np.float32).reshape(300, 40, 10)
    mask_spectrogram = functools.partial(
        augment.mask_spectrogram, num_time_masks=1, max_frames=3, num_bin_masks=0
    )
    masked = jax.jit(mask_spectrogram)(values, np.ones((300, 40), bool), keys)
    assert set((np.asarray(masked) != values).all(2).sum(1)) == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["gain", "noise", "speed", "mask"])
def test_augmentation_of_a_clip_does_not_depend_on_the_batch(kind):
    def augment_rows(rows, num_samples, num_frames):
        keys, lengths = KEYS[rows], LENGTHS[rows]
        if kind == "mask":
            mask = frame_mask(num_frames)[rows]
            masked = jax.jit(augment.mask_spectrogram)(spectrogram(num_frames)[rows], mask, keys)
            return np.asarray(masked)[:, :30]
        clips = waveform(num_samples)[rows]
        if kind == "gain":
            return np.asarray(jax.jit(augment.random_gain)(clips, keys))[:, :1500]
        if kind == "noise":
            return np.asarray(jax.jit(augment.add_noise)(clips, lengths, keys))[:, :1500]
        return np.asarray(jax.jit(augment.change_speed)(clips, lengths, keys)[0])[:, :1300]

    single = augment_rows(slice(1, 2), 1500, 60)[0]
    batched = augment_rows(slice(0, 3), 4321, 77)[1]
    np.testing.assert_allclose(batched, single, atol=1e-5)
