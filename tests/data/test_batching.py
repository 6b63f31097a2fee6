"""Length buckets and batch plans."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mister_jax.data.batching import (
    DEFAULT_NUM_BUCKETS,
    BatchPlan,
    bucket_cost,
    is_short_training,
    length_buckets,
    plan_budgeted_batches,
    plan_inference_batches,
)

LENGTHS = np.array([1, 9, 3, 3, 4, 12, 2, 5, 5, 1, 7, 6, 12, 11, 2, 2, 8])


def padded_positions(
    lengths: np.ndarray, boundaries: tuple[int, ...], batch_size: int, multiple_of: int
) -> int:
    """Counts positions in a loop; all batches of a bucket have as many rows as the largest one."""
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
def test_buckets_have_the_least_padding(lengths, num_buckets, batch_size, multiple_of):
    boundaries = length_buckets(
        lengths, num_buckets, batch_size=batch_size, multiple_of=multiple_of
    )
    values = sorted(set(lengths.tolist()))
    least = min(
        padded_positions(lengths, (*chosen, values[-1]), batch_size, multiple_of)
        for count in range(min(num_buckets, len(values)))
        for chosen in itertools.combinations(values[:-1], count)
    )
    assert list(boundaries) == sorted(set(boundaries))
    assert boundaries[-1] == values[-1]
    assert len(boundaries) <= num_buckets
    assert padded_positions(lengths, boundaries, batch_size, multiple_of) == least


def test_a_bucket_must_save_its_cost():
    lengths = np.array([10] * 8 + [40] * 8)
    # Two buckets save 8 * 30 positions.
    assert length_buckets(lengths, 7, batch_size=8, bucket_cost=239) == (10, 40)
    assert length_buckets(lengths, 7, batch_size=8, bucket_cost=241) == (40,)


def test_long_trainings_of_large_models_have_little_padding_and_short_ones_few_programs():
    lengths = np.random.default_rng(0).integers(10, 100, 120)
    short = BatchPlan(lengths, 8, bucket_cost=bucket_cost(5 * 10**5, epochs=5))
    long = BatchPlan(lengths, 8, bucket_cost=bucket_cost(9 * 10**7, epochs=100))
    assert len(short.shapes) == 1
    assert len(long.shapes) <= DEFAULT_NUM_BUCKETS
    assert long.padding_fraction < 0.1


def test_batches_take_a_compiled_shape_if_that_adds_few_positions():
    lengths = np.array([10] * 7)

    def plan(compiled, bucket_cost):
        return BatchPlan(lengths, 4, bucket_cost=bucket_cost, compiled=compiled)

    assert plan([], 40).shapes == ((4, 10),)
    assert plan([(6, 12), (4, 15), (5, 20)], 40).shapes == ((4, 15),)  # Adds 2 * 4 * 5 positions.
    assert plan([(4, 15)], 39).shapes == ((4, 10),)
    assert plan([(3, 15), (4, 9)], 1000).shapes == ((4, 10),)
    planned = plan([(6, 12)], 100).epoch(0, 0)
    assert [(len(batch.rows), batch.padded_length) for batch in planned] == [(6, 12)] * 2
    rows = np.concatenate([batch.rows for batch in planned])
    assert sorted(rows) == [-1] * 5 + list(range(7))


def test_a_training_is_short_if_parameters_times_positions_are_few():
    assert is_short_training(num_params=500_000, num_positions=270 * 8 * 23)
    assert not is_short_training(num_params=500_000, num_positions=420 * 8 * 110)
    assert not is_short_training(num_params=8 * 10**9, num_positions=100)


def test_a_bucket_per_length_leaves_no_padding():
    assert length_buckets(np.array([3, 1, 3, 7]), 9) == (1, 3, 7)
    assert BatchPlan(LENGTHS, 1, num_buckets=20).padding_fraction == 0


@pytest.mark.parametrize("arguments", [([], 1), ([0, 2], 1), ([2], 0)])
def test_impossible_buckets_are_rejected(arguments):
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
            members = batch.rows[batch.rows >= 0]
            assert 1 <= len(members) <= batch_size
            assert len(batch.rows) % multiple_of == 0
            assert LENGTHS[members].max() <= batch.padded_length


def test_shapes_are_the_same_in_every_epoch():
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
def test_more_devices_only_add_empty_rows(multiple_of):
    one_device = BatchPlan(LENGTHS, 4, num_buckets=3)
    many_devices = BatchPlan(LENGTHS, 4, num_buckets=3, multiple_of=multiple_of)
    for batch, expected in zip(many_devices.epoch(5, 2), one_device.epoch(5, 2), strict=True):
        assert batch.padded_length == expected.padded_length
        np.testing.assert_array_equal(
            batch.rows[batch.rows >= 0], expected.rows[expected.rows >= 0]
        )
        assert (batch.rows[len(expected.rows) :] == -1).all()


def test_buckets_fitted_to_the_devices_have_less_padding():
    plans = [BatchPlan(LENGTHS, 4, multiple_of=4, fitted_to=fitted_to) for fitted_to in (1, 4)]
    assert plans[1].padding_fraction < plans[0].padding_fraction
    assert plans[1].boundaries == length_buckets(LENGTHS, 7, batch_size=4, multiple_of=4)


def test_the_order_depends_on_seed_and_epoch_only_if_shuffled():
    plan = BatchPlan(LENGTHS, 4)

    def rows(*arguments, **keywords):
        return [batch.rows.tolist() for batch in plan.epoch(*arguments, **keywords)]

    assert rows(0, 1) == rows(0, 1)
    assert rows(0, 1) != rows(0, 2)
    assert rows(0, 1) != rows(1, 1)
    assert rows(0, 1, shuffle=False) == rows(5, 2, shuffle=False)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_inference_batches_hold_all_items_padded_to_powers_of_2(num_shards):
    planned = list(plan_inference_batches(LENGTHS, num_shards=num_shards))
    rows = np.concatenate([rows[rows >= 0] for rows, _ in planned])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(LENGTHS)))
    assert {length for _, length in planned} == {8, 16}
    for rows, length in planned:
        assert len(rows) <= 8 and len(rows) % num_shards == 0
        assert LENGTHS[rows[rows >= 0]].max() <= length


def test_budgeted_batches_hold_all_items_within_the_budget():
    lengths = np.sort(np.random.default_rng(0).integers(1, 100, 200))[::-1]
    planned = list(
        plan_budgeted_batches(
            lengths,
            300,
            length_steps=(10, 20, 50),
            max_length=100,
            num_shards=2,
            program_cost=75,
        )
    )
    rows = np.concatenate([rows[rows >= 0] for rows, _ in planned])
    np.testing.assert_array_equal(rows, np.arange(200))
    for rows, padded in planned:
        assert padded in (10, 20, 50, 100) and len(rows) % 2 == 0
        assert len(rows) * padded <= 2 * 300 and lengths[rows[rows >= 0]].max() <= padded
    # Shorter items fill up the rows, except in the last batches.
    full = [(rows, padded) for rows, padded in planned if (rows >= 0).all()]
    assert len(full) >= len(planned) - 2
    assert {len(rows) for rows, padded in full if padded == 100} == {2 * 3}


@pytest.mark.parametrize(
    ("program_cost", "expected"),
    [
        (200, [([0], 1, 100), ([1, 2, 3], 4, 10)]),
        (300, [([0, 1, 2, 3], 4, 100)]),  # Padding three items costs less than a program.
    ],
)
def test_few_items_are_padded_more_if_that_saves_a_program(program_cost, expected):
    planned = plan_budgeted_batches(
        np.array([100, 9, 8, 7]),
        900,
        length_steps=(10, 50),
        max_length=100,
        num_shards=1,
        program_cost=program_cost,
    )
    assert [(rows[rows >= 0].tolist(), len(rows), length) for rows, length in planned] == expected


@pytest.mark.parametrize("program_cost", [1, 100])
def test_the_last_batch_has_empty_rows_if_that_saves_a_program(program_cost):
    planned = plan_budgeted_batches(
        np.array([10] * 9),
        80,
        length_steps=(10,),
        max_length=100,
        num_shards=1,
        program_cost=program_cost,
    )
    last_rows = 1 if program_cost == 1 else 8
    assert [len(rows) for rows, _ in planned] == [8, last_rows]


def plan_shapes(lengths, program_cost, compiled=()):
    planned = plan_budgeted_batches(
        np.sort(lengths)[::-1],
        1000,
        length_steps=(10, 20, 30, 40, 50, 60, 70, 80, 90),
        max_length=100,
        num_shards=1,
        program_cost=program_cost,
        compiled=compiled,
    )
    return [(len(rows), length) for rows, length in planned]


def test_more_items_are_padded_to_more_lengths():
    lengths = np.random.default_rng(0).integers(1, 101, 10_000)
    num_shapes = [len(set(plan_shapes(lengths[:n], 20_000))) for n in (100, 1000, 10_000)]
    assert num_shapes[0] == 1 < num_shapes[1] < num_shapes[2] <= 10


def test_chosen_lengths_have_the_lowest_cost_of_all_subsets():
    lengths = np.random.default_rng(0).integers(1, 101, 2000)
    steps = np.arange(10, 101, 10)

    def cost(padded_lengths):
        padded = np.array(padded_lengths)[np.searchsorted(padded_lengths, lengths)]
        return padded.sum() + 5000 * len(padded_lengths)

    subsets = [
        (*subset, 100)
        for count in range(len(steps))
        for subset in itertools.combinations(steps[:-1].tolist(), count)
    ]
    best = min(subsets, key=cost)
    assert {length for _, length in plan_shapes(lengths, 5000)} == {*best}
    assert 1 < len(best) < 10


def test_compiled_shapes_are_used_again():
    shapes = plan_shapes([40] * 30, 20_000)
    assert shapes == [(25, 40)] * 2
    # Without compiled shapes, the plan has fewer rows.
    assert plan_shapes([40, 33], 20_000) == [(2, 40)]
    assert plan_shapes([40, 33], 20_000, shapes) == [(25, 40)]
    smaller_split = plan_shapes([33] * 5, 20_000, [(8, 40)])
    assert smaller_split == [(8, 40)]
    assert plan_shapes([33] * 5, 10, [(8, 80)]) == [(8, 40)]
    # Another program costs less than the padding that it saves.
    assert plan_shapes([12] * 3000, 20_000, shapes)[0] == (50, 20)
