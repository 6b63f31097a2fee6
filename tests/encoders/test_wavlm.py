"""wav2vec 2.0, HuBERT and WavLM compared with transformers, one clip at a time."""

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
from mister_jax.encoders.wavlm import NAME_RULES, WavLM, WavLMConfig, key_table
from mister_jax.errors import InputError
from mister_jax.nn import PerExampleRngs
from mister_jax.nn.lora import LoRAConfig
from tests.helpers.clips import pad_clips
from tests.helpers.golden import read_golden

NAMES = ("wav2vec2", "wav2vec2_large", "hubert", "hubert_large", "wavlm", "wavlm_large")


def huggingface_config(name):
    return json.loads(str(read_golden("wavlm")[f"{name}/config"]))


def renamed(tensors):
    """Returns the tensors under the names of older files, which the key table uses."""
    return {NAME_RULES.table_name(name): value for name, value in tensors.items()}


@functools.cache
def make(name, **changes):
    """Returns a cached encoder with the golden weights. Tests must not change it."""
    config = WavLMConfig.from_huggingface(huggingface_config(name), **changes)
    encoder = nnx.eval_shape(lambda: WavLM(config, rngs=nnx.Rngs(0)))
    tensors = renamed(read_golden("wavlm", f"{name}/param/"))
    return load_params(encoder, key_table(config), tensors, ignore=NAME_RULES.unused)


def clips():
    return list(read_golden("wavlm", "waveform/").values())


def noise(length, seed=0):
    return (0.1 * np.random.default_rng(seed).normal(size=length) + 0.02).astype(np.float32)


@nnx.jit
def run(encoder, waveform, lengths):
    return encoder(waveform, lengths)


@nnx.jit
def run_layers(encoder, waveform, lengths):
    _, mask, layers = encoder(waveform, lengths, output_hidden_states=True)
    if encoder.config.norm_first:
        layers = jnp.concatenate([layers[:-1], encoder.norm(layers[-1:])])
    return layers, mask


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_of_a_padded_batch_equals_transformers(name):
    layers, mask = map(np.asarray, run_layers(make(name), *pad_clips(clips(), 1000)))
    for index, expected in enumerate(read_golden("wavlm", f"{name}/hidden_states/").values()):
        count = int(mask[index].sum())
        assert count == expected.shape[1]
        np.testing.assert_allclose(layers[:, index, :count], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["wavlm", "wav2vec2_large"])
def test_batch_and_padding_do_not_change_a_clip(name):
    samples = noise(477)
    single, mask = map(np.asarray, run(make(name), *pad_clips([samples], 477)))
    assert mask.all()
    batch = [noise(1300, seed=1), samples, noise(0)]
    batched, mask = map(np.asarray, run(make(name), *pad_clips(batch, 1310)))
    count = single.shape[1]
    assert int(mask[1].sum()) == count
    np.testing.assert_allclose(batched[1, :count], single[0], atol=1e-5)


@pytest.mark.parametrize("name", ["wavlm", "wav2vec2_large"])
def test_degenerate_clips_have_finite_outputs(name):
    clips = [noise(0), noise(1), noise(29), np.zeros(300), np.clip(99 * noise(300), -1, 1)]
    hidden, mask = run(make(name), *pad_clips(clips, 300))
    assert np.isfinite(hidden).all()
    np.testing.assert_array_equal(mask.sum(1), [0, 0, 0, 14, 14])
    hidden, mask = run(make(name), np.zeros((1, 0), np.float32), np.array([0]))
    assert hidden.shape == (1, 1, 8) and np.isfinite(hidden).all() and not mask.any()


def test_num_frames_equals_the_output_length_of_the_convolutions():
    config = WavLMConfig.wavlm_base()
    assert config.frame_size == 400
    lengths = np.array([0, 1, 399, 400, 719, 720, 16_000, 160_000])
    np.testing.assert_array_equal(config.num_frames(lengths), [0, 0, 0, 1, 1, 2, 49, 499])


def test_position_bias_depends_on_key_minus_query():
    encoder = make("wavlm")
    table = np.asarray(encoder.position_bias.embedding[...])  # buckets K
    bias = np.asarray(jax.jit(functools.partial(encoder.relative_bias, 60))())
    # Each direction has 8 of the 16 buckets: 4 for exact distances, 4 logarithmic ones up to 40.
    for query, key, bucket in [(7, 7, 0), (7, 6, 1), (7, 4, 3), (6, 9, 11), (0, 4, 12), (59, 0, 7)]:
        np.testing.assert_array_equal(bias[:, query, key], table[bucket])
    assert make("hubert").relative_bias(60) is None


