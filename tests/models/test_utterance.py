"""An utterance's feature and logits: what they are, and what they do not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.models import SpeechUtterance, TextUtterance, UtteranceConfig, UtteranceHead

WIDTH, CLASSES, FEATURE = 6, 3, 5
POOLINGS = ("statistics", "mean", "last")
LENGTHS = np.array([4, 1, 3])
MASK = np.arange(4) < LENGTHS[:, None]


def make(pooling="mean", **changes):
    config = UtteranceConfig(CLASSES, feature_dim=FEATURE, pooling=pooling, **changes)
    return UtteranceHead(WIDTH, config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def hidden():
    return np.random.default_rng(0).normal(2, 3, (*MASK.shape, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module", params=POOLINGS)
def head(request):
    """A head and its compiled call."""
    made = make(request.param)
    return made, nnx.jit(lambda *arguments: made(*arguments))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_padding_changes_neither_outputs_nor_gradients(head, hidden, garbage):
    made, run = head
    dirty = np.where(MASK[..., None], hidden, garbage)
    for ours, theirs in zip(run(dirty, MASK), run(hidden, MASK), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    gradient = jax.jit(jax.grad(lambda x: sum(part.sum() for part in made(x, MASK))))(dirty)
    assert np.isfinite(gradient).all()
    assert not gradient[~MASK].any()


def test_batch_mates_and_longer_padding_change_nothing(head, hidden):
    _, run = head
    together = run(hidden, MASK)
    for row, length in enumerate(LENGTHS):
        alone = run(hidden[row : row + 1, :length], MASK[row : row + 1, :length])
        for one, all_ in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], all_[row], atol=1e-5)


def test_an_utterance_of_nothing_is_finite(head, hidden):
    _, run = head
    output = run(hidden, np.zeros_like(MASK))
    assert all(np.isfinite(part).all() for part in output)


def test_the_mean_is_over_normed_valid_tokens(hidden):
    made = make("mean")
    normed = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(
        hidden.var(-1, keepdims=True) + 1e-5
    )
    pooled = np.stack([normed[row, :length].mean(0) for row, length in enumerate(LENGTHS)])
    feature = pooled @ made.feature.kernel[...] + made.feature.bias[...]
    logits = np.maximum(feature, 0) @ made.classifier.kernel[...] + made.classifier.bias[...]
    output = made(hidden, MASK)
    np.testing.assert_allclose(output.feature, feature, atol=1e-5)
    np.testing.assert_allclose(output.logits, logits, atol=1e-5)


def test_the_last_valid_token_alone_counts_wherever_padding_is(hidden):
    made = make("last")
    changed = hidden.copy()
    for row, length in enumerate(LENGTHS):
        changed[row, : length - 1] += 1
    np.testing.assert_array_equal(made(changed, MASK).feature, made(hidden, MASK).feature)
    # The same tokens at the end of their row.
    shifted = np.stack(
        [np.roll(row, 4 - n, axis=0) for row, n in zip(hidden, LENGTHS, strict=True)]
    )
    on_left = made(shifted, MASK[:, ::-1]).feature
    np.testing.assert_allclose(on_left, made(hidden, MASK).feature, atol=1e-6)


def test_dropout_is_before_the_classifier_in_training_only(hidden):
    made = make(dropout=0.5)
    still = made(hidden, MASK)
    dropped = made(hidden, MASK, deterministic=False, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(dropped.feature, still.feature)
    assert (dropped.logits != still.logits).any()


def test_half_precision_gives_float32_that_is_near(hidden):
    output = make("statistics", dtype="bfloat16")(hidden, MASK)
    exact = make("statistics")(hidden, MASK)
    for ours, theirs in zip(output, exact, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=5e-2)


class Backbone(nnx.Module):
    """Gives a one-hot vector a token; of waveforms, one a sample, as many as are the clip's."""

    def __call__(self, x, other, **options):
        hidden = jax.nn.one_hot(jnp.asarray(x).astype(int), WIDTH)
        if other.ndim == 2:
            return hidden
        return hidden, jnp.arange(x.shape[1]) < other[:, None]


def test_backbones_of_text_and_speech_stand_under_one_head(hidden):
    made = make("mean")
    ids = np.random.default_rng(1).integers(WIDTH, size=MASK.shape)
    expected = made(jax.nn.one_hot(ids, WIDTH), MASK)
    text = TextUtterance(Backbone(), made)(ids, MASK)
    speech = SpeechUtterance(Backbone(), made)(ids.astype(np.float32), LENGTHS)
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
def test_what_a_head_cannot_be_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}.*(allowed|at least)"):
        UtteranceConfig(**{"num_classes": CLASSES, field: value})
