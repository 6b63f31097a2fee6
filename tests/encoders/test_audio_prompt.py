"""Audio replaces the placeholder in a prompt."""

import jax
import numpy as np
import pytest

from mister_jax.encoders.audio_prompt import splice_audio

PLACEHOLDER = -1
AUDIO = 100 + np.arange(15).reshape(3, 5)  # three clips with five audio vectors of size 1
AUDIO_LENGTHS = np.array([4, 1, 5])


def splice(prompt, mask):
    """Returns the sequences as numbers, their mask and the mask of the audio."""
    sequence, *masks = jax.jit(splice_audio)(
        np.asarray(prompt, np.float32)[..., None],
        mask,
        prompt == PLACEHOLDER,
        np.asarray(AUDIO, np.float32)[..., None],
        AUDIO_LENGTHS,
    )
    return (np.asarray(sequence)[..., 0], *map(np.asarray, masks))


def joined(prompt, mask, audio):
    numbers = []
    for token in np.array(prompt)[np.array(mask)]:
        numbers.extend(audio if token == PLACEHOLDER else [token])
    return numbers


@pytest.mark.parametrize("side", ["right", "left"])
def test_audio_replaces_the_placeholder(side):
    prompt = np.array([[7, -1, 8, 9, 0, 0], [-1, 5, 0, 0, 0, 0], [1, 2, 3, 4, 6, -1]])
    mask = np.arange(6) < np.array([[4], [2], [6]])
    if side == "left":
        for row, count in enumerate(mask.sum(1)):
            prompt[row], mask[row] = np.roll(prompt[row], -count), np.roll(mask[row], -count)
    sequence, valid, is_audio = splice(prompt, mask)
    assert sequence.shape == (3, 10)
    for row, audio in enumerate(AUDIO):
        audio = audio[: AUDIO_LENGTHS[row]]
        expected = joined(prompt[row], mask[row], audio)
        np.testing.assert_array_equal(sequence[row, : len(expected)], expected)
        np.testing.assert_array_equal(sequence[row, len(expected) :], 0)
        np.testing.assert_array_equal(valid[row], np.arange(10) < len(expected))
        np.testing.assert_array_equal(is_audio[row], np.isin(sequence[row], audio))


def test_padding_is_not_read():
    prompt = np.array([[7, -1, 0], [-1, 0, 0], [0, 0, 0]])
    mask = np.array([[True, True, False], [True, False, False], [False] * 3])
    # Every position in the padding has a placeholder.
    sequence, valid, is_audio = splice(np.where(mask, prompt, PLACEHOLDER), mask)
    np.testing.assert_array_equal(valid.sum(1), [5, 1, 0])
    np.testing.assert_array_equal(is_audio.sum(1), [4, 1, 0])
    np.testing.assert_array_equal(sequence[~valid], 0)


def test_a_prompt_without_a_placeholder_gets_no_audio():
    prompt = np.array([[7, 8, 9]] * 3)
    sequence, valid, is_audio = splice(prompt, np.ones_like(prompt, bool))
    np.testing.assert_array_equal(sequence[:, :3], prompt)
    np.testing.assert_array_equal(valid.sum(1), 3)
    assert not is_audio.any()
