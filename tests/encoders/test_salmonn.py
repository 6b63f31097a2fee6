"""SALMONN: parity of its Q-Former (golden/salmonn_qformer.npz), loading, masks and gradients."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.convert.params import load_params, save_params
from mister_jax.encoders import beats, decoder, salmonn, whisper
from mister_jax.encoders.beats import BeatsConfig
from mister_jax.encoders.decoder import Decoder, DecoderConfig
from mister_jax.encoders.salmonn import (
    QFormerConfig,
    Salmonn,
    SalmonnConfig,
    WindowQFormer,
    prompt_tokens,
)
from mister_jax.encoders.whisper import Whisper, WhisperConfig
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig
from tests.helpers.golden import read_golden

LLM = "llama_model.base_model.model.model"
LENGTHS = np.array([40000, 9000, 21000])  # above the window, below the minimum, in between
PROMPT = np.array([[1, 5, 6, -1, 7, 8], [1, -1, 9, 0, 0, 0], [1, 2, 3, 4, -1, 0]])
PROMPT_MASK = np.arange(6) < np.array([[6], [3], [5]])


@pytest.fixture(scope="module")
def golden():
    return read_golden("salmonn_qformer")


@pytest.fixture(scope="module")
def golden_beats():
    return read_golden("salmonn_beats")


@pytest.fixture(scope="module")
def qformer_config(golden):
    sizes = json.loads(str(golden["config"]))
    return QFormerConfig(
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        mlp_dim=sizes["intermediate_size"],
    )


@pytest.fixture(scope="module")
def config(qformer_config, golden_beats):
    """Returns a config with the sizes of the golden weights and a Whisper of two seconds."""
    lora = LoRAConfig(rank=2, alpha=8, targets=("query", "value"))
    return SalmonnConfig(
        whisper=WhisperConfig(8, 24, 1, 2, 16, max_positions=100, trim=False),
        beats=BeatsConfig.from_checkpoint(json.loads(str(golden_beats["config"]))),
        qformer=qformer_config,
        decoder=DecoderConfig(
            vocab_size=10,
            hidden_size=40,
            mlp_dim=16,
            num_layers=2,
            num_heads=4,
            num_key_value_heads=4,
            head_dim=10,
            lora=lora,
        ),
    )


def saved(module, table, prefix=""):
    return {name: value[...] for name, value in save_params(module, table, prefix=prefix).items()}


@pytest.fixture(scope="module")
def checkpoints(config):
    """Returns the tensors of the four files, with golden and random weights."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.normal(scale=0.5, size=shape).astype(np.float32)

    salmonn = read_golden("salmonn_qformer", "param/") | {
        "speech_Qformer.bert.embeddings.position_ids": np.arange(512)[None],
        "beats.encoder.layers.1.self_attn.relative_attention_bias.weight": normal(320, 4),
        f"{LLM}.layers.0.self_attn.rotary_emb.inv_freq": normal(5),
    }
    rank, hidden_size = config.decoder.lora.rank, config.decoder.hidden_size
    for layer in range(config.decoder.num_layers):
        for name in ("q_proj", "v_proj"):
            start = f"{LLM}.layers.{layer}.self_attn.{name}"
            salmonn[f"{start}.lora_A.default.weight"] = normal(rank, hidden_size)
            salmonn[f"{start}.lora_B.default.weight"] = normal(hidden_size, rank)
    optimizer = {"optimizer.state.0.exp_avg": normal(3)}
    plain = dataclasses.replace(config.decoder, lora=None)
    return {
        "whisper": saved(
            nnx.jit(lambda: Whisper(config.whisper, rngs=nnx.Rngs(1)))(),
            whisper.key_table(config.whisper),
            prefix="model.",
        ),
        "beats": {
            f"model.{name}": value for name, value in read_golden("salmonn_beats", "param/").items()
        },
        "vicuna": saved(
            nnx.jit(lambda: Decoder(plain, rngs=nnx.Rngs(2)))(), decoder.key_table(plain, "model.")
        ),
        "salmonn": {f"model.{name}": value for name, value in salmonn.items()} | optimizer,
    }


def abstract(config):
    return nnx.eval_shape(lambda: Salmonn(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model(config, checkpoints):
    return salmonn.load_salmonn(abstract(config), **checkpoints)


@pytest.fixture(scope="module")
def qformer(model):
    return model.qformer


@nnx.jit
def run(model, *inputs):
    return model(*inputs)


@pytest.fixture(scope="module")
def waveform():
    noise = np.random.default_rng(3).normal(scale=0.1, size=(3, LENGTHS.max()))
    return np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], noise, 0).astype(np.float32)


@pytest.fixture(scope="module")
def output(model, waveform):
    return jax.tree.map(np.asarray, run(model, waveform, LENGTHS, PROMPT, PROMPT_MASK))


def valid(output, row):
    return np.asarray(output.hidden_states)[row][np.asarray(output.mask)[row]]


