"""Padding masks and token positions."""

import numpy as np
import pytest

from mister_jax.nn import length_mask, positions_and_segment_mask


def test_length_mask_is_true_before_each_length():
    mask = length_mask(np.array([0, 2, 5]), 3)
    np.testing.assert_array_equal(mask, [[0, 0, 0], [1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], ids=["right", "left"])
def test_positions_do_not_count_padding(mask):
    mask = np.array([mask], bool)
    positions, same_sequence = positions_and_segment_mask(mask)
    np.testing.assert_array_equal(positions[mask], [0, 1, 2])
    np.testing.assert_array_equal(same_sequence[0, 0], mask[0, :, None] == mask[0])


def test_packed_sequences_have_their_own_positions_and_do_not_see_each_other():
    mask = np.array([[1, 1, 1, 1, 1, 0]], bool)
    positions, same_sequence = positions_and_segment_mask(mask, np.array([[4, 4, 7, 7, 7, 7]]))
    np.testing.assert_array_equal(positions[mask], [0, 1, 0, 1, 2])
    sequence = np.array([1, 1, 2, 2, 2, 0])  # Padding is a separate sequence.
    np.testing.assert_array_equal(same_sequence[0, 0], sequence[:, None] == sequence)
