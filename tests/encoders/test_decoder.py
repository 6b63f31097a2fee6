"""Llama, Qwen2 and Vicuna: equality with transformers, masking, LoRA and configs."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mister_jax.convert.params import load_backbone, load_params
from mister_jax.encoders.decoder import (
    NAME_RULES,
    Decoder,
    DecoderConfig,
    RopeScaling,
    key_table,
    rope_frequencies,
)
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig, add_lora, quantize
from mister_jax.parallel.sharding import data_mesh, shardings
from tests.helpers.golden import GOLDEN

NAMES = ("llama3", "llama2", "qwen2")
LORA = LoRAConfig(rank=2, alpha=4, dropout=0.5, targets=("query", "value", "down"))
IDS = np.random.default_rng(1).integers(24, size=(3, 8))
MASK = np.ones((3, 8), bool)
MASK[1, 5:] = False
MASK[2, :3] = False


@functools.cache
def golden(name):
    with np.load(GOLDEN / f"decoder_{name}.npz") as file:
        return dict(file)


def group(name, start):
    return {
        key.removeprefix(start): value
        for key, value in golden(name).items()
        if key.startswith(start)
    }


@functools.cache
def loaded(name, **changes):
    config = DecoderConfig.from_huggingface(json.loads(str(golden(name)["config"])), **changes)
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    table = key_table(config)
    return nnx.split(load_params(decoder, table, group(name, "param/")))


def make(name="llama3", **changes):
    """Returns the decoder of a golden file."""
    graph, state = loaded(name, **changes)
    return nnx.merge(graph, jax.device_put(jax.tree.map(np.array, state)))


@nnx.jit(static_argnames="output_hidden_states")
def run(decoder, ids=None, mask=None, output_hidden_states=False, **options):
    return decoder(ids, mask, output_hidden_states=output_hidden_states, **options)


def state_by_path(module, kind):
    state = nnx.to_flat_state(nnx.state(module, kind))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in state}


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_equals_the_golden_file(name):
    inputs = group(name, "in/")
    mask = inputs["attention_mask"]
    outputs = run(make(name), inputs["input_ids"], mask, output_hidden_states=True)
    last, states = map(np.asarray, outputs)
    expected = golden(name)["out/hidden_states"]
    assert states.shape == expected.shape
    for layer, expected_layer in zip(states, expected, strict=True):
        np.testing.assert_allclose(layer[mask], expected_layer[mask], atol=1e-4)
    np.testing.assert_array_equal(last, states[-1])


def test_bfloat16_is_close_to_float32():
    outputs = run(make(dtype="bfloat16", param_dtype="bfloat16"), IDS, MASK)
    assert outputs.dtype == jnp.bfloat16
    expected = np.asarray(run(make(), IDS, MASK))[MASK]
    error = np.linalg.norm(np.asarray(outputs, np.float32)[MASK] - expected)
    assert error < 2e-2 * np.linalg.norm(expected)


def test_int8_is_close_to_float32():
    expected = np.asarray(run(make(), IDS, MASK))[MASK]
    outputs = np.asarray(run(quantize(make()), IDS, MASK))[MASK]
    assert 0 < np.linalg.norm(outputs - expected) < 0.05 * np.linalg.norm(expected)


def test_padding_on_either_side_does_not_change_outputs():
    padded = np.asarray(run(make(), IDS, MASK))
    alone = np.asarray(run(make(), np.stack([IDS[1, :5], IDS[2, 3:]])))
    np.testing.assert_allclose(padded[1, :5], alone[0], atol=1e-5)
    np.testing.assert_allclose(padded[2, 3:], alone[1], atol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_values_in_padding_change_neither_outputs_nor_gradients(garbage):
    @nnx.jit
    def outputs_and_gradients(decoder, embeddings):
        def total(decoder, embeddings):
            last = decoder(embeddings=embeddings, attention_mask=MASK)
            return jnp.sum(jnp.where(MASK[..., None], last, 0) ** 2), last

        return nnx.grad(total, argnums=(0, 1), has_aux=True)(decoder, embeddings)

    embeddings = np.random.default_rng(0).normal(size=(*MASK.shape, 16)).astype(np.float32)
    dirty = np.where(MASK[..., None], embeddings, garbage)
    clean, expected = outputs_and_gradients(make(), embeddings)
    gradients, last = outputs_and_gradients(make(), dirty)
    np.testing.assert_array_equal(last, expected)
    jax.tree.map(np.testing.assert_array_equal, gradients, clean)


def test_a_row_without_tokens_has_finite_outputs():
    mask = MASK & [[True], [False], [True]]
    last, states = map(np.asarray, run(make(), IDS, mask, output_hidden_states=True))
    assert np.isfinite(last).all() and np.isfinite(states).all()
    np.testing.assert_allclose(last[2], np.asarray(run(make(), IDS, MASK))[2], atol=1e-5)


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_packed_sequences_equal_separate_ones(name):
    rows = np.zeros((3, 8), int)
    rows[0, :3], rows[1, :4], rows[2, :1] = IDS[0, :3], IDS[0, 3:7], IDS[0, 7]
    lengths = np.array([3, 4, 1])
    separate = np.asarray(run(make(name), rows, np.arange(8) < lengths[:, None]))
    segments = np.repeat([7, 2, 7], lengths)[None]
    packed = np.asarray(run(make(name), IDS[:1], segment_ids=segments))[0]
    for row, end in enumerate(np.cumsum(lengths)):
        sequence = packed[end - lengths[row] : end]
        np.testing.assert_allclose(sequence, separate[row, : lengths[row]], atol=1e-5)
    # Padding on the left does not change the outputs.
    padded = np.pad(IDS[:1], ((0, 0), (2, 0)), constant_values=9)
    mask, segments = np.arange(10)[None] >= 2, np.pad(segments, ((0, 0), (2, 0)))
    after_padding = np.asarray(run(make(name), padded, mask, segment_ids=segments))[0, 2:]
    np.testing.assert_allclose(after_padding, packed, atol=1e-5)


def test_a_token_does_not_attend_to_later_tokens():
    changed = IDS.copy()
    changed[:, 4:] = (changed[:, 4:] + 1) % 24
    full_mask = np.ones_like(MASK)
    first, second = (run(make(), ids, full_mask) for ids in (IDS, changed))
    np.testing.assert_array_equal(first[:, :4], second[:, :4])
    assert not np.allclose(first[:, 4:], second[:, 4:], atol=1e-2)


def test_embeddings_can_replace_tokens():
    decoder = make("qwen2")
    outputs = run(decoder, embeddings=decoder.embed(IDS), mask=MASK)
    np.testing.assert_array_equal(outputs, run(decoder, IDS, MASK))


def test_default_positions_count_the_tokens_before():
    counted = np.maximum(np.cumsum(MASK, axis=1) - 1, 0)
    expected = np.asarray(run(make(), IDS, MASK))[MASK]
    outputs = np.asarray(run(make(), IDS, MASK, positions=counted))
    np.testing.assert_allclose(outputs[MASK], expected, atol=1e-5)
    stretched = np.asarray(run(make(), IDS, MASK, positions=3 * counted))
    assert not np.allclose(stretched[MASK], expected, atol=1e-2)


def test_neither_or_both_of_ids_and_embeddings_are_rejected():
    decoder = make()
    for inputs in ({}, {"input_ids": IDS, "embeddings": decoder.embed(IDS)}):
        with pytest.raises(ValueError, match="pass either input_ids or embeddings"):
            decoder(**inputs)


@pytest.mark.devices
def test_sharded_parameters_do_not_change_outputs():
    mesh = data_mesh(model_parallelism=2)
    rules = (
        (r"(query|key|value|gate|up)/kernel", (None, None, "model")),
        (r"(out|down)/kernel", (None, "model", None)),
        (r"embedding", ("model", None)),
    )
    graph, state = nnx.split(make())
    state = jax.device_put(state, shardings(state, mesh, rules))
    kernel = state["layers"]["layers"]["mlp"]["up"]["kernel"][...]
    assert kernel.addressable_data(0).shape == (2, 16, 10)
    outputs = run(nnx.merge(graph, state), IDS, MASK)
    np.testing.assert_allclose(outputs, run(make(), IDS, MASK), atol=1e-5)


def test_training_lora_does_not_change_the_base():
    options = {"lora": LORA, "remat": "dots", "param_dtype": "bfloat16"}
    decoder = nnx.merge(*loaded("qwen2", **options))
    add_lora(decoder, LORA, rngs=nnx.Rngs(0))  # Replaces the abstract low-rank paths.
    assert {path.split("/")[-2] for path in state_by_path(decoder, nnx.LoRAParam)} == set(
        LORA.targets
    )
    before = state_by_path(decoder, nnx.Not(nnx.LoRAParam))
    optimizer = nnx.Optimizer(decoder, optax.adam(0.1), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(decoder, optimizer, key):
        def loss(decoder):
            options = {"deterministic": False, "rngs": nnx.Rngs(dropout=key)}
            return jnp.sum(jnp.where(MASK[..., None], decoder(IDS, MASK, **options), 0) ** 2)

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        optimizer.update(decoder, nnx.grad(loss, argnums=wrt)(decoder))

    expected = run(decoder, IDS, MASK)
    step(decoder, optimizer, jax.random.key(0))
    jax.tree.map(
        np.testing.assert_array_equal, state_by_path(decoder, nnx.Not(nnx.LoRAParam)), before
    )
    assert all(value.any() for value in state_by_path(decoder, nnx.LoRAParam).values())
    assert not np.allclose(run(decoder, IDS, MASK), expected, atol=1e-2)


def test_unknown_lora_targets_are_rejected():
    lora = LoRAConfig(rank=2, alpha=4, targets=("q_proj",))
    config = dataclasses.replace(make().config, lora=lora)
    with pytest.raises(ValueError, match=r"\['q_proj'\].*'down', 'gate', 'key', 'out', 'query'"):
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


NUM_PARAMETERS = {  # As released, without a separate language-model head.
    "llama_3_1_8b": 8_030_261_248 - 128256 * 4096,
    "llama_3_2_1b": 1_235_814_400,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_7b": 7_615_616_512 - 152064 * 3584,
    "vicuna_7b": 6_738_415_616 - 32000 * 4096,
}


@pytest.mark.parametrize("preset", NUM_PARAMETERS)
def test_presets_have_the_released_number_of_parameters(preset):
    config = getattr(DecoderConfig, preset)()
    shapes = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == NUM_PARAMETERS[preset]


LLAMA_3_1 = {
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
QWEN2_5 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
VICUNA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "vocab_size": 32000,
}


def test_presets_equal_the_released_configs():
    assert DecoderConfig.from_huggingface(LLAMA_3_1) == DecoderConfig.llama_3_1_8b()
    assert DecoderConfig.from_huggingface(QWEN2_5) == DecoderConfig.qwen2_5_7b()
    assert DecoderConfig.from_huggingface(VICUNA) == DecoderConfig.vicuna_7b()
    in_bfloat16 = DecoderConfig.from_huggingface(VICUNA, dtype="bfloat16")
    assert in_bfloat16 == DecoderConfig.vicuna_7b(dtype="bfloat16")


def test_rope_parameters_of_transformers_5_are_read():
    config = {**LLAMA_3_1, "head_dim": 128}
    scaling, theta = config.pop("rope_scaling"), config.pop("rope_theta")
    config["rope_parameters"] = {**scaling, "rope_theta": theta}
    assert DecoderConfig.from_huggingface(config) == DecoderConfig.llama_3_1_8b()
    # In older configs, `rope_scaling` has `type` instead of `rope_type`, and lacks the number of
    # positions.
    scaling = {"type" if name == "rope_type" else name: value for name, value in scaling.items()}
    del scaling["original_max_position_embeddings"]
    old = {**LLAMA_3_1, "rope_scaling": scaling, "max_position_embeddings": 8192}
    assert DecoderConfig.from_huggingface(old) == DecoderConfig.llama_3_1_8b()


@pytest.mark.parametrize("field", ["num_key_value_heads", "rope_theta", "hidden_size"])
def test_absent_fields_have_the_defaults_of_transformers(field):
    config = {name: value for name, value in VICUNA.items() if name != field}
    assert DecoderConfig.from_huggingface(config) == DecoderConfig.vicuna_7b()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model_type", {"model_type": "mistral"}),
        ("model_type", {"model_type": None}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("attention_bias", {"attention_bias": True}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("use_sliding_window", {"use_sliding_window": True, "max_window_layers": 20}),
        ("layer_types", {"layer_types": ["sliding_attention"] * 28}),
        ("rope_scaling.rope_type", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("rope_parameters.rope_type", {"rope_parameters": {"rope_type": "yarn"}}),
        ("rope_parameters.factor", {"rope_parameters": {"rope_type": "llama3"}}),
        ("rope_parameters", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        ("hidden_size", {"hidden_size": "large"}),
        ("hidden_size", {"hidden_size": 3583}),
        ("hidden_size", {"hidden_size": float("inf")}),
        ("num_layers", {"num_hidden_layers": 0}),
        ("num_attention_heads", {"num_attention_heads": 1.5}),
        ("num_heads", {"num_attention_heads": 28, "num_key_value_heads": 5}),
    ],
)
def test_unsupported_configs_are_rejected(field, changes):
    with pytest.raises(InputError, match=rf"^config.json: .*\b{re.escape(field)}="):
        DecoderConfig.from_huggingface({**QWEN2_5, **changes})


def test_a_sliding_window_that_no_layer_uses_is_allowed():
    for changes in ({"sliding_window": None}, {"max_window_layers": 28}):
        config = {**QWEN2_5, "use_sliding_window": True, **changes}
        assert DecoderConfig.from_huggingface(config) == DecoderConfig.qwen2_5_7b()


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 0), ("num_key_value_heads", 3), ("head_dim", 5), ("rope_theta", 0.0)],
)
def test_invalid_sizes_are_rejected(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        DecoderConfig.llama_3_2_1b(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("factor", 0.5), ("low_frequency_factor", 4.0), ("original_positions", 0)]
)
def test_invalid_rope_scaling_is_rejected(field, value):
    with pytest.raises(ValueError, match=f"RopeScaling.{field}={value}"):
        RopeScaling(**{"factor": 8.0, field: value})


def test_rope_scaling_slows_only_slow_rotations():
    plain = rope_frequencies(128, 500000.0)
    scaled = rope_frequencies(128, 500000.0, RopeScaling(factor=8.0))
    wavelengths = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelengths < 2048], plain[wavelengths < 2048])
    slow = wavelengths > 8192
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    between = ~slow & (wavelengths > 2048)
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


@pytest.mark.parametrize("prefix", NAME_RULES.prefixes)
def test_checkpoints_with_any_prefix_are_read(prefix):
    tensors = {f"{prefix}{name}": value for name, value in group("qwen2", "param/").items()}
    tensors["lm_head.weight"] = np.zeros((24, 16), np.float32)
    tensors[f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    expected = make("qwen2")
    decoder = nnx.eval_shape(lambda: Decoder(expected.config, rngs=nnx.Rngs(0)))
    head = load_backbone(decoder, key_table(decoder.config), tensors, NAME_RULES)
    assert set(head) == {"lm_head.weight"}
    jax.tree.map(np.testing.assert_array_equal, nnx.state(decoder), nnx.state(expected))


def load_from(model, **changes):
    config = DecoderConfig.from_huggingface(model.config.to_dict(), **changes)
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    tensors = {name: value.float().numpy() for name, value in model.state_dict().items()}
    load_backbone(decoder, key_table(config), tensors, NAME_RULES)
    return decoder


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "tied"), [("llama3", True), ("llama2", False), ("qwen2", True), ("qwen2", False)]
)
def test_every_layer_equals_transformers(name, tied):
    from tests.golden import make_decoder

    model = make_decoder.huggingface_model(name, causal_lm=True, tie_word_embeddings=tied)
    inputs = make_decoder.batch()
    mask = inputs["attention_mask"]
    expected = make_decoder.hidden_states(model, inputs)
    _, states = run(load_from(model), inputs["input_ids"], mask, output_hidden_states=True)
    for layer, expected_layer in zip(states, expected, strict=True):
        np.testing.assert_allclose(layer[mask], expected_layer[mask], atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_close_to_transformers_in_bfloat16(name):
    from tests.golden import make_decoder

    model = make_decoder.huggingface_model(name, causal_lm=True).bfloat16()
    inputs = make_decoder.batch()
    mask = inputs["attention_mask"]
    expected = make_decoder.hidden_states(model, inputs)
    decoder = load_from(model, dtype="bfloat16", param_dtype="bfloat16")
    _, states = run(decoder, inputs["input_ids"], mask, output_hidden_states=True)
    for layer, expected_layer in zip(np.asarray(states, np.float32), expected, strict=True):
        # The error is relative to the norm of the layer's hidden states.
        error = np.linalg.norm(layer[mask] - expected_layer[mask])
        assert error < 2e-2 * np.linalg.norm(expected_layer[mask])


@pytest.mark.parity
def test_rope_frequencies_equal_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**LLAMA_3_1)
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    preset = DecoderConfig.llama_3_1_8b()
    frequencies = rope_frequencies(preset.head_dim, preset.rope_theta, preset.rope_scaling)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-6)
    assert scale == 1
