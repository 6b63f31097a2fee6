"""Pooling over valid positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.nn import AttentiveStatisticsPooling, masked_mean

MASK = np.arange(6) < np.array([[6], [2], [1], [0]])
FLOOR = np.sqrt(1e-5)


def sequences(seed=0):
    return np.random.default_rng(seed).normal(size=(*MASK.shape, 3)).astype(np.float32)


@nnx.jit
def pooling():
    return AttentiveStatisticsPooling(3, 4, rngs=nnx.Rngs(0))


def test_mean_is_over_valid_positions():
    x = sequences()
    means = jax.jit(masked_mean)(x, MASK)
    for row in range(3):
        np.testing.assert_allclose(means[row], x[row, MASK[row]].mean(0), atol=1e-6)
    assert not means[3].any()


def test_mean_of_bfloat16_is_computed_in_float32():
    x = jnp.ones((1, 4096, 1), jnp.bfloat16)
    assert masked_mean(x, jnp.ones((1, 4096), bool)) == 1


def test_attentive_statistics_equal_their_formula():
    module, x = pooling(), sequences()
    pooled = jax.jit(module)(x, MASK)
    kernel, bias, score = (
        np.asarray(value[...], np.float64)
        for value in (module.hidden.kernel, module.hidden.bias, module.score.kernel)
    )
    for row in range(3):
        valid = x[row, MASK[row]].astype(np.float64)
        weights = np.exp(np.tanh(valid @ kernel + bias) @ score)
        weights /= weights.sum()
        mean = (weights * valid).sum(0)
        variance = (weights * valid**2).sum(0) - mean**2
        expected = np.concatenate([mean, np.sqrt(np.maximum(variance, 1e-5))])
        np.testing.assert_allclose(pooled[row], expected, atol=1e-5)


def test_deviation_has_a_lower_bound():
    pooled = jax.jit(pooling())(sequences(), MASK)
    np.testing.assert_allclose(pooled[2:, 3:], FLOOR, rtol=1e-6)
    np.testing.assert_array_equal(pooled[3, :3], 0)


def test_deviation_of_large_values_does_not_cancel():
    x = sequences() + 1000
    pool = jax.jit(pooling())
    deviation = pool(x, MASK)[:2, 3:]
    near = pool(x - 1000, MASK)[:2, 3:]
    assert np.isfinite(deviation).all()
    assert (deviation > 10 * FLOOR).all() == (near > 10 * FLOOR).all()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("pool", [masked_mean, pooling()], ids=["mean", "attentive"])
def test_padding_does_not_change_pooled_values_or_gradients(pool, garbage):
    x = np.where(MASK[..., None], sequences(), 0)
    dirty = np.full((4, 24, 3), garbage, np.float32)
    dirty[:, :6] = np.where(MASK[..., None], x, garbage)
    longer = np.pad(MASK, ((0, 0), (0, 18)))

    @jax.jit
    def values_and_gradient(x, mask):
        def total(x):
            pooled = pool(x, mask)
            return jnp.sin(pooled).sum(), pooled

        gradient, values = jax.grad(total, has_aux=True)(x)
        return values, gradient

    padded_values, padded = values_and_gradient(dirty, longer)
    values, gradient = values_and_gradient(x, MASK)
    np.testing.assert_allclose(padded_values, values, atol=1e-6)
    np.testing.assert_allclose(padded[:, :6], gradient, atol=1e-6)
    assert not padded[:, 6:].any()
