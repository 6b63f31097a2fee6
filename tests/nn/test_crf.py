"""The linear-chain conditional random field, against all courses of emotions written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.nn import ConditionalRandomField

CLASSES = 3


def crf(seed=0):
    module = ConditionalRandomField(CLASSES)
    transition = np.random.default_rng([seed, 1]).normal(size=(CLASSES, CLASSES)) * 2
    module.transition[...] = jnp.asarray(transition, jnp.float32)
    return module


def dialogues(lengths, seed=0):
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    logits = np.random.default_rng(seed).normal(size=(*mask.shape, CLASSES)) * 3
    return logits.astype(np.float32), mask


def enumerated(logits, transition):
    """Marginals [T, C] of a dialogue, in float64, from the scores of all C^T courses."""
    rows = transition - np.logaddexp.reduce(transition, axis=1, keepdims=True)
    total = np.zeros(logits.shape)
    for course in itertools.product(range(CLASSES), repeat=len(logits)):
        steps = sum(rows[pair] for pair in itertools.pairwise(course))
        weight = np.exp(steps + sum(logits[place, label] for place, label in enumerate(course)))
        for place, label in enumerate(course):
            total[place, label] += weight
    return total / total.sum(-1, keepdims=True)


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_marginals_are_those_of_all_courses(length):
    module, (logits, mask) = crf(), dialogues([length])
    transition = np.asarray(module.transition[...], np.float64)
    expected = enumerated(logits[0].astype(np.float64), transition)
    found = module(logits, mask)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(found[0]), expected, atol=1e-6)


def test_it_begins_as_the_softmax_of_the_logits():
    logits, mask = dialogues([5, 3])
    found = ConditionalRandomField(CLASSES)(logits, mask)
    expected = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30])
def test_padding_and_batch_change_neither_marginals_nor_gradients(garbage):
    module, (logits, mask) = crf(), dialogues([5, 2, 1])
    dirty = np.full((3, 20, CLASSES), garbage, np.float32)
    dirty[:, :5] = np.where(mask[..., None], logits, garbage)
    longer = np.pad(mask, ((0, 0), (0, 15)))

    @nnx.jit
    def read(module, logits, mask):
        def value(module, logits):
            found = module(logits, mask)
            return jnp.where(mask[..., None], jnp.sin(found), 0).sum(), found

        return nnx.grad(value, argnums=(0, 1), has_aux=True)(module, logits)

    alone = [logits[row : row + 1, : mask[row].sum()] for row in range(3)]
    (of_all, of_logits), found = read(module, jnp.asarray(dirty), longer)
    summed = 0
    for row, own in enumerate(alone):
        valid = np.ones(own.shape[:2], bool)
        (of_one, gradient), expected = read(module, jnp.asarray(own), valid)
        np.testing.assert_allclose(found[row, : own.shape[1]], expected[0], atol=1e-5)
        np.testing.assert_allclose(of_logits[row, : own.shape[1]], gradient[0], atol=1e-5)
        assert not of_logits[row, own.shape[1] :].any()
        summed = summed + of_one["transition"][...]
    np.testing.assert_allclose(of_all["transition"][...], summed, atol=1e-5)


def test_an_utterance_that_tells_nothing_takes_its_step():
    module, (logits, mask) = crf(), dialogues([4])
    mask[0, 1] = False
    transition = np.asarray(module.transition[...], np.float64)
    silent = np.where(mask[..., None], logits, 0)[0].astype(np.float64)
    np.testing.assert_allclose(
        np.exp(module(logits, mask)[0]), enumerated(silent, transition), atol=1e-6
    )


def test_long_dialogues_and_huge_logits_stay_finite():
    module, (logits, mask) = crf(), dialogues([500, 1])
    logits = jnp.asarray(np.sign(logits) * 1e4, jnp.bfloat16)

    def value(module, logits):
        return jnp.where(mask[..., None], module(logits, mask), 0).sum()

    total, gradients = nnx.jit(nnx.value_and_grad(value, argnums=(0, 1)))(module, logits)
    assert np.isfinite(total)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
