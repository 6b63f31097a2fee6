"""Masked attention and the co-attention layer."""

import jax
import numpy as np
import pytest
from flax import nnx

from mister_jax.nn import (
    CoAttentionLayer,
    Dropout,
    MultiHeadAttention,
    PerExampleRngs,
    dot_product_attention,
)

KEY_MASK = np.arange(6) < np.array([[6], [2], [0]])  # the third dialogue has no key
NUM_HEADS = 3


@nnx.jit(static_argnames="dropout")
def attention(dropout=0.0):
    module = MultiHeadAttention(
        5, 4, 7, attention_dim=6, num_heads=NUM_HEADS, dropout=dropout, rngs=nnx.Rngs(0)
    )
    for index, bias in enumerate((module.query.bias, module.value_bias, module.out.bias)):
        bias.set_value(jax.random.normal(jax.random.key(index), bias.shape))
    return module


@nnx.jit
def attend_in_training(module, query, key, mask):
    return module(query, key, mask, deterministic=False, rngs=nnx.Rngs(dropout=0))


def query_and_key_inputs(seed=0):
    random = np.random.default_rng(seed)
    return (
        random.normal(size=(3, 4, 5)).astype(np.float32),
        random.normal(size=(*KEY_MASK.shape, 4)).astype(np.float32),
    )


def keys_and_values(module, key):
    keys, values = np.split(linear(module.key_value, key), 2, axis=-1)
    return keys, values + np.asarray(module.value_bias)


def linear(module, x):
    y = x @ np.asarray(module.kernel)
    return y if module.bias is None else y + np.asarray(module.bias)


def numpy_attention(module, query, key, key_mask):
    """Attends head by head over the valid keys of one dialogue."""
    key = key[key_mask]
    q = linear(module.query, query)
    k, v = keys_and_values(module, key)
    heads = []
    for q_head, k_head, v_head in zip(
        *(np.split(part, NUM_HEADS, axis=-1) for part in (q, k, v)), strict=True
    ):
        weights = np.exp(q_head @ k_head.T / np.sqrt(q_head.shape[-1]))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v_head)
    return linear(module.out, np.concatenate(heads, axis=-1))


@nnx.jit
def outputs_and_gradients(module, query, key):
    def total(module):
        outputs = module(query, key, KEY_MASK)
        return (outputs**2).sum(), outputs

    gradients, outputs = nnx.grad(total, has_aux=True)(module)
    return outputs, gradients


@nnx.jit
def co_attention():
    return CoAttentionLayer(6, attention_dim=6, num_heads=NUM_HEADS, rngs=nnx.Rngs(0))


def streams():
    return np.random.default_rng(0).normal(size=(2, 3, 5, 6)).astype(np.float32)


def projections(seed=0, time=4, source=6):
    """Returns query, key, value and bias of 3 dialogues, 2 heads and head_dim 5."""
    random = np.random.default_rng(seed)
    shapes = (3, time, 2, 5), (3, source, 2, 5), (3, source, 2, 5), (1, 2, time, source)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def attend(parts, mask=KEY_MASK[:, None, None], dropout=None, *, train=False, **options):
    @jax.jit
    def run(query, key, value, bias, mask):
        rngs = PerExampleRngs.from_batch_key(jax.random.key(0), 3) if train else None
        return dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            dropout=dropout,
            deterministic=not train,
            rngs=rngs,
            **options,
        )

    return run(*parts, mask)


def test_dot_product_attention_equals_its_formula_with_and_without_dropout():
    query, key, value, bias = parts = projections()
    scores = np.einsum("btkd,bskd->bkts", query, key) / np.sqrt(5) + np.asarray(bias)
    scores = np.where(KEY_MASK[:, None, None], scores, -np.inf)[:2]  # the third dialogue has no key
    weights = np.exp(scores)
    expected = np.einsum("bkts,bskd->btkd", weights / weights.sum(-1, keepdims=True), value[:2])
    for dropout in (None, Dropout(0.0), Dropout(1e-12)):
        result = attend(parts, dropout=dropout, train=True)
        np.testing.assert_allclose(result[:2], expected, atol=1e-5)
        assert np.isfinite(result).all()


