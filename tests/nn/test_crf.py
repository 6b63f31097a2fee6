"""Linear-chain conditional random field, compared with enumeration of all label sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

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


def enumerate_marginals(logits, transition):
    """Computes the marginals [T, C] of a dialogue from all C^T label sequences, in float64."""
    rows = transition - np.logaddexp.reduce(transition, axis=1, keepdims=True)
    total = np.zeros(logits.shape)
    for labels in itertools.product(range(CLASSES), repeat=len(logits)):
        steps = sum(rows[pair] for pair in itertools.pairwise(labels))
        weight = np.exp(steps + sum(logits[t, label] for t, label in enumerate(labels)))
        for t, label in enumerate(labels):
            total[t, label] += weight
    return total / total.sum(-1, keepdims=True)


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_marginals_equal_enumeration_of_all_label_sequences(length):
    module, (logits, mask) = crf(), dialogues([length])
    transition = np.asarray(module.transition[...], np.float64)
    expected = enumerate_marginals(logits[0].astype(np.float64), transition)
    marginals = jax.jit(module)(logits, mask)
    assert marginals.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(marginals[0]), expected, atol=1e-6)


def test_initial_marginals_are_the_softmax_of_the_logits():
    logits, mask = dialogues([5, 3])
    marginals = jax.jit(ConditionalRandomField(CLASSES))(logits, mask)
    expected = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(marginals[mask], expected[mask], atol=1e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30])
def test_padding_and_batch_do_not_change_marginals_or_gradients(garbage):
    module, (logits, mask) = crf(), dialogues([5, 2, 1])
    dirty = np.full((3, 20, CLASSES), garbage, np.float32)
    dirty[:, :5] = np.where(mask[..., None], logits, garbage)
    longer = np.pad(mask, ((0, 0), (0, 15)))

    @nnx.jit
    def run(module, logits, mask):
        def value(module, logits):
            marginals = module(logits, mask)
            return jnp.where(mask[..., None], jnp.sin(marginals), 0).sum(), marginals

        return nnx.grad(value, argnums=(0, 1), has_aux=True)(module, logits)

    dialogues_alone = [logits[row : row + 1, : mask[row].sum()] for row in range(3)]
    (batch_params, batch_logits), marginals = run(module, jnp.asarray(dirty), longer)
    summed = 0
    for row, dialogue in enumerate(dialogues_alone):
        valid = np.ones(dialogue.shape[:2], bool)
        (params, gradient), expected = run(module, jnp.asarray(dialogue), valid)
        np.testing.assert_allclose(marginals[row, : dialogue.shape[1]], expected[0], atol=1e-5)
        np.testing.assert_allclose(batch_logits[row, : dialogue.shape[1]], gradient[0], atol=1e-5)
        assert not batch_logits[row, dialogue.shape[1] :].any()
        summed = summed + params["transition"][...]
    np.testing.assert_allclose(batch_params["transition"][...], summed, atol=1e-5)


def test_a_masked_utterance_still_takes_a_transition_step():
    module, (logits, mask) = crf(), dialogues([4])
    mask[0, 1] = False
    transition = np.asarray(module.transition[...], np.float64)
    masked = np.where(mask[..., None], logits, 0)[0].astype(np.float64)
    np.testing.assert_allclose(
        np.exp(jax.jit(module)(logits, mask)[0]), enumerate_marginals(masked, transition), atol=1e-6
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


def test_marginals_of_a_causal_crf_depend_on_the_utterances_so_far():
    module, (logits, mask) = crf(), dialogues([6])
    causal = ConditionalRandomField(CLASSES, causal=True)
    causal.transition[...] = module.transition[...]
    transition = np.asarray(module.transition[...], np.float64)
    expected = [
        enumerate_marginals(logits[0, :stop].astype(np.float64), transition)[-1]
        for stop in range(1, 7)
    ]
    np.testing.assert_allclose(np.exp(jax.jit(causal)(logits, mask)[0]), expected, atol=1e-6)
    with pytest.raises(ValueError, match="steps need a causal CRF"):
        module.initial_state(1)


def test_a_causal_crf_runs_on_several_devices():
    module, (logits, mask) = ConditionalRandomField(CLASSES, causal=True), dialogues([4, 2])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(module, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    expected = jax.jit(module)(logits, mask)
    np.testing.assert_allclose(jax.jit(sharded)(logits, mask), expected, atol=1e-6)


@pytest.mark.parametrize("length", [100, 2000])
def test_marginals_of_long_dialogues_are_precise(length):
    module = crf()
    logits = np.random.default_rng(0).normal(size=(1, length, CLASSES)).astype(np.float32) * 5
    transition = np.asarray(module.transition[...], np.float64)
    rows = transition - np.logaddexp.reduce(transition, axis=1, keepdims=True)
    unary = logits[0].astype(np.float64)
    forward, backward = unary.copy(), np.zeros_like(unary)
    for t in range(1, length):
        forward[t] += np.logaddexp.reduce(forward[t - 1][:, None] + rows, axis=0)
    for t in reversed(range(length - 1)):
        backward[t] = np.logaddexp.reduce(rows + unary[t + 1] + backward[t + 1], axis=1)
    expected = forward + backward
    expected -= np.logaddexp.reduce(expected, axis=1, keepdims=True)
    marginals = jax.jit(module)(logits, np.ones((1, length), bool))
    np.testing.assert_allclose(np.exp(marginals[0]), np.exp(expected), atol=5e-6)
