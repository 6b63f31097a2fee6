"""Prosodic features of synthetic sounds, degenerate clips and padded clips."""

import numpy as np
import pytest

from mister_jax.encoders.prosody import FEATURE_NAMES, compute_prosody

SECOND = 16_000
TIME = np.arange(SECOND) / SECOND
LEVELS = {"energy_mean", "energy_p10", "energy_p50", "energy_p90", "energy_maximum"}


def tone(pitch, rolloff=1.0, harmonics=range(1, 100), seed=0):
    """Returns a second of a harmonic sound whose harmonic n has the amplitude n^-rolloff."""
    random = np.random.default_rng(seed)
    sound = sum(
        number**-rolloff * np.sin(2 * np.pi * pitch * number * TIME + random.uniform(0, 6))
        for number in harmonics
        if pitch * number < 7900
    )
    return 0.5 * sound / np.abs(sound).max()


def noise(length=SECOND, seed=0):
    return 0.1 * np.random.default_rng(seed).normal(size=length)


def syllables(rate=4):
    """Returns a second of a tone with `rate` peaks of loudness."""
    return tone(130) * (0.5 - 0.5 * np.cos(2 * np.pi * rate * TIME)) ** 2


def measure(*clips, num_samples=24_000, num_clips=10):
    """Pads the clips with NaN to one batch; returns the values [B] of each feature by name."""
    waveform = np.full((num_clips, num_samples), np.nan, np.float32)
    lengths = np.zeros(num_clips, int)
    for index, samples in enumerate(clips):
        waveform[index, : len(samples)] = samples
        lengths[index] = len(samples)
    features, present = compute_prosody(waveform, lengths)
    assert features.shape == (num_clips, len(FEATURE_NAMES))
    np.testing.assert_array_equal(present, lengths > 0)
    values = np.asarray(features)[: len(clips)].T
    return dict(zip(FEATURE_NAMES, values, strict=True))


def test_about_a_hundred_features_have_distinct_names():
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES)
    assert 80 < len(FEATURE_NAMES) < 120


@pytest.mark.parametrize("rolloff", [0.0, 1.0, 2.0])
def test_pitch_of_tones_is_estimated(rolloff):
    pitches = np.array([80, 93.7, 147.3, 233.1, 333.3, 400])
    features = measure(*(tone(pitch, rolloff) for pitch in pitches))
    for name in ("mean", "p10", "p50", "p90"):
        np.testing.assert_allclose(55 * 2 ** features[f"pitch_{name}"], pitches, rtol=0.02)
    assert (features["pitch_deviation"] < 0.02).all() and (features["voiced"] > 0.9).all()


def test_pitch_is_estimated_in_noise_and_without_the_fundamental():
    pitches = np.array([95, 210])
    clips = (tone(pitch, 0, range(3, 9)) + 0.5 * noise() for pitch in pitches)
    np.testing.assert_allclose(55 * 2 ** measure(*clips)["pitch_p50"], pitches, rtol=0.02)


def test_slope_and_rise_of_the_pitch_have_its_sign():
    octaves_per_second = np.array([0.8, -0.8, 0])[:, None]
    phase = np.cumsum(150 * 2.0 ** (octaves_per_second * (TIME - 0.5)), axis=1) / SECOND
    features = measure(*np.sin(2 * np.pi * phase))
    np.testing.assert_allclose(features["pitch_slope"], octaves_per_second[:, 0], atol=0.05)
    np.testing.assert_array_equal(np.sign(features["pitch_rise"].round(1)), [1, -1, 0])
    assert (features["pitch_range"][:2] > 0.4).all() and features["pitch_range"][2] < 0.05


