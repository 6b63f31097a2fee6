"""Augmentation: its size, its keys, and what it leaves alone."""

import jax
import numpy as np
import pytest

from mister_jax.encoders import augment
from mister_jax.nn.masking import length_mask

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
    return np.asarray(length_mask(np.array([60, 30, 0]), num_frames))


def test_gain_is_in_its_range():
    keys = jax.random.split(jax.random.key(0), 200)
    gained = augment.random_gain(np.ones((200, 5), np.float32), keys, low=-6, high=6)
    decibels = 20 * np.log10(gained)
    assert -6 <= decibels.min() < -4 and 4 < decibels.max() <= 6
    np.testing.assert_array_equal(gained, np.broadcast_to(gained[:, :1], gained.shape))


def test_noise_has_the_ratio_to_the_clip_that_is_asked_for():
    noisy = np.asarray(augment.add_noise(waveform(), LENGTHS, KEYS, low=10, high=10))
    for row, clean, length in zip(noisy, waveform(), LENGTHS, strict=True):
        added = row[:length] - clean[:length]
        if length:
            ratio = 10 * np.log10((clean[:length] ** 2).mean() / (added**2).mean())
            assert ratio == pytest.approx(10, abs=0.5)
        np.testing.assert_array_equal(row[length:], clean[length:])


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.25])
def test_speed_changes_length_and_pitch(speed):
    fast, lengths = augment.change_speed(waveform(), LENGTHS, KEYS, low=speed, high=speed)
    assert fast.shape[1] == np.ceil(4000 / speed)
    np.testing.assert_allclose(lengths, LENGTHS / speed, atol=1)
    assert np.isfinite(fast).all()
    for row, length, amplitude in zip(fast, lengths, (1, 0.1), strict=False):
        expected = amplitude * np.sin(np.arange(length) * 0.1 * speed)
        np.testing.assert_allclose(row[:length], expected, atol=2e-3)
        np.testing.assert_array_equal(row[length:], 0)


def test_masked_stretches_hold_the_clips_mean():
    clean, mask = spectrogram(), frame_mask()
    masked = np.asarray(augment.mask_spectrogram(clean, mask, KEYS, time_width=9, bin_width=4))
    for index, count in enumerate((60, 30)):
        changed = masked[index] != clean[index]
        assert changed[:count].any() and not changed[count:].any()
        rows, columns = changed[:count].all(1), changed[:count].all(0)
        np.testing.assert_array_equal(changed[:count], rows[:, None] | columns)
        assert rows.sum() <= 18 and columns.sum() <= 8
        np.testing.assert_allclose(masked[index][changed], clean[index, :count].mean(), atol=1e-6)
    np.testing.assert_array_equal(masked[2], clean[2])


def test_masks_have_every_width_up_to_the_widest():
    keys = jax.random.split(jax.random.key(0), 300)
    ones = np.arange(300 * 40 * 10, dtype=np.float32).reshape(300, 40, 10)
    masked = augment.mask_spectrogram(
        ones, np.ones((300, 40), bool), keys, time_masks=1, time_width=3, bin_masks=0
    )
    assert set((np.asarray(masked) != ones).all(2).sum(1)) == {0, 1, 2, 3}


@pytest.mark.parametrize("what", ["gain", "noise", "speed", "mask"])
def test_what_happens_to_a_clip_does_not_depend_on_its_batch(what):
    def change(rows, num_samples, num_frames):
        keys, lengths = KEYS[rows], LENGTHS[rows]
        if what == "mask":
            mask = frame_mask(num_frames)[rows]
            return augment.mask_spectrogram(spectrogram(num_frames)[rows], mask, keys)[:, :30]
        clips = waveform(num_samples)[rows]
        if what == "gain":
            return augment.random_gain(clips, keys)[:, :1500]
        if what == "noise":
            return augment.add_noise(clips, lengths, keys)[:, :1500]
        return augment.change_speed(clips, lengths, keys)[0][:, :1300]

    alone = change(slice(1, 2), 1500, 60)[0]
    together = change(slice(0, 3), 4321, 77)[1]
    np.testing.assert_allclose(together, alone, atol=1e-5)
