"""Clips of single utterances: which are audible, and how they are batched."""

import io

import av
import numpy as np
import pytest
from absl import logging

from mister_jax.data.audio import SAMPLE_RATE, decode
from mister_jax.data.batching import BatchPlan
from mister_jax.data.clips import (
    LENGTH_STEP,
    MIN_AUDIBLE_SAMPLES,
    clip_batches,
    is_audible,
    lengths_in_steps,
    load_clips,
    truncate,
)
from mister_jax.data.padding import pad_clips
from mister_jax.data.utterances import Utterances
from mister_jax.errors import InputError

LENGTHS = (500, 4000, 16_000, 900, 7000, 3200, 12_345)
MAX_SAMPLES = 6400


@pytest.fixture(scope="module")
def clips():
    """Returns clips whose samples are 0, 1, 2, ..., so that a crop shows its position in the clip.

    One clip has no label.
    """
    label = np.array([0, 1, -1, 1, 0, 1, 0], np.int32)
    return Utterances(
        name="counted",
        split="train",
        class_names=("a", "b"),
        dialogue_ids=tuple("xxyyyzz"),
        utterance_ids=np.array(list("abcdefg")),
        items=tuple(np.arange(length, dtype=np.int16) for length in LENGTHS),
        label=label,
    )


@pytest.fixture(scope="module")
def plan(clips):
    return BatchPlan(
        lengths_in_steps(clips.sizes, MAX_SAMPLES), batch_size=4, num_buckets=2, multiple_of=2
    )


def read_epoch(clips, plan, number=0, **options):
    options = {"seed": 0, "epoch": number, "max_samples": MAX_SAMPLES, **options}
    return list(clip_batches(clips, plan, **options))


def by_row(batches):
    """Returns the unpadded samples of each row."""
    return {
        int(row): waveform[:length]
        for batch in batches
        for row, waveform, length in zip(
            batch["row"], batch["waveform"], batch["lengths"], strict=True
        )
        if row >= 0
    }


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (np.zeros(0), False),
        (np.ones(1), False),
        (np.arange(MIN_AUDIBLE_SAMPLES - 1), False),
        (np.arange(MIN_AUDIBLE_SAMPLES), True),
        (np.zeros(9000), False),
        (np.full(9000, 77), False),
        (np.eye(1, 9000)[0], False),
        (np.random.default_rng(0).integers(-2, 3, 9000), False),  # dither
        (77 + np.random.default_rng(0).normal(0, 5, 9000), True),
        (np.append(np.zeros(9000), np.arange(MIN_AUDIBLE_SAMPLES - 1)), True),
        (np.append(np.zeros(10**6), 30 * np.sin(np.arange(800))), True),
    ],
)
def test_silence_and_clips_shorter_than_a_frame_are_inaudible(clip, expected):
    clip = clip.astype(np.int16)
    assert is_audible(clip) is expected
    np.testing.assert_array_equal(truncate(clip), clip if expected else [])


def test_truncation_leaves_no_silent_clip():
    late = np.append(np.zeros(9000), np.arange(1000)).astype(np.int16)
    assert is_audible(late) and not len(truncate(late, 9000))
    np.testing.assert_array_equal(truncate(late, 9500), late[:9500])