def test_dot_product_attention_accepts_a_mask_per_query():
    causal = np.tril(np.ones((6, 6), bool))[None, None]
    parts = projections(time=6)
    full = attend(parts, causal)
    shorter = [parts[0][:, :2], parts[1][:, :2], parts[2][:, :2], parts[3][..., :2, :2]]
    np.testing.assert_allclose(full[:, :2], attend(shorter, causal[..., :2, :2]), atol=1e-6)


@pytest.mark.parametrize("dropout", [None, Dropout(1e-12)], ids=["no_dropout", "dropout"])
def test_causal_attention_equals_attention_with_a_causal_mask(dropout):
    parts = projections(time=6)
    mask = KEY_MASK[:, None, None]
    expected = attend(parts, mask & np.tril(np.ones((6, 6), bool)))
    result = attend(parts, mask, dropout, is_causal=True, train=True)
    np.testing.assert_allclose(result[:2], expected[:2], atol=1e-5)


def test_dot_product_attention_drops_weights_in_training_only():
    parts = projections()
    np.testing.assert_array_equal(attend(parts, dropout=Dropout(0.5)), attend(parts))
    dropped = attend(parts, dropout=Dropout(0.5), train=True)
    assert not np.allclose(dropped[0], attend(parts)[0])


def test_padding_up_to_max_length_does_not_change_the_dropped_weights():
    options = {"dropout": Dropout(0.5), "max_length": 32}
    parts = projections()
    expected = attend(parts, **options, train=True)
    query, key, value, bias = parts
    padded = [
        np.pad(query, ((0, 0), (0, 3), (0, 0), (0, 0))),
        *(np.pad(x, ((0, 0), (0, 9), (0, 0), (0, 0))) for x in (key, value)),
        np.pad(bias, ((0, 0), (0, 0), (0, 3), (0, 9))),
    ]
    mask = np.pad(KEY_MASK, ((0, 0), (0, 9)))[:, None, None]
    result = attend(padded, mask, **options, train=True)
    np.testing.assert_allclose(result[:2, :4], expected[:2], atol=1e-6)


def test_attention_equals_attention_head_by_head():
    module, (query, key) = attention(), query_and_key_inputs()
    outputs = jax.jit(module)(query, key, KEY_MASK)
    for row in (0, 1):
        expected = numpy_attention(module, query[row], key[row], KEY_MASK[row])
        np.testing.assert_allclose(outputs[row], expected, atol=1e-5)


def test_outputs_with_a_tiny_dropout_rate_equal_those_without_dropout():
    query, key = query_and_key_inputs()
    expected = jax.jit(attention())(query, key, KEY_MASK)
    trained = attend_in_training(attention(dropout=1e-12), query, key, KEY_MASK)
    np.testing.assert_allclose(trained, expected, atol=1e-6)


def test_attention_weights_are_dropped_in_training_only():
    query, key = query_and_key_inputs()
    module = attention(dropout=0.5)
    expected = jax.jit(attention())(query, key, KEY_MASK)
    np.testing.assert_array_equal(jax.jit(module)(query, key, KEY_MASK), expected)
    dropped = attend_in_training(module, query, key, KEY_MASK)
    assert not np.allclose(dropped[0], expected[0])


@pytest.mark.parametrize("dropout", [0.0, 1e-12])
def test_without_keys_the_attended_value_is_zero(dropout):
    module, (query, key) = attention(dropout), query_and_key_inputs()
    for time in (1, 6):
        outputs = attend_in_training(module, query, key[:, :time], KEY_MASK[:, :time])
        bias = np.asarray(module.out.bias)
        np.testing.assert_array_equal(outputs[2], np.broadcast_to(bias, outputs[2].shape))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_masked_keys_change_neither_outputs_nor_gradients(garbage):
    query, key = query_and_key_inputs()
    clean = outputs_and_gradients(attention(), query, np.where(KEY_MASK[..., None], key, 0))
    dirty = outputs_and_gradients(attention(), query, np.where(KEY_MASK[..., None], key, garbage))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), dirty, clean)


