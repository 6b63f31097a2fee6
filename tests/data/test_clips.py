"""Recordings of single utterances: which are read, and what batches hold of them."""

import io

import av
import numpy as np
import pytest
from absl import logging

from mister_jax.data.audio import SAMPLE_RATE, decode
from mister_jax.data.batching import BatchPlan
from mister_jax.data.clips import (
    SHORTEST,
    UNIT,
    beginning,
    clip_batches,
    is_heard,
    load_clips,
    pad_clips,
    units,
)
from mister_jax.data.utterances import Utterances
from mister_jax.errors import InputError

LENGTHS = (500, 4000, 16_000, 900, 7000, 3200, 12_345)
MOST = 6400


@pytest.fixture(scope="module")
def clips():
    """Clips that count up, so that a stretch tells its place; one has no label."""
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
    return BatchPlan(units(clips.sizes, MOST), batch_size=4, num_buckets=2, multiple_of=2)


def epoch(clips, plan, number=0, **options):
    options = {"seed": 0, "epoch": number, "most": MOST, **options}
    return list(clip_batches(clips, plan, **options))


def by_row(batches):
    return {
        int(row): waveform[:length]
        for batch in batches
        for row, waveform, length in zip(
            batch["row"], batch["waveform"], batch["lengths"], strict=True
        )
        if row >= 0
    }


@pytest.mark.parametrize(
    ("clip", "heard"),
    [
        (np.zeros(0), False),
        (np.ones(1), False),
        (np.arange(SHORTEST - 1), False),
        (np.arange(SHORTEST), True),
        (np.zeros(9000), False),
        (np.full(9000, 77), False),
        (np.eye(1, 9000)[0], False),
        (np.random.default_rng(0).integers(-2, 3, 9000), False),  # dither
        (77 + np.random.default_rng(0).normal(0, 5, 9000), True),
        (np.append(np.zeros(9000), np.arange(SHORTEST - 1)), True),
        (np.append(np.zeros(10**6), 30 * np.sin(np.arange(800))), True),
    ],
)
def test_silence_and_what_is_shorter_than_a_frame_are_not_heard(clip, heard):
    clip = clip.astype(np.int16)
    assert is_heard(clip) is heard
    np.testing.assert_array_equal(beginning(clip), clip if heard else [])


def test_a_clip_is_heard_by_what_is_kept_of_it():
    late = np.append(np.zeros(9000), np.arange(1000)).astype(np.int16)
    assert is_heard(late) and not len(beginning(late, 9000))
    np.testing.assert_array_equal(beginning(late, 9500), late[:9500])


@pytest.mark.parametrize("rate", [8000, 16_000, 48_000])
def test_samples_that_are_no_numbers_are_silent_and_too_loud_ones_scaled(rate):
    wave = 0.5 * np.sin(np.arange(rate) * 2 * np.pi * 200 / rate)
    no_numbers = slice(rate // 4, rate // 2)
    wave[no_numbers] = np.nan
    wave[no_numbers.start] = np.inf
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


def test_a_split_is_read_in_its_order_without_what_is_not_heard(heard_dir, monkeypatch):
    told = []
    monkeypatch.setattr(logging, "warning", lambda line, *values: told.append(line % values))
    found = load_clips("manifest/heard", "test", heard_dir)
    # Of six dialogues of three turns two lose two.
    assert len(found.items) == len(found.utterance_ids) == len(found.label) == 6 * 3 - 4
    assert told == [
        "dataset manifest/heard, split test: of 18 utterances 2 are silent and 2 have no usable "
        "recording"
    ]
    assert found.dialogue_ids[:4] == ("test0", "test1", "test1", "test1")
    assert all(clip.dtype == np.int16 and is_heard(clip) for clip in found.items)
    np.testing.assert_array_equal(found.offsets, np.arange(15))
    with pytest.raises(InputError, match="no split 'dev'"):
        load_clips("manifest/heard", "dev", heard_dir)


def test_lengths_are_rounded_up_and_cut(clips):
    np.testing.assert_array_equal(units(clips.sizes, MOST), [1, 3, 4, 1, 4, 2, 4])
    assert UNIT == SAMPLE_RATE // 10


def test_padding_is_zero():
    waveform, lengths = pad_clips([np.ones(3, np.int16), np.ones(9, np.int16)], 5)
    np.testing.assert_array_equal(waveform, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(lengths, [3, 5])


def test_evaluation_reads_the_beginning_in_every_epoch(clips, plan):
    for number in range(2):
        for row, samples in by_row(epoch(clips, plan, number, shuffle=False)).items():
            np.testing.assert_array_equal(samples, clips.items[row][:MOST])


def test_training_reads_another_stretch_in_every_epoch_and_short_clips_whole(clips, plan):
    first, second, again = (by_row(epoch(clips, plan, number)) for number in (0, 1, 0))
    assert sorted(first) == list(range(len(LENGTHS)))
    starts = []
    for row, samples in first.items():
        assert len(samples) == min(MOST, LENGTHS[row])
        start = samples[0] if len(samples) else 0
        np.testing.assert_array_equal(samples, clips.items[row][start : start + MOST])
        np.testing.assert_array_equal(samples, again[row])
        starts.append((int(start), int(second[row][0])))
        assert LENGTHS[row] > MOST or start == 0
    assert any(one != other for one, other in starts)


def test_weights_of_a_batch_add_up_to_one_and_the_unlabeled_weigh_nothing(clips, plan):
    batches = epoch(clips, plan)
    shapes = {(len(batch["row"]), batch["waveform"].shape[1] // UNIT) for batch in batches}
    assert shapes == set(plan.shapes)
    for batch in batches:
        counted = batch["label"] >= 0
        np.testing.assert_allclose(batch["weight"].sum(), 1, atol=1e-6)
        np.testing.assert_allclose(batch["weight"][counted], 1 / counted.sum(), rtol=1e-6)
        assert not batch["weight"][~counted].any()
        assert not batch["lengths"][batch["row"] < 0].any()


def test_an_epoch_goes_on_from_any_step_and_is_shared_by_processes(clips, plan):
    whole = epoch(clips, plan, 3)
    later = epoch(clips, plan, 3, start_step=1)
    parts = [epoch(clips, plan, 3, process_index=i, process_count=2) for i in range(2)]
    assert len(later) == len(whole) - 1
    for index, batch in enumerate(whole):
        for name, value in batch.items():
            halves = [part[index][name] for part in parts]
            np.testing.assert_array_equal(np.concatenate(halves), value)
            if index:
                np.testing.assert_array_equal(later[index - 1][name], value)


def test_the_unlabeled_can_be_left_out(clips):
    labeled = clips.labeled()
    assert list(labeled.utterance_ids) == list("abdefg")
    assert len(labeled.items[2]) == 900
