"""Batches of dialogue features."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mister_jax.data import BatchPlan, DialogueFeatures, batches, prefetch_to_device

LENGTHS = np.array([1, 9, 3, 3, 4, 12, 2, 5, 5, 1, 7, 6, 12, 11, 2, 2, 8])


def dialogues() -> DialogueFeatures:
    generator = np.random.default_rng(0)
    total = int(LENGTHS.sum())
    present = generator.uniform(size=(2, total)) > 0.2
    return DialogueFeatures(
        name="example",
        split="train",
        class_names=("a", "b"),
        dialogue_ids=tuple(f"d{index}" for index in range(len(LENGTHS))),
        lengths=LENGTHS,
        utterance_ids=np.array([f"u{index}" for index in range(total)]),
        speech=(generator.normal(size=(total, 3)) * present[0][:, None]).astype(np.float16),
        text=(generator.normal(size=(total, 2)) * present[1][:, None]).astype(np.float32),
        speech_present=present[0],
        text_present=present[1],
        label=generator.integers(-1, 2, size=total).astype(np.int32),
    )


def assert_batches_equal(actual: list[dict], expected: list[dict]) -> None:
    assert len(actual) == len(expected)
    for actual_batch, expected_batch in zip(actual, expected, strict=True):
        assert actual_batch.keys() == expected_batch.keys()
        for field in actual_batch:
            np.testing.assert_array_equal(actual_batch[field], expected_batch[field], err_msg=field)


def test_padding_is_masked_and_empty():
    features = dialogues()
    plan = BatchPlan(features.lengths, 4, num_buckets=3, multiple_of=4)
    dtypes = {"speech": np.float32, "text": np.float32, "label": np.int32, "row": np.int32}
    for batch in batches(features, plan, seed=0, epoch=0):
        assert batch["mask"].shape in plan.shapes
        for field, array in batch.items():
            assert array.dtype == dtypes.get(field, bool), field
        for index, row in enumerate(batch["row"]):
            length = features.lengths[row] if row >= 0 else 0
            assert batch["mask"][index].tolist() == [
                position < length for position in range(batch["mask"].shape[1])
            ]
            flat = slice(features.offsets[row], features.offsets[row] + length)
            for field in ("speech", "text", "speech_present", "text_present", "label"):
                values = batch[field][index]
                np.testing.assert_array_equal(values[:length], getattr(features, field)[flat])
                assert (values[length:] == (-1 if field == "label" else 0)).all()


def test_batches_depend_on_seed_and_epoch_only():
    features = dialogues()
    plan = BatchPlan(features.lengths, 4)
    assert_batches_equal(
        list(batches(features, plan, seed=3, epoch=2)),
        list(batches(features, plan, seed=3, epoch=2, prefetch=5)),
    )


def test_a_resumed_epoch_continues_with_the_same_batches():
    features = dialogues()
    plan = BatchPlan(features.lengths, 4, num_buckets=3)
    full = list(batches(features, plan, seed=0, epoch=1))
    for start in (0, 2, plan.steps_per_epoch):
        rest = list(batches(features, plan, seed=0, epoch=1, start_step=start))
        assert_batches_equal(rest, full[start:])


def test_a_pipeline_of_several_epochs_equals_one_pipeline_per_epoch():
    features = dialogues()
    plan = BatchPlan(features.lengths, 4, num_buckets=3)
    separate = [
        batch for epoch in (1, 2, 3) for batch in batches(features, plan, seed=0, epoch=epoch)
    ]
    together = list(batches(features, plan, seed=0, epoch=1, start_step=2, num_epochs=3))
    assert_batches_equal(together, separate[2:])


def test_unshuffled_batches_have_the_types_of_shuffled_batches():
    features = dialogues()
    plan = BatchPlan(features.lengths, len(LENGTHS), num_buckets=1)
    (shuffled,) = batches(features, plan, seed=0, epoch=0)
    (unshuffled,) = batches(features, plan, seed=0, epoch=0, shuffle=False)
    assert unshuffled.keys() == shuffled.keys()
    order = np.argsort(shuffled["row"])[np.argsort(np.argsort(unshuffled["row"]))]
    for field, values in unshuffled.items():
        assert values.dtype == shuffled[field].dtype, field
        np.testing.assert_array_equal(values, shuffled[field][order], err_msg=field)


def test_the_rows_of_all_processes_form_the_global_batch():
    features = dialogues()
    plan = BatchPlan(features.lengths, 8, num_buckets=3, multiple_of=4)
    full = list(batches(features, plan, seed=0, epoch=0))
    per_process = [
        list(batches(features, plan, seed=0, epoch=0, process_index=index, process_count=2))
        for index in range(2)
    ]
    joined = [
        {field: np.concatenate([first[field], second[field]]) for field in first}
        for first, second in zip(*per_process, strict=True)
    ]
    assert_batches_equal(joined, full)


def test_a_plan_for_other_dialogues_or_processes_is_rejected():
    features = dialogues()
    plan = BatchPlan(features.lengths, 4, multiple_of=2)
    with pytest.raises(ValueError, match="different dialogue lengths"):
        batches(features, BatchPlan(LENGTHS[::-1].copy(), 4), seed=0, epoch=0)
    with pytest.raises(ValueError, match="a multiple of 2 rows"):
        batches(features, plan, seed=0, epoch=0, process_count=3)
    with pytest.raises(ValueError, match="start_step 99"):
        batches(features, plan, seed=0, epoch=0, start_step=99)
    with pytest.raises(ValueError, match="multiple_of 0"):
        BatchPlan(LENGTHS, 4, multiple_of=0)


# This script ends while threads of the pipeline prepare the next batches. There are so many batches
# that preparing all of them takes several seconds, even with many threads.
END_DURING_BATCHES = """
import time

