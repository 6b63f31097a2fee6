"""Front ends compared with transformers and Kaldi, and their treatment of padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from mister_jax.encoders import frontends
from tests.helpers.clips import pad_clips
from tests.helpers.golden import read_golden

SECOND = frontends.SAMPLE_RATE


def clip(length, seed=0):
    """Returns a tone in noise, with an offset."""
    random = np.random.default_rng(seed)
    tone = 0.3 * np.sin(np.arange(length) * 0.12)
    return (tone + 0.05 * random.normal(size=length) + 0.02).astype(np.float32)


DEGENERATE_CLIPS = {
    "empty": np.zeros(0),
    "one sample": np.ones(1),
    "silence": np.zeros(3000),
    "clipped": np.clip(20 * clip(3000), -1, 1),
    "constant": np.ones(3000),
}


def whisper_features(clips, num_mel_bins, seconds):
    extractor = transformers.WhisperFeatureExtractor(num_mel_bins, chunk_length=seconds)
    features = extractor(clips, sampling_rate=SECOND, return_tensors="np")
    return features["input_features"].swapaxes(1, 2)  # B F M


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_log_mel_equals_transformers(num_mel_bins):
    clips = [clip(length) for length in (SECOND, 7001, 1, SECOND - 50, 2 * SECOND)]
    clips.append(np.zeros(4000, np.float32))
    waveform, lengths = pad_clips(clips, 2 * SECOND)
    features = frontends.log_mel(waveform, lengths, num_mel_bins=num_mel_bins, window_frames=100)
    expected = whisper_features(clips, num_mel_bins, seconds=1)
    assert features.shape == expected.shape == (6, 100, num_mel_bins)
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_log_mel_of_thirty_seconds_equals_transformers():
    clips = [clip(20_000)]
    features = frontends.log_mel(*pad_clips(clips, 20_000))
    np.testing.assert_allclose(features, whisper_features(clips, 80, seconds=30), atol=1e-4)


def test_mel_filters_equal_transformers():
    for num_mel_bins in (80, 128):
        extractor = transformers.WhisperFeatureExtractor(num_mel_bins)
        filters = frontends.slaney_filters(num_mel_bins)
        np.testing.assert_allclose(filters, extractor.mel_filters, atol=1e-8)


@pytest.mark.parametrize("num_frames", [44, 46, 99])
def test_num_frames_does_not_change_the_first_frames_of_log_mel(num_frames):
    waveform, lengths = pad_clips([clip(6600), clip(10)], 6600)
    full = np.asarray(frontends.log_mel(waveform, lengths, window_frames=100))
    first_frames = frontends.log_mel(waveform, lengths, window_frames=100, num_frames=num_frames)
    np.testing.assert_allclose(first_frames, full[:, :num_frames], atol=1e-6)


def test_padding_of_log_mel_holds_silence():
    waveform, lengths = pad_clips([clip(1600), DEGENERATE_CLIPS["empty"]], 3200)
    mel = np.asarray(frontends.log_mel(waveform, lengths, window_frames=100))
    np.testing.assert_array_equal(frontends.log_mel_lengths(lengths), [10, 0])
    np.testing.assert_allclose(mel[0, 12:], mel[0].min(), atol=1e-6)
    np.testing.assert_allclose(mel[1], -1.5)


@pytest.mark.parametrize(("kind", "samples"), DEGENERATE_CLIPS.items())
def test_degenerate_clips_have_finite_outputs(kind, samples):
    waveform, lengths = pad_clips([samples], max(len(samples), 1))
    for values in (
        frontends.log_mel(waveform, lengths, window_frames=100),
        frontends.normalize(waveform, lengths),
        frontends.kaldi_fbank(np.nan_to_num(waveform)),
    ):
        assert np.isfinite(values).all()


def test_fbank_equals_kaldi():
    golden = read_golden("salmonn_beats")
    waveform, expected = golden["in/wav"][:1], golden["mid/fbank"][:1]
    np.testing.assert_allclose(
        frontends.kaldi_filters(128)[:-1].T, golden["mid/mel_banks"], atol=5e-5
    )
    features = frontends.kaldi_fbank(waveform * 2.0**15)
    assert features.shape == expected.shape
    # BEATs standardizes features in this way.
    np.testing.assert_allclose((features - 15.41663) / (2 * 6.55582), expected, atol=3e-4)


def test_fbank_frames_depend_only_on_their_own_samples():
    samples = clip(3000)
    waveform, lengths = pad_clips([samples], 5000)
    count = int(frontends.kaldi_fbank_lengths(lengths)[0])
    assert count == (3000 - 400) // 160 + 1
    full = np.asarray(frontends.kaldi_fbank(waveform))
    np.testing.assert_allclose(full[:, :count], frontends.kaldi_fbank(samples[None]), atol=1e-5)
    assert not np.isfinite(full[:, count]).all()


def test_fbank_has_at_least_one_frame():
    lengths = jnp.array([0, 1, 399, 400, 559, 560])
    np.testing.assert_array_equal(frontends.kaldi_fbank_lengths(lengths), [0, 0, 0, 1, 1, 2])
    assert frontends.kaldi_fbank(np.zeros((1, 5), np.float32)).shape == (1, 1, 128)


def test_normalized_clips_have_zero_mean_and_unit_variance():
    clips = [
        clip(5000),
        0.001 * clip(700),
        DEGENERATE_CLIPS["one sample"],
        DEGENERATE_CLIPS["silence"],
        DEGENERATE_CLIPS["empty"],
    ]
    waveform, lengths = pad_clips(clips, 5000)
    normalized = np.asarray(frontends.normalize(waveform, lengths))
    for row, samples in zip(normalized[:3], clips, strict=False):
        expected = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        np.testing.assert_allclose(row[: len(samples)], expected, atol=1e-4)
        np.testing.assert_array_equal(row[len(samples) :], 0)
    np.testing.assert_array_equal(normalized[3:], 0)


@pytest.mark.parametrize("frontend", [frontends.log_mel, frontends.normalize])
def test_batch_and_padding_do_not_change_a_clip(frontend):
    samples = clip(2777)
    single = np.asarray(frontend(*pad_clips([samples], 2777)))[0]
    waveform, lengths = pad_clips([clip(4000, seed=1), samples, DEGENERATE_CLIPS["empty"]], 4321)
    batched = np.asarray(frontend(waveform, lengths))[1]
    size = min(len(single), len(batched))
    np.testing.assert_allclose(batched[:size], single[:size], atol=1e-5)


@pytest.mark.parametrize(("size", "step"), [(400, 160), (320, 160), (7, 3), (2, 5)])
def test_split_frames_equals_slicing(size, step):
    samples = np.arange(1000.0)
    split = jax.jit(lambda samples: frontends.split_frames(samples, size, step, 9))
    frames = np.asarray(split(samples[None]))
    assert frames.shape == (1, 9, size)
    long = np.pad(samples, (0, 2000))
    for index in range(9):
        np.testing.assert_array_equal(frames[0, index], long[index * step : index * step + size])
