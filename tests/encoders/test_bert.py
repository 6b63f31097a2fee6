"""BERT and RoBERTa: equality with transformers, masking, dropout, LoRA and configs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.convert.params import load_params, save_params
from mister_jax.encoders.bert import NAME_RULES, Bert, BertConfig, key_table
from mister_jax.errors import InputError
from mister_jax.nn import PerExampleRngs
from mister_jax.nn.lora import LoRAConfig, add_lora
from tests.helpers.golden import GOLDEN

NAMES = ("bert", "roberta")


@functools.cache
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def group(name, start):
    return {
        key.removeprefix(start): value
        for key, value in golden(name).items()
        if key.startswith(start)
    }


def huggingface_config(name):
    return json.loads(str(golden(name)["config"]))


@functools.cache
def make(name, **changes):
    """Returns the encoder of a golden file. The encoder is cached, so tests must not change it."""
    config = BertConfig.from_huggingface(huggingface_config(name), **changes)
    bert = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
    return load_params(bert, key_table(config), group(name, "param/"), ignore=NAME_RULES.unused)


@nnx.jit(static_argnames=("output_hidden_states", "deterministic"))
def run(bert, ids=None, mask=None, **options):
    return bert(ids, mask, **options)


@nnx.jit
def train(bert, key):
    """Encodes the golden batch of BERT with dropout."""
    ids, mask, _ = inputs("bert")
    keys = PerExampleRngs.from_batch_key(key, len(ids))
    return bert(ids, mask, deterministic=False, rngs=keys)


def outputs_without_token_types():
    ids, mask, _ = inputs("bert")
    return run(make("bert"), ids, mask)


def inputs(name):
    """Returns tokens, mask and token types of the golden batch.

    The first row has no padding, the second has padding on the right, and the third on the left.
    """
    return tuple(group(name, "in/").values())


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_equals_transformers(name):
    ids, mask, types = inputs(name)
    outputs = run(make(name), ids, mask, token_type_ids=types, output_hidden_states=True)
    last, states = map(np.asarray, outputs)
    expected = golden(name)["out/hidden_states"]
    assert states.shape == expected.shape
    for layer, expected_layer in zip(states, expected, strict=True):
        np.testing.assert_allclose(layer[mask], expected_layer[mask], atol=1e-5)
    np.testing.assert_array_equal(last, states[-1])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_close_to_float32(name):
    ids, mask, types = inputs(name)
    bert = make(name, dtype="bfloat16", param_dtype="bfloat16")
    _, states = run(bert, ids, mask, token_type_ids=types, output_hidden_states=True)
    assert states.dtype == jnp.bfloat16
    expected = golden(name)["out/hidden_states"]
    for layer, exact in zip(np.asarray(states, np.float32), expected, strict=True):
        # The error is relative to the norm of the layer's hidden states.
        error = np.linalg.norm(layer[mask] - exact[mask])
        assert error < 2e-2 * np.linalg.norm(exact[mask])


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_other_rows_do_not_change_outputs(name):
    ids, mask, types = inputs(name)
    expected = np.asarray(run(make(name), ids, mask, token_type_ids=types))
    for garbage in (-100, 10**6):
        dirty = [np.where(mask, values, garbage) for values in (ids, types)]
        outputs = np.asarray(run(make(name), dirty[0], mask, token_type_ids=dirty[1]))
        np.testing.assert_array_equal(outputs[mask], expected[mask])
        assert np.isfinite(outputs).all()
    for row in (1, 2):
        tokens = np.s_[row : row + 1, mask[row]]
        alone = np.asarray(run(make(name), ids[tokens], token_type_ids=types[tokens]))
        np.testing.assert_allclose(alone[0], expected[row, mask[row]], atol=1e-5)


def test_embeddings_can_replace_tokens():
    ids, mask, _ = inputs("roberta")
    bert = make("roberta")
    embeddings = np.where(mask[..., None], jax.jit(bert.embed)(ids), np.nan)
    outputs = np.asarray(run(bert, embeddings=embeddings, mask=mask))
    expected = np.asarray(run(bert, ids, mask))
    np.testing.assert_allclose(outputs[mask], expected[mask], atol=1e-6)


def test_padding_has_no_gradient():
    ids, mask, _ = inputs("bert")
    graph, params = nnx.split(make("bert"))
    embeddings = np.where(mask[..., None], jax.jit(make("bert").embed)(ids), np.nan)

    @jax.jit
    @jax.grad
    def gradient(embeddings):
        last = nnx.merge(graph, params)(embeddings=embeddings, attention_mask=mask)
        return jnp.sum(jnp.where(mask[..., None], last, 0) ** 2)

    gradients = np.asarray(gradient(embeddings))
    assert np.isfinite(gradients).all() and gradients[mask].any()
    assert not gradients[~mask].any()


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_equal_separate_ones(name):
    ids, mask, _ = inputs(name)
    bert = make(name)
    separate = np.asarray(run(bert, ids, mask))
    packed = np.concatenate([ids[0], ids[1, :5], ids[2, 3:], [7, 7]])[None]
    segments = np.repeat([1, 2, 3, 0], [8, 5, 5, 2])[None]
    outputs = np.asarray(run(bert, packed, segments > 0, segment_ids=segments))[0]
    for part, row in ((slice(0, 8), 0), (slice(8, 13), 1), (slice(13, 18), 2)):
        np.testing.assert_allclose(outputs[part], separate[row, mask[row]], atol=1e-5)


def test_a_row_without_tokens_has_finite_outputs():
    ids, mask, _ = inputs("bert")
    assert np.isfinite(run(make("bert"), ids, np.zeros_like(mask))).all()


@pytest.mark.parametrize("dropout", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(dropout):
    ids, mask, _ = inputs("bert")
    rates = {"dropout": 0.0, "attention_dropout": 0.0, dropout: 0.5}
    bert = make("bert", **rates)
    expected = outputs_without_token_types()
    np.testing.assert_allclose(run(bert, ids, mask), expected, atol=1e-5)
    dropped = train(bert, jax.random.key(0))
    assert np.isfinite(dropped).all() and not np.allclose(dropped, expected)
    with pytest.raises(ValueError, match="rngs"):
        run(bert, ids, mask, deterministic=False)


def test_training_outputs_approach_inference_outputs_as_dropout_goes_to_zero():
    bert = make("bert", dropout=0.0, attention_dropout=1e-12)
    trained = train(bert, jax.random.key(0))
    np.testing.assert_allclose(trained, outputs_without_token_types(), atol=1e-5)


def test_saving_restores_the_loaded_tensors():
    original = group("roberta", "param/")
    config = make("roberta").config
    saved = save_params(make("roberta"), key_table(config))
    assert set(original) - set(saved) == {"pooler.dense.weight", "pooler.dense.bias"}
    for name, tensor in saved.items():
        np.testing.assert_array_equal(tensor[...], original[name])


def test_lora_starts_without_effect_and_learns():
    ids, mask, _ = inputs("bert")
    lora = LoRAConfig(rank=2, alpha=4, targets=("query", "mlp_in", "attention/out"))
    bert = add_lora(make.__wrapped__("bert"), lora, rngs=nnx.Rngs(0))
    graph, trained, frozen = nnx.split(bert, nnx.LoRAParam, ...)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(trained):
        last = nnx.merge(graph, trained, frozen)(ids, mask)
        return jnp.sum(last[mask] ** 3), last

    gradients, last = gradient(trained)
    np.testing.assert_allclose(last, outputs_without_token_types(), atol=1e-5)
    gradients = jax.tree.leaves(gradients)
    # The second LoRA matrices start at zero, so the gradients of the first matrices are zero.
    assert [bool(np.any(value)) for value in gradients].count(True) == len(gradients) // 2 == 3


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        ("bert_base", 108_891_648),
        ("bert_large", 334_092_288),
        ("roberta_base", 124_055_040),
        ("roberta_large", 354_310_144),
        ("minilm_l6", 22_565_376),
    ],
)
def test_presets_have_the_released_sizes_without_the_pooler(preset, size):
    config = getattr(BertConfig, preset)()
    shapes = nnx.state(nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == size
    assert config.max_length == 512


def test_to_huggingface_inverts_from_huggingface():
    for config in (BertConfig.bert_large(), BertConfig.roberta_base(dropout=0.2)):
        assert BertConfig.from_huggingface(config.to_huggingface()) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "gpt2", r"model_type='gpt2'; allowed: \['bert', 'roberta'"),
        ("hidden_act", "relu", "hidden_act='relu'; allowed: 'gelu'"),
        ("position_embedding_type", "relative_key", "allowed: 'absolute'"),
        ("is_decoder", True, "is_decoder=True; allowed: False"),
        ("hidden_size", None, "hidden_size=None; allowed: an integer"),
        ("hidden_size", 15, "hidden_size=15; allowed: a multiple of num_heads=4"),
        ("layer_norm_eps", "small", "layer_norm_eps='small'; allowed: a number"),
        ("hidden_dropout_prob", 1.5, "dropout=1.5; allowed: 0 <= rate < 1"),
    ],
)
def test_unsupported_configs_are_rejected(field, value, message):
    with pytest.raises(InputError, match=message) as error:
        BertConfig.from_huggingface(huggingface_config("bert") | {field: value})
    assert "\n" not in str(error.value)


def test_invalid_calls_and_sizes_are_rejected():
    ids = np.zeros((1, 10), int)
    with pytest.raises(ValueError, match="10 tokens; allowed: at most 9"):
        make("bert")(ids)
    with pytest.raises(ValueError, match="a token at position 9; allowed: below 9"):
        make("bert")(ids, segment_ids=np.zeros((1, 10), int))
    with pytest.raises(ValueError, match="a token at position 12; allowed: below 9"):
        make("bert")(ids, positions=np.arange(3, 13)[None])
    two_sequences = np.arange(10)[None] // 5
    assert np.isfinite(run(make("bert"), ids, segment_ids=two_sequences)).all()
    with pytest.raises(ValueError, match="pass either input_ids or embeddings"):
        make("bert")()
    with pytest.raises(ValueError, match="num_layers=0; allowed: at least 1"):
        BertConfig(num_layers=0)
    with pytest.raises(ValueError, match="position_offset=512; allowed: 0 to num_positions"):
        BertConfig(position_offset=512)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_golden_files_equal_transformers(name):
    from tests.golden import make_bert

    model = make_bert.huggingface_model(name)
    states = make_bert.hidden_states(model, make_bert.batch(name))
    mask = group(name, "in/")["attention_mask"]
    expected = golden(name)["out/hidden_states"]
    np.testing.assert_allclose(states[:, mask], expected[:, mask], atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_as_accurate_as_transformers(name):
    import torch

    from tests.golden import make_bert

    batch = make_bert.batch(name)
    mask = batch["attention_mask"]
    model = make_bert.huggingface_model(name).to(torch.bfloat16)
    torch_states = make_bert.hidden_states(model, batch)[:, mask]
    bert = make(name, dtype="bfloat16", param_dtype="bfloat16")
    ids, mask, types = inputs(name)
    _, states = run(bert, ids, mask, token_type_ids=types, output_hidden_states=True)
    states = np.asarray(states, np.float32)[:, mask]
    exact_states = golden(name)["out/hidden_states"][:, mask]
    for layer, torch_layer, exact in zip(states, torch_states, exact_states, strict=True):
        # The error is relative to the norm of the layer's hidden states.
        assert np.linalg.norm(layer - torch_layer) < 2e-2 * np.linalg.norm(exact)
    # The two libraries round differently, so both are compared with the float32 states.
    torch_error = np.abs(torch_states[-1] - exact_states[-1]).mean()
    assert np.abs(states[-1] - exact_states[-1]).mean() < 1.5 * torch_error
