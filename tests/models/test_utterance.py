"""Utterance models: pooling, padding and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.models import SpeechUtterance, TextUtterance, UtteranceConfig, UtteranceHead

HIDDEN_DIM, NUM_CLASSES, FEATURE_DIM = 6, 3, 5
POOLINGS = ("statistics", "mean", "last")
LENGTHS = np.array([4, 1, 3])
MASK = np.arange(4) < LENGTHS[:, None]


def make_head(pooling="mean", **changes):
    config = UtteranceConfig(NUM_CLASSES, feature_dim=FEATURE_DIM, pooling=pooling, **changes)
    return nnx.jit(lambda: UtteranceHead(HIDDEN_DIM, config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def hidden():
    return np.random.default_rng(0).normal(2, 3, (*MASK.shape, HIDDEN_DIM)).astype(np.float32)


@pytest.fixture(scope="module", params=POOLINGS)
def head(request):
    """Returns a head and its compiled call."""
    head = make_head(request.param)
    return head, nnx.jit(lambda *arguments: head(*arguments))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_padding_does_not_change_outputs_or_gradients(head, hidden, garbage):
    module, run = head
    dirty = np.where(MASK[..., None], hidden, garbage)
    for value, expected in zip(run(dirty, MASK), run(hidden, MASK), strict=True):
        np.testing.assert_array_equal(value, expected)
    gradient = jax.jit(jax.grad(lambda x: sum(part.sum() for part in module(x, MASK))))(dirty)
    assert np.isfinite(gradient).all()
    assert not gradient[~MASK].any()


def test_batch_and_padding_length_do_not_change_outputs(head, hidden):
    _, run = head
    batched = run(hidden, MASK)
    for row, length in enumerate(LENGTHS):
        alone = run(hidden[row : row + 1, :length], MASK[row : row + 1, :length])
        for value, expected in zip(alone, batched, strict=True):
            np.testing.assert_allclose(value[0], expected[row], atol=1e-5)


def test_an_utterance_without_valid_tokens_has_finite_outputs(head, hidden):
    _, run = head
    output = run(hidden, np.zeros_like(MASK))
    assert all(np.isfinite(part).all() for part in output)


def test_mean_pooling_averages_normalized_valid_tokens(hidden):
    head = make_head("mean")
    normed = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(
        hidden.var(-1, keepdims=True) + 1e-5
    )
    pooled = np.stack([normed[row, :length].mean(0) for row, length in enumerate(LENGTHS)])
    feature = pooled @ np.asarray(head.feature.kernel) + np.asarray(head.feature.bias)
    logits = np.maximum(feature, 0) @ np.asarray(head.classifier.kernel)
    logits += np.asarray(head.classifier.bias)
    output = jax.jit(head)(hidden, MASK)
    np.testing.assert_allclose(output.feature, feature, atol=1e-5)
    np.testing.assert_allclose(output.logits, logits, atol=1e-5)


def test_last_pooling_reads_only_the_last_valid_token_with_padding_on_either_side(hidden):
    head = make_head("last")
    changed = hidden.copy()
    for row, length in enumerate(LENGTHS):
        changed[row, : length - 1] += 1
    run = jax.jit(head)
    np.testing.assert_array_equal(run(changed, MASK).feature, run(hidden, MASK).feature)
    # The same tokens, padded on the left.
    shifted = np.stack(
        [np.roll(row, 4 - n, axis=0) for row, n in zip(hidden, LENGTHS, strict=True)]
    )
    left_padded = run(shifted, MASK[:, ::-1]).feature
    np.testing.assert_allclose(left_padded, run(hidden, MASK).feature, atol=1e-6)


def test_dropout_precedes_the_classifier_in_training_only(hidden):
    head = make_head(dropout=0.5)
    expected = jax.jit(head)(hidden, MASK)
    train = jax.jit(lambda x: head(x, MASK, deterministic=False, rngs=nnx.Rngs(1)))
    dropped = train(hidden)
    np.testing.assert_array_equal(dropped.feature, expected.feature)
    assert (np.asarray(dropped.logits) != np.asarray(expected.logits)).any()


def test_bfloat16_outputs_are_float32_and_close(hidden):
    output = jax.jit(make_head("statistics", dtype="bfloat16"))(hidden, MASK)
    exact = jax.jit(make_head("statistics"))(hidden, MASK)
    for value, expected in zip(output, exact, strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, atol=5e-2)


class Backbone(nnx.Module):
    """Returns a one-hot vector per token, or per sample of a waveform."""

    def __call__(self, x, other, **options):
        hidden = jax.nn.one_hot(jnp.asarray(x).astype(int), HIDDEN_DIM)
        if other.ndim == 2:
            return hidden
        return hidden, jnp.arange(x.shape[1]) < other[:, None]


def test_text_and_speech_backbones_share_the_head(hidden):
    head = make_head("mean")
    ids = np.random.default_rng(1).integers(HIDDEN_DIM, size=MASK.shape)
    expected = jax.jit(head)(np.eye(HIDDEN_DIM, dtype=np.float32)[ids], MASK)
    text = jax.jit(TextUtterance(Backbone(), head))(ids, MASK)
    speech = jax.jit(SpeechUtterance(Backbone(), head))(ids.astype(np.float32), LENGTHS)
    np.testing.assert_array_equal(text.feature, expected.feature)
    np.testing.assert_array_equal(speech.logits, expected.logits)


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_classes", 0),
        ("feature_dim", 0),
        ("pooling", "max"),
        ("dropout", 1.0),
        ("dtype", "int8"),
        ("param_dtype", "float16"),
    ],
)
def test_invalid_values_raise_an_error_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"{field}.*(allowed|at least)"):
        UtteranceConfig(**{"num_classes": NUM_CLASSES, field: value})
