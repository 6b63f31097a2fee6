"""Attention for CPUs and TPUs, compared with `jax.nn.dot_product_attention`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mister_jax import nn
from mister_jax.encoders import attention

BATCH, QUERIES, KEYS, HEADS, HEAD_DIM = 3, 5, 7, 4, 8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(dtype=jnp.float32):
    query = normal(BATCH, QUERIES, HEADS, HEAD_DIM)
    key, value = normal(2, BATCH, KEYS, HEADS, HEAD_DIM, seed=1)
    return [jnp.asarray(x, dtype) for x in (query, key, value)]


def mask(*shape):
    """Returns a random mask that always allows the first key."""
    return (normal(*shape, KEYS, seed=2) > 0) | (np.arange(KEYS) == 0)


@pytest.fixture(
    scope="module",
    params=[attention.MAX_CPU_SCORES, 0],
    ids=["all_heads", "one_head_at_a_time"],
)
def max_scores(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MAX_CPU_SCORES", request.param)
        jax.clear_caches()  # JAX would reuse traces with the previous value.
        yield request.param
    jax.clear_caches()


def test_long_inputs_are_attended_head_by_head(max_scores):
    attend = jax.jit(attention.dot_product_attention)
    program = attend.lower(*inputs(), mask=mask(BATCH, 1, 1)).as_text()
    assert ("stablehlo.while" in program) == (max_scores == 0)


@pytest.mark.parametrize("bias", [None, (BATCH, HEADS, QUERIES), (1, HEADS, QUERIES), (1, 1, 1)])
@pytest.mark.parametrize(
    "mask_shape", [(BATCH, 1, 1), (BATCH, 1, QUERIES), (1, 1, 1), (BATCH, HEADS, QUERIES)]
)
def test_output_equals_that_of_jax(max_scores, mask_shape, bias):
    bias = None if bias is None else normal(*bias, KEYS, seed=3)
    arrays, allowed = inputs(), mask(*mask_shape)
    attended = jax.jit(attention.dot_product_attention)(*arrays, mask=allowed, bias=bias)
    expected = jax.jit(jax.nn.dot_product_attention)(*arrays, bias, allowed)
    assert attended.dtype == expected.dtype
    np.testing.assert_allclose(attended, expected, atol=1e-6)


def test_gradient_equals_that_of_jax(max_scores):
    allowed = mask(BATCH, 1, 1)

    def gradient(function):
        def loss(*arrays):
            return (function(*arrays, mask=allowed) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs())

    actual = gradient(attention.dot_product_attention)
    for one, expected in zip(actual, gradient(jax.nn.dot_product_attention), strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-5)


def test_bfloat16_is_as_exact_as_that_of_jax(max_scores):
    allowed = mask(BATCH, 1, 1)
    exact = np.asarray(jax.jit(jax.nn.dot_product_attention)(*inputs(), mask=allowed))

    def error(function):
        attended = jax.jit(function)(*inputs(jnp.bfloat16), mask=allowed)
        assert attended.dtype == jnp.bfloat16
        return np.abs(np.asarray(attended, np.float32) - exact).max()

    expected = error(jax.nn.dot_product_attention)
    assert error(attention.dot_product_attention) < max(1.5 * expected, 0.02)


def test_query_without_keys_and_masked_outliers_stay_finite(max_scores):
    query, key, value = inputs()
    allowed = mask(BATCH, 1, 1)
    allowed[0] = False
    huge = np.array(key)
    huge[1, ~allowed[1, 0, 0]] = 1e6
    attend = jax.jit(functools.partial(attention.dot_product_attention, mask=allowed))
    attended = np.asarray(attend(query, huge, value))
    assert np.isfinite(attended).all()
    expected = np.asarray(attend(query, key, value))
    np.testing.assert_allclose(attended[1], expected[1], atol=1e-6)


def test_programs_for_accelerators_and_training_are_those_of_nn():
    options = {"mask": mask(BATCH, 1, 1)}

    def program(function, platform, **more):
        traced = jax.jit(lambda *arrays: function(*arrays, **options, **more)).trace(*inputs())
        return traced.lower(lowering_platforms=(platform,)).as_text()

    def count(text, operation):
        return text.count(f"stablehlo.{operation}")

    for operation in ("dot_general", "exponential", "divide", "transpose", "select"):
        for platform, deterministic in (("tpu", True), ("cpu", False)):
            actual, expected = (
                count(program(function, platform, deterministic=deterministic), operation)
                for function in (attention.dot_product_attention, nn.dot_product_attention)
            )
            assert actual == expected, (operation, platform)
    assert program(attention.dot_product_attention, "cpu") != program(
        nn.dot_product_attention, "cpu"
    )


@pytest.fixture
def tpu_form(monkeypatch):
    """Makes this machine use the attention implementation for long inputs on TPUs."""
    monkeypatch.setattr(attention, "MAX_TPU_SCORES", 0)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *inputs, tpu, **forms: tpu(*inputs))


@pytest.mark.parametrize("num_groups", [HEADS, 2])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask_shape", [(BATCH, 1, 1), (BATCH, HEADS, QUERIES)])
def test_tpu_form_equals_that_of_jax(tpu_form, mask_shape, is_causal, num_groups):
    query, key, value = inputs()
    gate, position_bias = normal(BATCH, HEADS, QUERIES, 1), normal(1, HEADS, QUERIES, KEYS, seed=3)
    key, value = (np.asarray(x)[:, :, :num_groups] for x in (key, value))
    arrays, allowed = (query, key, value), mask(*mask_shape)

    def run(function, bias):
        def loss(*arrays):
            options = {"mask": allowed, "bias": bias, "is_causal": is_causal}
            attended = function(*arrays, **options)
            return (attended**2).sum(), attended

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)

    actual = run(attention.dot_product_attention, (gate, position_bias))
    expected = run(jax.nn.dot_product_attention, gate * position_bias)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), actual, expected)


def test_tpu_holds_the_scores_of_one_head_for_long_inputs(monkeypatch):
    def scores(max_scores):
        monkeypatch.setattr(attention, "MAX_TPU_SCORES", max_scores)

        def function(*arrays):
            return attention.dot_product_attention(*arrays, mask=mask(BATCH, 1, 1))

        lowered = jax.jit(function).trace(*inputs()).lower(lowering_platforms=("tpu",))
        return lowered.as_text().count(f"tensor<{BATCH}x{HEADS}x{QUERIES}x{KEYS}x")

    assert scores(HEADS * QUERIES * KEYS) > 0
    assert scores(HEADS * QUERIES * KEYS - 1) == 0