from mister_jax import data
from mister_jax.data import pipeline

pad_dialogues = pipeline.pad_dialogues

def slow_batch(*args):
    time.sleep(0.2)
    return pad_dialogues(*args)

pipeline.pad_dialogues = slow_batch
sizes = {"train": 400, "validation": 1, "test": 1}
features = data.generate_features(num_dialogues=sizes, speech_dim=2, text_dim=2)["train"]
batches = data.batches(features, data.BatchPlan(features.lengths, 2, 1), seed=0, epoch=0)
next(batches)
"""
INTERRUPT = """
import os, signal, threading

# Shells start background jobs with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
for _ in batches:
    pass
"""


@pytest.mark.parametrize("interrupt", ["", INTERRUPT], ids=["end", "interrupt"])
def test_a_process_can_end_before_the_last_batch(interrupt):
    process = subprocess.run(
        [sys.executable, "-c", END_DURING_BATCHES + interrupt],
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert process.returncode == (-signal.SIGINT if interrupt else 0), process.stderr
    assert ("KeyboardInterrupt" in process.stderr) == bool(interrupt)


def test_a_pipeline_is_deleted_without_delay():
    features = dialogues()
    plan = BatchPlan(features.lengths, batch_size=4)
    delays = []
    for _ in range(10):
        # With autotuning of tf.data, a third of these deletions would take over 0.1 s.
        pipeline = batches(features, plan, seed=0, epoch=0, num_epochs=60 // plan.steps_per_epoch)
        for _ in pipeline:
            time.sleep(0.002)
        start = time.monotonic()
        del pipeline
        delays.append(time.monotonic() - start)
    # A busy machine may delay one of the ten deletions.
    assert sorted(delays)[-2] < 0.1, delays


def test_prefetch_keeps_the_order_and_a_fixed_distance():
    put_items = []
    progress = []
    for item in prefetch_to_device(range(6), lambda item: put_items.append(item) or item, size=2):
        progress.append((item, len(put_items)))
    assert progress == [(0, 3), (1, 4), (2, 5), (3, 6), (4, 6), (5, 6)]