def test_tones_are_voiced_and_noise_is_not():
    features = measure(noise(), tone(150))
    assert features["voiced"][0] < 0.05 and features["voiced"][1] > 0.9
    assert features["periodicity_mean"][0] < 0.5 < 0.9 < features["periodicity_mean"][1]
    assert features["flatness_mean"][0] > features["flatness_mean"][1]
    assert features["zero_crossings_mean"][0] > features["zero_crossings_mean"][1]
    assert features["flux_mean"][0] > features["flux_mean"][1]


def test_gain_changes_only_the_level_features():
    gains = np.array([1, 0.1, 1e-3, 3e-5])
    features = measure(*(gain * syllables() for gain in gains))
    for name, values in features.items():
        if name in LEVELS:
            np.testing.assert_allclose(values[0] - values, -2 * np.log10(gains), atol=1e-4)
        else:
            np.testing.assert_allclose(values, values[0], atol=1e-3, err_msg=name)


def test_tilt_follows_the_spectrum():
    spectrum = np.fft.rfft(noise())
    frequency = np.maximum(np.arange(spectrum.size), 50)
    features = measure(*(0.5 * np.fft.irfft(spectrum / frequency**power) for power in (0, 0.5, 1)))
    # A factor f^-0.5 on the amplitude lowers the log10 of the power by log10(2) per octave.
    np.testing.assert_allclose(features["tilt_mean"], [0, -0.301, -0.602], atol=0.05)
    for name in ("centroid_mean", "rolloff_mean"):
        assert (np.diff(features[name]) < 0).all()
    for name in ("alpha_mean", "hammarberg_mean", "mfcc_1_mean"):
        assert (np.diff(features[name]) > 0).all()


def test_rhythm_features_count_peaks_pauses_and_voiced_segments():
    gap = np.zeros(4000)
    paused = np.concatenate([gap, tone(130)[:4000], gap, tone(130)[:8000], gap])
    features = measure(syllables(4), syllables(7), paused)
    np.testing.assert_allclose(features["peak_rate"][:2], [4, 7], atol=0.5)
    assert features["pause_rate"][2] == pytest.approx(1 / 1.5)
    assert features["pause_length"][2] == pytest.approx(0.25, abs=0.04)
    assert features["voiced_rate"][2] == pytest.approx(2 / 1.5)
    assert features["voiced_length"][2] == pytest.approx(0.375, abs=0.04)
    assert features["sounding"][2] == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(features["duration"], np.log10([1, 1, 1.5]), atol=1e-6)


DEGENERATE_CLIPS = {
    "empty": np.zeros(0),
    "one sample": np.ones(1),
    "two samples": np.array([1.0, -1.0]),
    "silence": np.zeros(3000),
    "constant": np.full(3000, 0.7),
    "clipped": np.clip(30 * tone(200)[:3000], -1, 1),
    "short": noise(300),
    "faint": 1e-30 * noise(3000),
    "huge": 1e37 * noise(3000),
    "click": np.eye(1, 3000, 1500)[0],
}


def test_degenerate_clips_have_finite_features():
    for name, values in measure(*DEGENERATE_CLIPS.values()).items():
        assert np.isfinite(values).all(), name
    assert not np.any(
        [
            values[0]
            for values in measure(DEGENERATE_CLIPS["empty"], num_samples=0, num_clips=1).values()
        ]
    )


def test_silence_has_no_loudness_pitch_or_spectrum():
    features = measure(DEGENERATE_CLIPS["silence"], DEGENERATE_CLIPS["constant"])
    for name, values in features.items():
        np.testing.assert_array_equal(values, 0 if name != "duration" else values[0])


@pytest.mark.parametrize(
    "clip", [syllables()[:9000], noise(777), tone(99)[:8999], DEGENERATE_CLIPS["click"]]
)
def test_batch_and_padding_do_not_change_a_clip(clip):
    batched = measure(noise(seed=1), clip, DEGENERATE_CLIPS["empty"])
    single = measure(clip, num_samples=9000, num_clips=1)
    for name, values in batched.items():
        np.testing.assert_allclose(values[1], single[name][0], atol=1e-5, err_msg=name)