def test_padding_does_not_change_gradients():
    @nnx.jit
    def gradient(encoder, waveform, lengths):
        def loss(encoder):
            hidden, mask = encoder(waveform, lengths)
            return jnp.sum(jnp.where(mask[..., None], hidden, 0) ** 3)

        return nnx.grad(loss)(encoder)

    with_nan = gradient(make("wavlm"), *pad_clips(clips(), 1000))
    waveform, lengths = pad_clips(clips(), 1000)
    with_zeros = gradient(make("wavlm"), np.nan_to_num(waveform), lengths)
    chex.assert_trees_all_close(with_nan, with_zeros, rtol=1e-4, atol=1e-4)
    assert np.abs(with_nan["waveform_encoder"]["convolutions"][0]["kernel"][...]).max() > 0


def test_dropout_of_a_clip_does_not_depend_on_the_batch():
    encoder = make("wavlm", dropout=0.3, activation_dropout=0.3, projection_dropout=0.3)
    waveform, lengths = pad_clips(clips(), 1000)
    keys = jax.random.split(jax.random.key(0), len(lengths))

    @nnx.jit
    def train(encoder, waveform, lengths, keys):
        return encoder(waveform, lengths, deterministic=False, rngs=PerExampleRngs(keys))

    hidden, mask = map(np.asarray, train(encoder, waveform, lengths, keys))
    reversed_hidden, _ = train(encoder, waveform[::-1], lengths[::-1], keys[::-1])
    reversed_hidden = np.asarray(reversed_hidden)
    np.testing.assert_allclose(reversed_hidden[::-1][mask], hidden[mask], atol=1e-5)
    other_keys, _ = train(encoder, waveform, lengths, keys[::-1])
    assert not np.allclose(np.asarray(other_keys)[mask], hidden[mask], atol=1e-3)


def test_bfloat16_is_close_to_float32():
    waveform, lengths = pad_clips(clips(), 1000)
    expected, mask = run(make("wavlm"), waveform, lengths)
    half, _ = run(make("wavlm", dtype="bfloat16", param_dtype="bfloat16"), waveform, lengths)
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - expected)[np.asarray(mask)]
    assert error.mean() < 0.1


def test_lora_is_added_to_the_configured_layers():
    lora = LoRAConfig(2, 4.0, targets=("value", "attention/out"))
    config = dataclasses.replace(make("wavlm").config, lora=lora)
    encoder = nnx.eval_shape(lambda: WavLM(config, rngs=nnx.Rngs(0)))
    lora_params = dict(nnx.to_flat_state(nnx.state(encoder, nnx.LoRAParam)))
    assert {path[-2] for path in lora_params} == {"value", "out"} and len(lora_params) == 4
    assert lora_params["layers", "layers", "attention", "value", "lora_a"].shape == (2, 8, 2)


@pytest.mark.parametrize("prefix", NAME_RULES.prefixes)
def test_checkpoints_load_with_and_without_a_head(prefix):
    config = make("wavlm").config
    tensors = renamed(read_golden("wavlm", "wavlm/param/"))
    checkpoint = {f"{prefix}{name}": value for name, value in tensors.items()}
    more = (f"{prefix}masked_spec_embed", "lm_head.weight", "quantizer.codevectors")
    checkpoint |= {name: np.zeros(8, np.float32) for name in more}
    encoder = nnx.eval_shape(lambda: WavLM(config, rngs=nnx.Rngs(0)))
    head = load_backbone(encoder, key_table(config), checkpoint, NAME_RULES)
    assert set(head) == {"lm_head.weight", "quantizer.codevectors"}
    saved = save_params(encoder, key_table(config))
    assert set(saved) == set(tensors) - {"masked_spec_embed"}
    for name, value in saved.items():
        if not name.endswith("weight_v"):  # Multiples of `weight_v` give the same kernel.
            np.testing.assert_allclose(value[...], tensors[name], atol=1e-6)
    reloaded = nnx.eval_shape(lambda: WavLM(config, rngs=nnx.Rngs(0)))
    load_params(reloaded, key_table(config), saved)
    kernel = reloaded.position_convolution.kernel[...]
    np.testing.assert_allclose(kernel, encoder.position_convolution.kernel[...], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "whisper"}, "allowed: wav2vec2, hubert, wavlm"),
        ({"hidden_act": "relu"}, "hidden_act='relu'; allowed: 'gelu'"),
        ({"add_adapter": True}, "add_adapter=True; allowed: False"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm=True; allowed: False"),
        ({"hidden_size": "8"}, "hidden_size='8'"),
        ({"do_normalize": "false"}, "do_normalize='false'; allowed: true or false"),
        ({"do_stable_layer_norm": 1}, "do_stable_layer_norm=1"),
        ({"conv_stride": [5, 2]}, "allowed: the same number of positive sizes"),
        ({"conv_stride": [5, 2, 2.5]}, "conv_stride"),
        ({"feat_extract_norm": "batch"}, "allowed: 'group' and 'layer'"),
        ({"num_attention_heads": 3}, "num_heads=3; allowed: divisors of hidden_size=8"),
        ({"num_conv_pos_embedding_groups": 0}, "position_groups=0; allowed: at least 1"),
        ({"hidden_dropout": 2.0}, "WavLMConfig.dropout=2.0; allowed: 0 <= rate < 1"),
        ({"feat_proj_dropout": -0.1}, "projection_dropout=-0.1; allowed: 0 <= rate < 1"),
        ({"num_buckets": 18}, "num_buckets=18; allowed: multiples of 4"),
    ],
)
def test_unsupported_configs_raise_an_error_that_names_the_field(change, reason):
    with pytest.raises(InputError, match=reason):
        WavLMConfig.from_huggingface(huggingface_config("wavlm") | change)