@pytest.mark.parametrize("rate", [8000, 16_000, 48_000])
def test_nan_samples_become_silence_and_loud_samples_are_scaled(rate):
    wave = 0.5 * np.sin(np.arange(rate) * 2 * np.pi * 200 / rate)
    not_finite = slice(rate // 4, rate // 2)
    wave[not_finite] = np.nan
    wave[not_finite.start] = np.inf
    wave[rate // 2 :] *= 10
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_f32le", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "flt", "mono")
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    clip = decode(file.getvalue())
    samples = clip.samples.astype(int)
    assert len(clip.notes) == 1 and clip.notes[0].startswith("scaled by 0.2")
    assert len(samples) == pytest.approx(SAMPLE_RATE, abs=2)
    assert np.abs(samples[4100:7900]).max() < 500
    assert np.abs(samples[:3900]).max() == pytest.approx(2**15 / 10, rel=0.06)
    assert np.abs(samples[8100:]).max() >= 2**15 - 1


def test_audible_clips_of_a_split_are_read_in_order(heard_dir, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda line, *values: warnings.append(line % values))
    clips = load_clips("manifest/heard", "test", heard_dir)
    # There are six dialogues of three turns. Two of the dialogues lose two turns each.
    assert len(clips.items) == len(clips.utterance_ids) == len(clips.label) == 6 * 3 - 4
    assert warnings == [
        "dataset manifest/heard, split test: 18 utterances, of which 2 are silent and 2 have no "
        "usable recording"
    ]
    assert clips.dialogue_ids[:4] == ("test0", "test1", "test1", "test1")
    assert all(clip.dtype == np.int16 and is_audible(clip) for clip in clips.items)
    np.testing.assert_array_equal(clips.offsets, np.arange(15))
    with pytest.raises(InputError, match="no split 'dev'"):
        load_clips("manifest/heard", "dev", heard_dir)


def test_lengths_are_rounded_up_and_truncated(clips):
    np.testing.assert_array_equal(lengths_in_steps(clips.sizes, MAX_SAMPLES), [1, 3, 4, 1, 4, 2, 4])
    assert LENGTH_STEP == SAMPLE_RATE // 10


def test_padding_is_zero():
    waveform, lengths = pad_clips([np.ones(3, np.int16), np.ones(9, np.int16)], 5)
    np.testing.assert_array_equal(waveform, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(lengths, [3, 5])


def test_evaluation_truncates_clips_in_every_epoch(clips, plan):
    for number in range(2):
        for row, samples in by_row(read_epoch(clips, plan, number, shuffle=False)).items():
            np.testing.assert_array_equal(samples, clips.items[row][:MAX_SAMPLES])


def test_training_crops_long_clips_differently_in_every_epoch(clips, plan):
    first, second, repeated = (by_row(read_epoch(clips, plan, number)) for number in (0, 1, 0))
    assert sorted(first) == list(range(len(LENGTHS)))
    starts = []
    for row, samples in first.items():
        assert len(samples) == min(MAX_SAMPLES, LENGTHS[row])
        start = samples[0] if len(samples) else 0
        np.testing.assert_array_equal(samples, clips.items[row][start : start + MAX_SAMPLES])
        np.testing.assert_array_equal(samples, repeated[row])
        starts.append((int(start), int(second[row][0])))
        assert LENGTHS[row] > MAX_SAMPLES or start == 0
    assert any(start != second_start for start, second_start in starts)


def test_weights_of_a_batch_add_up_to_one_and_unlabeled_rows_have_none(clips, plan):
    batches = read_epoch(clips, plan)
    shapes = {(len(batch["row"]), batch["waveform"].shape[1] // LENGTH_STEP) for batch in batches}
    assert shapes == set(plan.shapes)
    for batch in batches:
        is_labeled = batch["label"] >= 0
        np.testing.assert_allclose(batch["weight"].sum(), 1, atol=1e-6)
        np.testing.assert_allclose(batch["weight"][is_labeled], 1 / is_labeled.sum(), rtol=1e-6)
        assert not batch["weight"][~is_labeled].any()
        assert not batch["lengths"][batch["row"] < 0].any()


def test_epoch_resumes_at_any_step_and_is_split_between_processes(clips, plan):
    batches = read_epoch(clips, plan, 3)
    resumed = read_epoch(clips, plan, 3, start_step=1)
    parts = [read_epoch(clips, plan, 3, process_index=i, process_count=2) for i in range(2)]
    assert len(resumed) == len(batches) - 1
    for index, batch in enumerate(batches):
        for name, value in batch.items():
            halves = [part[index][name] for part in parts]
            np.testing.assert_array_equal(np.concatenate(halves), value)
            if index:
                np.testing.assert_array_equal(resumed[index - 1][name], value)


def test_labeled_drops_unlabeled_clips(clips):
    labeled = clips.labeled()
    assert list(labeled.utterance_ids) == list("abdefg")
    assert len(labeled.items[2]) == 900