@pytest.mark.parametrize("case", ["", "b/", "full/"])
def test_speech_tokens_equal_the_official_model(qformer, golden, case):
    speech, sound = golden[f"{case}in/speech_embeds"], golden[f"{case}in/audio_embeds"]
    tokens = run(qformer, speech, sound, np.ones(sound.shape[:2], bool))
    np.testing.assert_allclose(tokens, golden[f"{case}out/speech_tokens"], atol=3e-5)


def test_speech_tokens_of_waveforms_equal_the_official_model(model, qformer, golden, golden_beats):
    fbank = beats.compute_fbank(jnp.asarray(golden_beats["in/wav"]), model.config.beats)
    sound = run(model.beats, fbank, ~golden_beats["out/padding_mask"])
    tokens = run(qformer, golden["in/speech_embeds"], sound, np.ones(sound.shape[:2], bool))
    np.testing.assert_allclose(tokens, golden["out/speech_tokens"], atol=1e-4)


def test_masked_sound_does_not_change_the_tokens(qformer, golden):
    speech, sound = golden["in/speech_embeds"], golden["in/audio_embeds"].copy()
    expected = run(qformer, speech, sound[:, :30], np.ones((2, 30), bool))
    sound[:, 30:] = 1e30
    tokens = run(qformer, speech, sound, np.arange(sound.shape[1])[None].repeat(2, 0) < 30)
    np.testing.assert_allclose(tokens, expected, atol=1e-6)


def test_overlapping_windows_with_several_queries_are_shift_invariant(qformer_config):
    config = dataclasses.replace(qformer_config, num_queries=3, window=4, stride=2)
    module = nnx.jit(lambda: WindowQFormer(5, 6, 7, config, rngs=nnx.Rngs(0)))()
    random = np.random.default_rng(0)
    speech, sound = (random.normal(size=(2, 11, dim)).astype(np.float32) for dim in (5, 6))
    mask = np.ones((2, 11), bool)
    tokens = np.asarray(run(module, speech, sound, mask))
    assert tokens.shape == (2, config.num_tokens(11), 7) == (2, 12, 7)
    # Shifting the input by one stride shifts the output by one window.
    shifted = np.asarray(run(module, np.roll(speech, -2, 1), np.roll(sound, -2, 1), mask))
    np.testing.assert_allclose(shifted[:, :9], tokens[:, 3:], atol=1e-5)


@nnx.jit
def run_parts(model, clip, before, after):
    """Returns the hidden states of one clip that needs neither padding nor truncation."""
    speech, _ = model.whisper(clip, jnp.array([clip.shape[1]]))
    fbank = beats.compute_fbank(clip, model.config.beats)
    token_mask = jnp.ones((1, model.config.beats.num_tokens(fbank.shape[1])), bool)
    speech_tokens = model.qformer(speech, model.beats(fbank, token_mask), token_mask)
    sequence = [model.decoder.embed(before), speech_tokens, model.decoder.embed(after)]
    return model.decoder(embeddings=jnp.concatenate(sequence, axis=1))


@pytest.mark.parametrize(("row", "num_samples"), [(0, 32000), (1, 16000)])
def test_hidden_states_equal_the_parts_run_in_sequence(
    model, config, waveform, output, row, num_samples
):
    prompt = PROMPT[row][PROMPT_MASK[row]]
    place = prompt.tolist().index(config.placeholder)
    before, after = prompt[None, :place], prompt[None, place + 1 :]
    expected = run_parts(model, waveform[row : row + 1, :num_samples], before, after)[0]
    np.testing.assert_allclose(valid(output, row), expected, atol=2e-5)
    assert config.qformer.num_tokens(config.whisper.max_positions) == 5
    np.testing.assert_array_equal(np.flatnonzero(output.audio_mask[row]), place + np.arange(5))
    assert output.mask[row, : len(expected)].all()


def test_batch_and_padding_do_not_change_hidden_states(model, waveform, output):
    padded = np.pad(waveform, ((0, 0), (0, 3000)))
    padded[np.arange(padded.shape[1]) >= LENGTHS[:, None]] = np.nan
    prompt = np.pad(np.where(PROMPT_MASK, PROMPT, -1), ((0, 0), (0, 2)), constant_values=-1)
    mask = np.pad(PROMPT_MASK, ((0, 0), (0, 2)))
    with_nan = run(model, padded[1:], LENGTHS[1:], prompt[1:], mask[1:])
    assert with_nan.hidden_states.shape[1] == output.hidden_states.shape[1] + 2
    for row in (1, 2):
        np.testing.assert_allclose(valid(with_nan, row - 1), valid(output, row), atol=1e-5)
    short = waveform[1:2, : LENGTHS[1]]  # shorter than the minimum
    single = run(model, short, LENGTHS[1:2], PROMPT[1:2], PROMPT_MASK[1:2])
    np.testing.assert_allclose(valid(single, 0), valid(output, 1), atol=1e-5)


