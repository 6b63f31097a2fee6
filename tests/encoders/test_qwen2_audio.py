"""Qwen2-Audio compared with transformers (golden/qwen2_audio.npz)."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.convert.params import load_backbone, save_params
from mister_jax.encoders import qwen2_audio
from mister_jax.encoders.qwen2_audio import Qwen2Audio, Qwen2AudioConfig, prompt_tokens
from mister_jax.encoders.whisper import WhisperConfig
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig, add_lora
from tests.helpers.golden import GOLDEN, read_golden


def nest_groups(arrays):
    """Nests arrays named "group/name" by group."""
    groups = {}
    for path, value in arrays.items():
        group, _, name = path.partition("/")
        groups.setdefault(group, {})[name] = value
    return groups


@pytest.fixture(scope="module")
def golden():
    return nest_groups(read_golden("qwen2_audio"))


@pytest.fixture(scope="module")
def hf_config(golden):
    return json.loads(str(golden["config"][""]))


@pytest.fixture(scope="module")
def config(hf_config):
    return Qwen2AudioConfig.from_huggingface(hf_config)


def load(config, weights):
    model = nnx.eval_shape(lambda: Qwen2Audio(config, rngs=nnx.Rngs(0)))
    load_backbone(model, qwen2_audio.key_table(config), weights, qwen2_audio.NAME_RULES)
    return model


@pytest.fixture(scope="module")
def model(config, golden):
    return load(config, golden["param"])


@pytest.fixture(scope="module")
def batch(golden):
    """Returns waveforms, lengths, prompts and their mask."""
    inputs = golden["in"]
    return (
        inputs["waveform"].astype(np.float32) / 2**7,
        inputs["lengths"],
        inputs["prompt"],
        inputs["prompt_mask"],
    )


@nnx.jit
def run(model, *batch):
    return model(*batch)


@pytest.fixture(scope="module")
def output(model, batch):
    return jax.tree.map(np.asarray, run(model, *batch))


def valid(output, row):
    return np.asarray(output.hidden_states)[row][np.asarray(output.mask)[row]]


def check(output, expected):
    """Checks that the masks and the valid hidden states equal those of transformers."""
    length = expected["mask"].shape[1]
    np.testing.assert_array_equal(output.mask[:, :length], expected["mask"])
    np.testing.assert_array_equal(output.audio_mask[:, :length], expected["audio_mask"])
    assert not output.mask[:, length:].any()
    inside = expected["mask"]
    np.testing.assert_allclose(
        output.hidden_states[:, :length][inside], expected["hidden"][inside], atol=1e-4
    )


def test_hidden_states_equal_transformers(output, golden):
    check(output, golden["out"])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_golden_file_equals_the_installed_transformers(golden):
    spec = importlib.util.spec_from_file_location("make", GOLDEN / "make_qwen2_audio.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    fresh = nest_groups(make.make())
    config = Qwen2AudioConfig.from_huggingface(json.loads(str(fresh["config"][""])))
    inputs = fresh["in"]
    output = run(
        load(config, fresh["param"]),
        inputs["waveform"].astype(np.float32) / 2**7,
        inputs["lengths"],
        inputs["prompt"],
        inputs["prompt_mask"],
    )
    check(jax.tree.map(np.asarray, output), fresh["out"])
    np.testing.assert_allclose(fresh["out"]["hidden"], golden["out"]["hidden"], atol=1e-5)


def test_batch_and_padding_do_not_change_hidden_states(model, batch, output):
    waveform, lengths, prompt, prompt_mask = batch
    row, samples, tokens = 1, lengths[1], prompt_mask[1].sum()
    assert samples < waveform.shape[1] and tokens < prompt.shape[1]
    single = run(
        model,
        waveform[row : row + 1, :samples],
        lengths[row : row + 1],
        prompt[row : row + 1, :tokens],
        prompt_mask[row : row + 1, :tokens],
    )
    assert single.mask.sum() == output.mask[row].sum()
    np.testing.assert_allclose(valid(single, 0), valid(output, row), atol=1e-5)


def test_content_of_padding_does_not_change_hidden_states(model, batch, output, config):
    waveform, lengths, prompt, prompt_mask = batch
    is_padding = np.arange(waveform.shape[1]) >= lengths[:, None]
    changed_output = run(
        model,
        np.where(is_padding, np.nan, waveform),
        lengths,
        np.where(prompt_mask, prompt, config.placeholder),
        prompt_mask,
    )
    np.testing.assert_array_equal(changed_output.mask, output.mask)
    np.testing.assert_array_equal(changed_output.audio_mask, output.audio_mask)
    for row in range(len(lengths)):
        np.testing.assert_allclose(valid(changed_output, row), valid(output, row), atol=1e-6)


def test_left_padded_prompts_give_the_same_hidden_states(model, batch, output):
    waveform, lengths, prompt, prompt_mask = batch
    left_padded = [
        np.stack([np.roll(row, -count) for row, count in zip(rows, counts, strict=True)])
        for counts in [prompt_mask.sum(1)]
        for rows in (prompt, prompt_mask)
    ]
    shifted_output = run(model, waveform, lengths, *left_padded)
    np.testing.assert_array_equal(shifted_output.mask, output.mask)
    for row in range(len(lengths)):
        np.testing.assert_allclose(valid(shifted_output, row), valid(output, row), atol=1e-5)


def test_lora_of_the_language_model_gets_gradients_and_the_tower_has_no_lora(config, golden, batch):
    model = load(config, golden["param"])
    lora = LoRAConfig(rank=2, alpha=4, targets=("query", "key"))
    add_lora(model.decoder, lora, rngs=nnx.Rngs(0))
    low_rank = nnx.state(model, nnx.LoRAParam)
    assert set(low_rank) == {"decoder"}

    @nnx.jit
    def gradient(model):
        graph, lora_params, rest = nnx.split(model, nnx.LoRAParam, ...)

        def loss(lora_params):
            output = nnx.merge(graph, lora_params, rest)(*batch)
            return jnp.sum(jnp.where(output.mask[..., None], output.hidden_states, 0) ** 2)

        return jax.grad(loss)(lora_params)

    second = gradient(model)["decoder"]["layers"]["layers"]["attention"]["query"]["lora_b"]
    second = np.asarray(second[...])
    assert np.isfinite(second).all() and (second != 0).any(axis=(1, 2)).all()


def test_saved_weights_equal_the_loaded_weights(model, config, golden):
    saved = save_params(model, qwen2_audio.key_table(config))
    assert set(golden["param"]) - set(saved) == {"language_model.lm_head.weight"}
    for name, tensor in saved.items():
        np.testing.assert_array_equal(tensor[...], golden["param"][name], err_msg=name)


def test_missing_and_unexpected_tensors_raise_an_error_that_names_them(config, golden):
    weights = dict(golden["param"], unexpected=np.zeros(2, np.float32))
    del weights["multi_modal_projector.linear.bias"]
    with pytest.raises(
        InputError, match=r"missing: multi_modal_projector\.linear\.bias.*unexpected"
    ):
        load(config, weights)


def test_released_config_equals_the_preset():
    released = {
        "model_type": "qwen2_audio",
        "audio_token_index": 151646,
        "audio_config": {"model_type": "qwen2_audio_encoder", "encoder_layers": 32},
        "text_config": {
            "model_type": "qwen2",
            "intermediate_size": 11008,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000,
            "vocab_size": 156032,
        },
    }
    assert Qwen2AudioConfig.from_huggingface(released) == Qwen2AudioConfig.qwen2_audio_7b()
    bfloat16_config = Qwen2AudioConfig.qwen2_audio_7b(dtype="bfloat16", param_dtype="bfloat16")
    shapes = nnx.state(nnx.eval_shape(lambda: Qwen2Audio(bfloat16_config, rngs=nnx.Rngs(0))))
    sizes = [leaf.size for leaf in jax.tree.leaves(shapes) if leaf.dtype == jnp.bfloat16]
    # The checkpoint has 8,397,094,912 parameters, including the language-model head.
    assert sum(sizes) == 8_397_094_912 - 156032 * 4096


def test_changes_apply_to_the_parts(hf_config):
    lora = LoRAConfig(rank=2, alpha=4)
    config = Qwen2AudioConfig.from_huggingface(hf_config, dtype="bfloat16", lora=lora)
    assert (config.tower.dtype, config.decoder.dtype) == ("bfloat16", "bfloat16")
    assert (config.tower.lora, config.decoder.lora) == (None, lora)
    assert config.vocab_size == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'; allowed: 'qwen2_audio'"),
        ({"audio_config": {"model_type": "hubert"}}, "audio_config.model_type='hubert'"),
        ({"audio_config": {"d_model": 15}}, "15"),
        ({"audio_token_index": None}, "audio_token_index=None; allowed: an integer"),
        ({"text_config": 3}, "text_config=3"),
    ],
)
def test_unsupported_options_raise_an_error_that_names_them(hf_config, change, message):
    with pytest.raises(InputError, match=message):
        Qwen2AudioConfig.from_huggingface(hf_config | change)


def test_tower_without_trim_raises_an_error(config):
    with pytest.raises(ValueError, match="trim=False; allowed: True"):
        Qwen2AudioConfig(WhisperConfig.tiny(trim=False), config.decoder)


def test_prompt_with_several_placeholders_raises_an_error(config):
    def tokenizer(text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [config.placeholder if word == "A" else 1 for word in text.split()]}

    assert prompt_tokens(tokenizer, "hear A now", config) == [1, config.placeholder, 1]
    with pytest.raises(InputError, match="2 tokens 29"):
        prompt_tokens(tokenizer, "A or A", config)