def test_absent_fields_have_the_defaults_of_transformers():
    base = WavLMConfig.from_huggingface({"model_type": "wavlm"}, projection_dropout=0.1)
    assert base == WavLMConfig.wavlm_base(activation_dropout=0.1)
    assert not WavLMConfig.from_huggingface({"model_type": "hubert"}).num_buckets


def parameter_shapes(config):
    encoder = nnx.eval_shape(lambda: WavLM(config, rngs=nnx.Rngs(0)))
    return [leaf.shape for leaf in jax.tree.leaves(nnx.state(encoder, nnx.Param))]


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("wav2vec2_base", 94),
        ("wav2vec2_large", 315),
        ("hubert_base", 94),
        ("hubert_large", 315),
        ("wavlm_base", 94),
        ("wavlm_large", 315),
    ],
)
def test_presets_have_the_published_sizes(preset, millions):
    shapes = parameter_shapes(getattr(WavLMConfig, preset)())
    assert round(sum(map(np.prod, shapes)) / 1e6) == millions
    assert WavLMConfig.wavlm_base_plus() == WavLMConfig.wavlm_base()


def test_large_presets_equal_the_configs_of_transformers():
    sizes = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.1,
    }
    large = WavLMConfig.from_huggingface({"model_type": "wav2vec2", **sizes})
    assert large == WavLMConfig.wav2vec2_large()
    norms = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    large = WavLMConfig.from_huggingface({"model_type": "hubert", **sizes, **norms})
    assert large == WavLMConfig.hubert_large()


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers_with_other_weights_and_clips(name):
    from tests.golden import make_speech_encoders as reference

    reference_model = reference.huggingface_model("wavlm", name, seed=1)
    config = WavLMConfig.from_huggingface(reference_model.config.to_dict())
    model = WavLM(config, rngs=nnx.Rngs(0))
    tensors = {key: value.numpy() for key, value in reference_model.state_dict().items()}
    load_params(model, key_table(config), renamed(tensors), ignore=NAME_RULES.unused)
    samples = reference.clips((2000, 30, 1234, 555), seed=1)
    layers, mask = run_layers(model, *pad_clips(samples, 2000))
    for index, clip in enumerate(samples):
        expected = reference.hidden_states(reference_model, clip, config.normalize)
        np.testing.assert_allclose(layers[:, index][:, mask[index]], expected, atol=1e-4)


@pytest.mark.parity
def test_position_bias_of_a_minute_equals_transformers():
    import torch
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    reference_model = WavLMAttention(4, 2)
    with torch.no_grad():
        expected = reference_model.compute_bias(3000, 3000).numpy()
    config = WavLMConfig.wavlm_base(
        hidden_size=4, num_layers=1, num_heads=2, position_groups=1, conv_dims=(4,) * 7
    )
    model = WavLM(config, rngs=nnx.Rngs(0))
    model.position_bias.embedding.set_value(
        jnp.asarray(reference_model.rel_attn_embed.weight.detach())
    )
    np.testing.assert_array_equal(model.relative_bias(3000), expected)


@pytest.mark.parity
def test_transformers_loads_saved_weights(tmp_path):
    import safetensors.numpy
    from transformers import WavLMModel

    from tests.golden import make_speech_encoders as reference

    encoder = make("wavlm")
    saved = save_params(encoder, key_table(encoder.config))
    arrays = {name: np.ascontiguousarray(value[...]) for name, value in saved.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config("wavlm")))
    reference_model = WavLMModel.from_pretrained(tmp_path).eval()
    hidden, _ = run(encoder, *pad_clips(clips()[:1], 900))
    expected = reference.hidden_states(reference_model, clips()[0].astype(np.float32))[-1]
    np.testing.assert_allclose(hidden[0], expected, atol=1e-4)
