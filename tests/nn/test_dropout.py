"""Dropout and its per-example keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.nn import Dropout, PerExampleRngs
from mister_jax.nn.dropout import fold_in, random_bits

KEY = jax.random.key(0)
ONES = jnp.ones((6, 50, 8))


def drop(x, rngs, rate=0.25):
    return Dropout(rate)(x, deterministic=False, rngs=rngs)


@functools.partial(jax.jit, static_argnums=0)
def compiled_bits(shape, key):
    return random_bits(key, shape)


@pytest.mark.parametrize("rngs", [PerExampleRngs.from_batch_key(KEY, 6), nnx.Rngs(dropout=0)])
def test_units_are_dropped_at_the_rate_and_the_mean_stays(rngs):
    dropped = np.asarray(drop(ONES, rngs))
    assert set(np.unique(dropped).round(6)) == {0, np.float32(4 / 3).round(6)}
    assert abs((dropped == 0).mean() - 0.25) < 0.03
    assert abs(dropped.mean() - 1) < 0.04


def test_an_example_drops_the_same_units_in_any_batch():
    full = drop(ONES, PerExampleRngs.from_batch_key(KEY, 6))
    np.testing.assert_array_equal(drop(ONES[:2], PerExampleRngs.from_batch_key(KEY, 2)), full[:2])
    np.testing.assert_array_equal(
        drop(ONES[:3], PerExampleRngs.from_batch_key(KEY, 3, 3)), full[3:]
    )
    single = PerExampleRngs(fold_in(KEY, jnp.array([4])))
    np.testing.assert_array_equal(drop(ONES[:1], single), full[4:5])


def test_examples_drop_different_units():
    dropped = np.asarray(drop(ONES, PerExampleRngs.from_batch_key(KEY, 6)))
    assert len(np.unique(dropped, axis=0)) == 6


@pytest.mark.parametrize("rngs", [PerExampleRngs.from_batch_key(KEY, 6), nnx.Rngs(dropout=0)])
def test_each_call_drops_different_units(rngs):
    assert (drop(ONES, rngs) != drop(ONES, rngs)).any()


def test_per_example_keys_work_under_jit():
    @jax.jit
    def run(key, offset):
        return drop(ONES[:2], PerExampleRngs.from_batch_key(key, 2, offset))

    expected = drop(ONES, PerExampleRngs.from_batch_key(KEY, 6))[4:]
    np.testing.assert_array_equal(run(KEY, 4), expected)


@pytest.mark.parametrize(("rate", "deterministic"), [(0.0, False), (0.5, True)])
def test_nothing_is_dropped_at_rate_zero_or_in_inference(rate, deterministic):
    assert Dropout(rate)(ONES, deterministic=deterministic) is ONES


def test_training_without_rngs_raises():
    with pytest.raises(ValueError, match="needs rngs"):
        drop(ONES, None)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_out_of_range_raise(rate):
    with pytest.raises(ValueError, match="0 <= rate < 1"):
        Dropout(rate)


def test_bits_are_balanced_and_uncorrelated_with_their_neighbors():
    keys = jax.random.split(KEY, 64)
    bits = np.asarray(compiled_bits((64, 64, 32), keys))
    ones = np.unpackbits(bits.view(np.uint8).reshape(64, 64, 32, 4), axis=-1)  # 32 bits per number
    deviation = 0.5 / np.sqrt(bits.size)
    assert abs(ones.mean((0, 1, 2)) - 0.5).max() < 5 * deviation
    signs = 2.0 * ones - 1
    for axis in range(4):
        for distance in (1, 2, 5):
            neighbors = np.roll(signs, distance, axis)
            assert abs((signs * neighbors).mean((0, 1, 2))).max() < 10 * deviation, (axis, distance)
    # The hash is a bijection of the position, so the bits of one key are all different.
    assert len(np.unique(bits[0])) == bits[0].size


def test_masks_of_different_draws_examples_and_layers_are_uncorrelated():
    rngs = PerExampleRngs.from_batch_key(KEY, 4)
    keys = [rngs.dropout() for _ in range(4)]
    keys += [PerExampleRngs(fold_in(keys[0], layer)).dropout() for layer in range(4)]
    bits = np.stack([compiled_bits((4, 64, 64), key) for key in keys]).reshape(32, -1)
    for threshold in (0.1, 0.5):
        dropped = bits < threshold * 2**32
        correlation = np.corrcoef(dropped) - np.eye(32)
        assert abs(correlation).max() < 5 / np.sqrt(dropped.shape[1])


def test_padding_does_not_change_the_bits_of_a_sequence():
    keys = jax.random.split(KEY, 2)
    longer, shorter = (np.asarray(compiled_bits((2, time, 4), keys)) for time in (9, 5))
    np.testing.assert_array_equal(longer[:, :5], shorter)


def test_a_single_key_gives_different_bits_to_each_row():
    bits = np.asarray(compiled_bits((3, 5, 4), KEY))
    assert len(np.unique(bits)) == bits.size
    np.testing.assert_array_equal(bits.reshape(-1), compiled_bits((60,), KEY))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_the_dropped_fraction_is_close_to_the_rate(rate):
    ones = jnp.ones((4, 500, 500))
    keep = jax.jit(lambda x: drop(x, PerExampleRngs.from_batch_key(KEY, 4), rate))
    dropped = np.asarray(keep(ones)) == 0
    assert abs(dropped.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / dropped.size)


@pytest.mark.parametrize("num_keys", [1, 5])
def test_another_number_of_keys_than_rows_raises(num_keys):
    with pytest.raises(
        ValueError, match=rf"shape \({num_keys},\) for an array of shape \(6, 50, 8"
    ):
        drop(ONES, PerExampleRngs.from_batch_key(KEY, num_keys))
