"""Whisper's encoder compared with transformers, with and without trimming."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.convert.params import load_backbone, load_params, save_params
from mister_jax.encoders import frontends
from mister_jax.encoders.whisper import NAME_RULES, Whisper, WhisperConfig, key_table
from mister_jax.errors import InputError
from mister_jax.nn import PerExampleRngs
from mister_jax.nn.lora import LoRAConfig
from tests.helpers.clips import pad_clips
from tests.helpers.golden import read_golden

NAMES = ("whisper", "whisper_v3")
WINDOW = 16_000


def huggingface_config(name):
    return json.loads(str(read_golden("whisper")[f"{name}/config"]))


@functools.cache
def make(name="whisper", **changes):
    """Returns a cached encoder with the golden weights. Tests must not change it."""
    config = WhisperConfig.from_huggingface(huggingface_config(name), **changes)
    whisper = nnx.eval_shape(lambda: Whisper(config, rngs=nnx.Rngs(0)))
    return load_params(
        whisper,
        key_table(config),
        read_golden("whisper", f"{name}/param/"),
        ignore=NAME_RULES.unused,
    )


def clips():
    return list(read_golden("whisper", "waveform/").values())


def noise(length, seed=0):
    return (0.1 * np.random.default_rng(seed).normal(size=length)).astype(np.float32)


@nnx.jit
def run(whisper, waveform, lengths):
    return whisper(waveform, lengths)


@nnx.jit
def run_layers(whisper, waveform, lengths):
    _, mask, layers = whisper(waveform, lengths, output_hidden_states=True)
    return jnp.concatenate([layers[:-1], whisper.norm(layers[-1:])]), mask


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_equals_transformers(name):
    waveform, lengths = pad_clips(clips(), WINDOW)
    layers, mask = run_layers(make(name, trim=False), waveform, lengths)
    expected = np.stack(list(read_golden("whisper", f"{name}/hidden_states/").values()), axis=1)
    assert layers.shape == expected.shape
    np.testing.assert_allclose(layers, expected, atol=1e-4)
    np.testing.assert_array_equal(mask.sum(1), -(-lengths // 320))


def test_waveforms_and_spectrograms_equal_transformers():
    waveform, lengths = pad_clips(clips(), WINDOW)

    @nnx.jit
    def both(whisper, waveform, lengths):
        mel = frontends.log_mel(waveform, lengths, window_frames=100)
        return whisper(waveform, lengths), whisper.from_mel(mel, frontends.log_mel_lengths(lengths))

    expected = [states[-1] for states in read_golden("whisper", "whisper/hidden_states/").values()]
    for hidden, mask in both(make(trim=False), waveform, lengths):
        np.testing.assert_allclose(hidden, np.stack(expected), atol=1e-4)
        np.testing.assert_array_equal(mask.sum(1), -(-lengths // 320))


def test_odd_or_too_long_spectrograms_raise_an_error():
    for num_frames in (99, 102):
        with pytest.raises(ValueError, match="an even number up to 100"):
            make().from_mel(np.zeros((1, num_frames, 80), np.float32), np.array([1]))


def test_trimming_changes_only_the_attention():
    waveform, lengths = pad_clips(clips(), 5000)
    untrimmed, mask = map(np.asarray, run_layers(make(trim=False), waveform, lengths))
    trimmed, trimmed_mask = map(np.asarray, run_layers(make(), waveform, lengths))
    assert trimmed.shape[2] == 16 and untrimmed.shape[2] == 50
    np.testing.assert_array_equal(trimmed_mask, mask[:, :16])
    np.testing.assert_allclose(trimmed[0], untrimmed[0, :, :16], atol=1e-5)
    assert not np.allclose(trimmed[1], untrimmed[1, :, :16], atol=1e-2)


def test_trimming_does_not_change_a_clip_without_padding():
    waveform, lengths = pad_clips([noise(WINDOW)], WINDOW)
    trimmed, _ = run(make(), waveform, lengths)
    np.testing.assert_allclose(trimmed, run(make(trim=False), waveform, lengths)[0], atol=1e-5)


@pytest.mark.parametrize(("trim", "length"), [(True, 5000), (True, 1), (False, WINDOW - 100)])
def test_batch_and_padding_do_not_change_a_clip(trim, length):
    samples = noise(length)
    single, mask = map(np.asarray, run(make(trim=trim), *pad_clips([samples], length)))
    count = int(mask.sum())
    assert count == -(-length // 320)
    batch = [noise(17_000, seed=1), samples, noise(0)]
    batched, mask = map(np.asarray, run(make(trim=trim), *pad_clips(batch, 17_000)))
    assert int(mask[1].sum()) == count
    np.testing.assert_allclose(batched[1, :count], single[0, :count], atol=1e-5)


def test_clips_are_truncated_to_the_window():
    samples = noise(WINDOW + 3000)
    short, _ = run(make(), *pad_clips([samples[:WINDOW]], WINDOW))
    long, mask = run(make(), *pad_clips([samples], WINDOW + 3000))
    assert mask.shape == (1, 50) and mask.all()
    np.testing.assert_allclose(long, short, atol=1e-5)


def test_degenerate_clips_have_finite_outputs():
    clips = [noise(0), noise(1), np.zeros(3000), np.clip(99 * noise(3000), -1, 1)]
    hidden, mask = run(make(), *pad_clips(clips, 3000))
    assert np.isfinite(hidden).all()
    np.testing.assert_array_equal(mask.sum(1), [0, 1, 10, 10])
    hidden, mask = run(make(), np.zeros((2, 0), np.float32), np.array([0, 0]))
    assert np.isfinite(hidden).all() and not mask.any()


def test_bfloat16_is_close_to_float32():
    waveform, lengths = pad_clips(clips(), 5000)
    expected, mask = run(make(), waveform, lengths)
    half, _ = run(make(dtype="bfloat16", param_dtype="bfloat16"), waveform, lengths)
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - expected)[np.asarray(mask)]
    assert error.mean() < 0.05


def test_padding_does_not_change_gradients_and_positions_are_frozen():
    @nnx.jit
    def gradient(whisper, waveform, lengths):
        def loss(whisper):
            hidden, mask = whisper(waveform, lengths)
            return jnp.sum(jnp.where(mask[..., None], hidden, 0) ** 2)

        return nnx.grad(loss)(whisper)

    with_nan = gradient(make(), *pad_clips(clips(), 5000))
    waveform, lengths = pad_clips(clips(), 5000)
    with_zeros = gradient(make(), np.nan_to_num(waveform), lengths)
    chex.assert_trees_all_close(with_nan, with_zeros, rtol=1e-7, atol=1e-5)
    np.testing.assert_array_equal(with_nan["positions"][...], 0)
    assert np.abs(with_nan["convolution"]["kernel"][...]).max() > 0


def test_dropout_of_a_clip_does_not_depend_on_the_batch():
    whisper = make(dropout=0.3, attention_dropout=0.3, activation_dropout=0.3)
    waveform, lengths = pad_clips(clips(), 5000)
    keys = jax.random.split(jax.random.key(0), 2)

    @nnx.jit
    def train(whisper, waveform, lengths, keys):
        return whisper(waveform, lengths, deterministic=False, rngs=PerExampleRngs(keys))

    hidden, mask = map(np.asarray, train(whisper, waveform, lengths, keys))
    reversed_hidden, _ = train(whisper, waveform[::-1], lengths[::-1], keys[::-1])
    reversed_hidden = np.asarray(reversed_hidden)
    np.testing.assert_allclose(reversed_hidden[::-1][mask], hidden[mask], atol=1e-5)
    other_keys, _ = train(whisper, waveform, lengths, keys[::-1])
    assert not np.allclose(np.asarray(other_keys)[mask], hidden[mask], atol=1e-3)


def test_lora_is_added_to_the_configured_layers():
    lora = LoRAConfig(2, 4.0, targets=("query", "mlp_out"))
    config = dataclasses.replace(make().config, lora=lora)
    whisper = nnx.eval_shape(lambda: Whisper(config, rngs=nnx.Rngs(0)))
    lora_params = dict(nnx.to_flat_state(nnx.state(whisper, nnx.LoRAParam)))
    assert {path[-2] for path in lora_params} == {"query", "mlp_out"} and len(lora_params) == 4
    assert lora_params["layers", "layers", "mlp_out", "lora_a"].shape == (2, 12, 2)


@pytest.mark.parametrize("prefix", NAME_RULES.prefixes)
def test_checkpoints_load_with_and_without_a_head(prefix):
    config = make().config
    tensors = {
        f"{prefix}{name}": value for name, value in read_golden("whisper", "whisper/param/").items()
    }
    more = (f"{prefix}decoder.embed_tokens.weight", "proj_out.weight")
    tensors |= {name: np.zeros((3, 8), np.float32) for name in more}
    whisper = nnx.eval_shape(lambda: Whisper(config, rngs=nnx.Rngs(0)))
    assert set(load_backbone(whisper, key_table(config), tensors, NAME_RULES)) == {
        "proj_out.weight"
    }
    saved = save_params(whisper, key_table(config))
    for name, value in read_golden("whisper", "whisper/param/").items():
        np.testing.assert_array_equal(saved[name][...], value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "bert"}, "model_type='bert'; allowed: 'whisper'"),
        ({"activation_function": "relu"}, "activation_function='relu'; allowed: 'gelu'"),
        ({"d_model": "8"}, "d_model='8'; allowed: an integer"),
        ({"d_model": 9}, "hidden_size=9; allowed: even multiples of num_heads=2"),
        ({"dropout": 1.5}, "WhisperConfig.dropout=1.5; allowed: 0 <= rate < 1"),
        ({"activation_dropout": float("nan")}, "activation_dropout=nan; allowed: 0 <= rate < 1"),
        ({"encoder_layers": 0}, "num_layers=0; allowed: at least 1"),
    ],
)
def test_unsupported_configs_raise_an_error_that_names_the_field(change, reason):
    with pytest.raises(InputError, match=reason):
        WhisperConfig.from_huggingface(huggingface_config("whisper") | change)


def num_parameters(config):
    state = nnx.state(nnx.eval_shape(lambda: Whisper(config, rngs=nnx.Rngs(0))), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("tiny", 8), ("base", 21), ("small", 88), ("medium", 307), ("large_v2", 637)],
)
def test_presets_have_the_published_sizes(preset, millions):
    config = getattr(WhisperConfig, preset)()
    assert round(num_parameters(config) / 1e6) == millions
    assert config.num_mel_bins == 80


def test_large_v3_differs_from_large_v2_only_in_its_mel_bins():
    assert WhisperConfig.large_v3(num_mel_bins=80) == WhisperConfig.large_v2()
    assert WhisperConfig.large_v3().num_mel_bins == 128


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers_with_other_weights_and_clips(name):
    from tests.golden import make_speech_encoders as reference

    reference_model = reference.huggingface_model("whisper", name, seed=1)
    config = WhisperConfig.from_huggingface(reference_model.config.to_dict(), trim=False)
    model = Whisper(config, rngs=nnx.Rngs(0))
    tensors = {key: value.numpy() for key, value in reference_model.state_dict().items()}
    load_params(model, key_table(config), tensors, ignore=NAME_RULES.unused)
    samples = reference.clips((16_000, 15_900, 1, 20_000, 7777), seed=1)
    layers, _ = run_layers(model, *pad_clips(samples, 20_000))
    for index, clip in enumerate(samples):
        expected = reference.hidden_states(reference_model, clip)
        np.testing.assert_allclose(layers[:, index], expected, atol=1e-4)