def test_attention_dim_must_be_a_multiple_of_num_heads():
    with pytest.raises(ValueError, match="attention_dim=7; allowed: a multiple of num_heads=3"):
        MultiHeadAttention(5, 4, 7, attention_dim=7, num_heads=3, rngs=nnx.Rngs(0))


def test_co_attention_is_symmetric_in_its_streams():
    layer, (first, second) = co_attention(), streams()
    mask = np.ones(first.shape[:2], bool)
    outputs = jax.jit(layer)(first, second, mask, mask)

    swapped = co_attention()
    nnx.update(swapped, jax.tree.map(lambda x: np.asarray(x)[::-1], nnx.state(layer)))
    swapped_outputs = jax.jit(swapped)(second, first, mask, mask)
    np.testing.assert_allclose(outputs[0], swapped_outputs[1], atol=1e-6)
    np.testing.assert_allclose(outputs[1], swapped_outputs[0], atol=1e-6)


def test_padding_does_not_change_co_attention():
    layer, (first, second) = co_attention(), streams()
    first_mask = np.arange(5) < np.array([[5], [3], [0]])
    second_mask = np.arange(5) < np.array([[2], [5], [4]])
    expected = jax.jit(layer)(first, second, first_mask, second_mask)
    padding = ((0, 0), (0, 15), (0, 0))
    padded = [np.pad(stream, padding, constant_values=1e30) for stream in (first, second)]
    masks = [np.pad(mask, padding[:2]) for mask in (first_mask, second_mask)]
    padded_outputs = jax.jit(layer)(*padded, *masks)
    for outputs, expected_outputs in zip(padded_outputs, expected, strict=True):
        np.testing.assert_allclose(outputs[:, :5], expected_outputs, atol=1e-5)


@pytest.mark.parity
def test_attention_equals_pytorch():
    import torch

    module, (query, key) = attention(), query_and_key_inputs()
    reference = torch.nn.MultiheadAttention(6, NUM_HEADS, batch_first=True)
    reference.in_proj_weight.data = torch.eye(6).repeat(3, 1)
    reference.in_proj_bias.data.zero_()
    reference.out_proj.weight.data = torch.eye(6)
    reference.out_proj.bias.data.zero_()
    key, value = keys_and_values(module, key)
    projected = [torch.tensor(part) for part in (linear(module.query, query), key, value)]
    mixed, _ = reference(*projected, key_padding_mask=torch.tensor(~KEY_MASK))
    outputs = module(*query_and_key_inputs(), KEY_MASK)
    for row in (0, 1):  # PyTorch returns NaN for the row without keys
        expected = linear(module.out, mixed[row].detach().numpy())
        np.testing.assert_allclose(outputs[row], expected, atol=1e-5)


def test_a_window_is_the_last_keys_up_to_the_query():
    module = attention()
    windowed = nnx.jit(
        lambda: MultiHeadAttention(
            5, 4, 7, attention_dim=6, num_heads=NUM_HEADS, window=3, rngs=nnx.Rngs(0)
        )
    )()
    nnx.update(windowed, nnx.state(module))
    random = np.random.default_rng(0)
    query, key = (random.normal(size=(2, 6, dim)).astype(np.float32) for dim in (5, 4))
    key_mask = np.array([[True] * 6, [False, True, False, False, False, True]])
    output = jax.jit(windowed)(query, key, key_mask)
    no_key = linear(module.out, np.zeros(6))
    for dialogue, position in np.ndindex(2, 6):
        keys = slice(max(0, position - 2), position + 1)
        expected = no_key
        if key_mask[dialogue, keys].any():
            (expected,) = numpy_attention(
                module,
                query[dialogue, position : position + 1],
                key[dialogue, keys],
                key_mask[dialogue, keys],
            )
        np.testing.assert_allclose(output[dialogue, position], expected, atol=1e-5)
    with pytest.raises(ValueError, match="steps need a window"):
        module.initial_state(1)


def test_an_integer_mask_equals_a_bool_mask():
    attention = MultiHeadAttention(
        4, 4, 4, attention_dim=4, num_heads=2, window=2, rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    mask = np.arange(5) < np.array([[5], [2]])
    expected = attention(x, x, mask)
    np.testing.assert_array_equal(attention(x, x, mask.astype(np.int32)), expected)