def test_released_lora_equals_lora_merged_into_queries_and_values(model, config, checkpoints):
    weights = dict(checkpoints["vicuna"])
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            start = f"model.{LLM}.layers.{layer}.self_attn.{name}"
            first, second = (
                checkpoints["salmonn"][f"{start}.lora_{side}.default.weight"] for side in "AB"
            )
            base = f"model.layers.{layer}.self_attn.{name}.weight"
            weights[base] = weights[base] + 4 * second @ first
    plain = dataclasses.replace(config.decoder, lora=None)
    merged = load_params(
        nnx.eval_shape(lambda: Decoder(plain, rngs=nnx.Rngs(0))),
        decoder.key_table(plain, "model."),
        weights,
    )
    tokens = np.arange(10)[None]
    np.testing.assert_allclose(run(model.decoder, tokens), run(merged, tokens), atol=1e-4)


def test_lora_gets_gradients_that_do_not_depend_on_padding(model, waveform):
    is_padding = np.arange(waveform.shape[1]) >= LENGTHS[:, None]

    @nnx.jit
    def gradient(model, waveform):
        graph, lora_params, rest = nnx.split(model, nnx.LoRAParam, ...)

        def loss(lora_params):
            output = nnx.merge(graph, lora_params, rest)(waveform, LENGTHS, PROMPT, PROMPT_MASK)
            return jnp.sum(jnp.where(output.mask[..., None], output.hidden_states, 0) ** 2)

        return jax.grad(loss)(lora_params)

    with_zeros, with_nan = (
        gradient(model, waveform),
        gradient(model, np.where(is_padding, np.nan, waveform)),
    )
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(with_zeros))
    chex.assert_trees_all_close(with_nan, with_zeros, rtol=1e-4, atol=1e-4)


def test_unfit_tensors_raise_an_error_that_names_them(config, checkpoints):
    def load(part, **changes):
        tensors = {**checkpoints[part], **changes}
        tensors = {name: value for name, value in tensors.items() if value is not None}
        salmonn.load_salmonn(abstract(config), **{**checkpoints, part: tensors})

    lora = f"model.{LLM}.layers.1.self_attn.v_proj.lora_B.default.weight"
    wrong = {lora: None, "model.ln_speech.bias": None, "model.unexpected": np.zeros(1)}
    with pytest.raises(InputError) as error:
        load("salmonn", **wrong)
    for name in wrong:
        assert name in str(error.value)
    with pytest.raises(InputError, match=r"encoder\.conv1\.bias"):
        load("whisper", **{"model.encoder.conv1.bias": None})
    with pytest.raises(InputError, match="predictors"):
        load("beats", **{"model.predictors": np.zeros(1)})
    with pytest.raises(InputError, match=r"norm\.weight .*41.* instead of .*40"):
        load("vicuna", **{"model.norm.weight": np.zeros(41)})


def test_trained_parameters_are_saved_under_the_released_names(model, checkpoints):
    tensors = save_params(
        model,
        salmonn.key_table(model.config),
        prefix=salmonn.PREFIX,
        skip=nnx.Not(salmonn.TRAINED_PARAMS),
    )
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor[...], checkpoints["salmonn"][name], err_msg=name)
    rest = set(checkpoints["salmonn"]) - set(tensors)
    assert len(rest) == 4 and not any("lora" in name or "bert.encoder" in name for name in rest)


def test_presets_have_the_released_sizes():
    for preset, num_trained, num_layers in (
        (SalmonnConfig.salmonn_7b, 30_186_240, 32),
        (SalmonnConfig.salmonn_13b, 33_332_992, 40),
    ):
        config = preset(dtype="bfloat16", param_dtype="bfloat16")
        assert (
            config.qformer.num_tokens(config.whisper.max_positions) == 88
            and config.decoder.num_layers == num_layers
        )
        state = nnx.state(abstract(config), salmonn.TRAINED_PARAMS)
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) == num_trained
        for part in (config.whisper, config.beats, config.qformer, config.decoder):
            assert (part.dtype, part.param_dtype) == ("bfloat16", "bfloat16")


def test_unsupported_options_raise_an_error_that_names_them(config):
    with pytest.raises(ValueError, match=r"whisper\.trim=True; allowed: False"):
        dataclasses.replace(config, whisper=WhisperConfig.tiny(trim=True))
    with pytest.raises(ValueError, match="min_samples=32001; allowed: at most 32000"):
        dataclasses.replace(config, min_samples=32001)
    with pytest.raises(ValueError, match="hidden_size=10; allowed: multiples of num_heads=4"):
        QFormerConfig(hidden_size=10, num_heads=4)


def test_prompt_is_inserted_into_the_template(config):
    class Tokenizer:
        bos_token_id = 1

        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [ord(letter) for letter in text]}

    bos, *tokens = prompt_tokens(Tokenizer(), "Who speaks?", config)
    assert bos == 1
    place = tokens.index(config.placeholder)
    assert "".join(map(chr, tokens[:place])) == "USER: <Speech>"
    assert "".join(map(chr, tokens[place + 1 :])) == "</Speech> Who speaks?\nASSISTANT:"
    Tokenizer.bos_token_id = None
    with pytest.raises(InputError, match="tokenizer without bos_token; allowed: Vicuna's"):
        prompt_tokens(Tokenizer(), "Who speaks?", config)
