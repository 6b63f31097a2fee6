"""Buckets, plans and batches."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mister_jax.data import (
    BatchPlan,
    DialogueFeatures,
    batches,
    length_buckets,
    prefetch_to_device,
)

LENGTHS = np.array([1, 9, 3, 3, 4, 12, 2, 5, 5, 1, 7, 6, 12, 11, 2, 2, 8])


def dialogues(lengths: np.ndarray = LENGTHS) -> DialogueFeatures:
    generator = np.random.default_rng(0)
    total = int(lengths.sum())
    present = generator.uniform(size=(2, total)) > 0.2
    return DialogueFeatures(
        name="made_up",
        split="train",
        class_names=("a", "b"),
        dialogue_ids=tuple(f"d{index}" for index in range(len(lengths))),
        lengths=lengths,
        utterance_ids=np.array([f"u{index}" for index in range(total)]),
        speech=(generator.normal(size=(total, 3)) * present[0][:, None]).astype(np.float16),
        text=(generator.normal(size=(total, 2)) * present[1][:, None]).astype(np.float32),
        speech_present=present[0],
        text_present=present[1],
        label=generator.integers(-1, 2, size=total).astype(np.int32),
    )


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for field in one:
            np.testing.assert_array_equal(one[field], other[field], err_msg=field)


def padded_positions(
    lengths: np.ndarray, boundaries: tuple[int, ...], batch_size: int, multiple_of: int
) -> int:
    """Counts the slow way; all batches of a bucket have the rows of its largest."""
    total, below = 0, 0
    for boundary in boundaries:
        count = sum(below < length <= boundary for length in lengths)
        if count:
            chunks = np.array_split(np.arange(count), -(-count // batch_size))
            rows = max(len(chunk) for chunk in chunks)
            while rows % multiple_of:
                rows += 1
            total += len(chunks) * rows * boundary
        below = boundary
    return total


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=14).map(np.array),
    num_buckets=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    multiple_of=st.integers(1, 4),
)
def test_buckets_are_the_best_there_are(lengths, num_buckets, batch_size, multiple_of):
    found = length_buckets(lengths, num_buckets, batch_size=batch_size, multiple_of=multiple_of)
    values = sorted(set(lengths.tolist()))
    least = min(
        padded_positions(lengths, (*chosen, values[-1]), batch_size, multiple_of)
        for count in range(min(num_buckets, len(values)))
        for chosen in itertools.combinations(values[:-1], count)
    )
    assert list(found) == sorted(set(found))
    assert found[-1] == values[-1]
    assert len(found) <= num_buckets
    assert padded_positions(lengths, found, batch_size, multiple_of) == least


def test_as_many_buckets_as_lengths_leave_no_padding():
    assert length_buckets(np.array([3, 1, 3, 7]), 9) == (1, 3, 7)
    assert BatchPlan(LENGTHS, 1, num_buckets=20).padding_share == 0


@pytest.mark.parametrize("arguments", [([], 1), ([0, 2], 1), ([2], 0)])
def test_impossible_buckets_are_refused(arguments):
    with pytest.raises(ValueError):
        length_buckets(np.array(arguments[0], int), arguments[1])


@pytest.mark.parametrize(("batch_size", "multiple_of"), [(4, 1), (4, 2), (3, 8), (100, 1), (1, 1)])
def test_every_dialogue_is_in_exactly_one_batch_of_an_epoch(batch_size, multiple_of):
    plan = BatchPlan(LENGTHS, batch_size, num_buckets=3, multiple_of=multiple_of)
    for epoch in range(3):
        planned = plan.epoch(7, epoch)
        rows = np.concatenate([batch.rows for batch in planned])
        assert sorted(rows[rows >= 0]) == list(range(len(LENGTHS)))
        assert len(planned) == plan.steps_per_epoch
        for batch in planned:
            real = batch.rows[batch.rows >= 0]
            assert 1 <= len(real) <= batch_size
            assert len(batch.rows) % multiple_of == 0
            assert LENGTHS[real].max() <= batch.num_utterances


def test_shapes_are_the_same_in_every_epoch_and_at_most_two_a_bucket():
    plan = BatchPlan(LENGTHS, 4, num_buckets=3)
    for epoch in range(5):
        planned = plan.epoch(0, epoch)
        assert {(len(rows), length) for rows, length in planned} == set(plan.shapes)
    assert len(plan.shapes) <= 2 * len(plan.boundaries)
    sizes = {
        length: [rows for rows, other in plan.shapes if other == length]
        for length in plan.boundaries
    }
    assert all(max(size) - min(size) <= 1 for size in sizes.values())


@pytest.mark.parametrize("multiple_of", [2, 8])
def test_more_devices_add_empty_rows_and_move_no_dialogue(multiple_of):
    alone = BatchPlan(LENGTHS, 4, num_buckets=3)
    spread = BatchPlan(LENGTHS, 4, num_buckets=3, multiple_of=multiple_of)
    for ours, theirs in zip(spread.epoch(5, 2), alone.epoch(5, 2), strict=True):
        assert ours.num_utterances == theirs.num_utterances
        np.testing.assert_array_equal(ours.rows[ours.rows >= 0], theirs.rows[theirs.rows >= 0])
        assert (ours.rows[len(theirs.rows) :] == -1).all()


def test_buckets_fitted_to_the_devices_pad_less_there():
    plans = [BatchPlan(LENGTHS, 4, multiple_of=4, fitted_to=fitted_to) for fitted_to in (1, 4)]
    assert plans[1].padding_share < plans[0].padding_share
    assert plans[1].boundaries == length_buckets(LENGTHS, 7, batch_size=4, multiple_of=4)


def test_epochs_and_seeds_shuffle_and_without_shuffle_nothing_moves():
    plan = BatchPlan(LENGTHS, 4)

    def rows(*arguments, **keywords):
        return [batch.rows.tolist() for batch in plan.epoch(*arguments, **keywords)]

    assert rows(0, 1) == rows(0, 1)
    assert rows(0, 1) != rows(0, 2)
    assert rows(0, 1) != rows(1, 1)
    assert rows(0, 1, shuffle=False) == rows(5, 2, shuffle=False)


def test_batches_hold_the_dialogues_and_padding_is_masked_and_empty():
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
                place < length for place in range(batch["mask"].shape[1])
            ]
            flat = slice(features.offsets[row], features.offsets[row] + length)
            for field in ("speech", "text", "speech_present", "text_present", "label"):
                values = batch[field][index]
                np.testing.assert_array_equal(values[:length], getattr(features, field)[flat])
                assert (values[length:] == (-1 if field == "label" else 0)).all()


def test_batches_are_a_function_of_seed_and_epoch():
    features = dialogues()
    plan = BatchPlan(features.lengths, 4)
    assert_same(
        list(batches(features, plan, seed=3, epoch=2)),
        list(batches(features, plan, seed=3, epoch=2, prefetch=5)),
    )


def test_a_resumed_epoch_is_the_rest_of_it():
    features = dialogues()
    plan = BatchPlan(features.lengths, 4, num_buckets=3)
    whole = list(batches(features, plan, seed=0, epoch=1))
    for start in (0, 2, plan.steps_per_epoch):
        rest = list(batches(features, plan, seed=0, epoch=1, start_step=start))
        assert_same(rest, whole[start:])


def test_the_shares_of_the_processes_make_up_the_batch():
    features = dialogues()
    plan = BatchPlan(features.lengths, 8, num_buckets=3, multiple_of=4)
    whole = list(batches(features, plan, seed=0, epoch=0))
    shares = [
        list(batches(features, plan, seed=0, epoch=0, process_index=index, process_count=2))
        for index in range(2)
    ]
    joined = [
        {field: np.concatenate([one[field], other[field]]) for field in one}
        for one, other in zip(*shares, strict=True)
    ]
    assert_same(joined, whole)


def test_a_plan_that_does_not_fit_is_refused():
    features = dialogues()
    plan = BatchPlan(features.lengths, 4, multiple_of=2)
    with pytest.raises(ValueError, match="other dialogue lengths"):
        batches(features, BatchPlan(LENGTHS[::-1].copy(), 4), seed=0, epoch=0)
    with pytest.raises(ValueError, match="multiples of 2"):
        batches(features, plan, seed=0, epoch=0, process_count=3)
    with pytest.raises(ValueError, match="start_step 99"):
        batches(features, plan, seed=0, epoch=0, start_step=99)
    with pytest.raises(ValueError, match="multiple_of 0"):
        BatchPlan(LENGTHS, 4, multiple_of=0)


def test_prefetch_keeps_order_and_stays_a_fixed_number_ahead():
    put = []
    ahead = []
    for item in prefetch_to_device(range(6), lambda item: put.append(item) or item, size=2):
        ahead.append((item, len(put)))
    assert ahead == [(0, 3), (1, 4), (2, 5), (3, 6), (4, 6), (5, 6)]
