"""BEATs compared with the official model (golden/salmonn_beats.npz)."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.convert.params import load_params, save_params
from mister_jax.encoders import beats, frontends
from mister_jax.encoders.beats import Beats, BeatsConfig
from mister_jax.encoders.layers import position_buckets
from mister_jax.errors import InputError
from tests.helpers.golden import read_golden


@pytest.fixture(scope="module")
def golden():
    return read_golden("salmonn_beats")


@pytest.fixture(scope="module")
def cfg(golden):
    """Returns the `cfg` of the checkpoint."""
    return json.loads(str(golden["config"]))


@pytest.fixture(scope="module")
def weights(golden):
    """Returns the tensors of the checkpoint."""
    return read_golden("salmonn_beats", "param/")


@pytest.fixture(scope="module")
def model(cfg, weights):
    config = BeatsConfig.from_checkpoint(cfg)
    return load_params(
        nnx.eval_shape(lambda: Beats(config, rngs=nnx.Rngs(0))),
        beats.key_table(config),
        weights,
        ignore=beats.IGNORED,
    )


@nnx.jit
def encode(model, fbank, token_mask):
    return model(fbank, token_mask)


compute_fbank = jax.jit(beats.compute_fbank, static_argnames="config")


def all_tokens(fbank, config):
    return np.ones((fbank.shape[0], config.num_tokens(fbank.shape[1])), bool)


def test_filter_bank_equals_the_official_code(model, golden):
    fbank = compute_fbank(golden["in/wav"], model.config)
    np.testing.assert_allclose(fbank, golden["mid/fbank"], atol=3e-4)


def test_hidden_states_equal_the_official_model(model, golden):
    outputs = encode(model, golden["mid/fbank"], ~golden["out/padding_mask"])
    np.testing.assert_allclose(outputs, golden["out/features"], atol=5e-5)


def test_hidden_states_of_waveforms_equal_the_official_model(model, golden):
    fbank = compute_fbank(golden["in/wav"], model.config)
    outputs = encode(model, fbank, ~golden["out/padding_mask"])
    np.testing.assert_allclose(outputs, golden["out/features"], atol=1e-4)


def test_hidden_states_of_a_long_clip_equal_the_official_model(model, golden):
    fbank = golden["long/mid/fbank"]
    outputs = encode(model, fbank, all_tokens(fbank, model.config))
    np.testing.assert_allclose(outputs, golden["long/out/features"], atol=5e-5)


def test_position_buckets_equal_the_official_code(golden):
    buckets = position_buckets(golden["mid/rel_pos"], 320, 800)
    np.testing.assert_array_equal(buckets, golden["mid/rel_bucket"])


@pytest.mark.parametrize("case", ["mid", "long/mid"])
def test_position_bias_equals_the_official_model(model, golden, case):
    expected = golden[f"{case}/rel_pos_bias"]
    bias = jax.jit(functools.partial(model.relative_bias, expected.shape[-1]))()
    np.testing.assert_array_equal(bias, expected)


def batch_token_mask(sample_mask, num_frames, config):
    """Returns the mask that the official code uses for a padded batch.

    The official code divides the samples into as many equal rows as there are frames, and divides
    the rows into tokens. In clips of a few seconds, the mask therefore does not end at the last
    frame, and the mask of a clip depends on the length of the batch. A mask from
    `config.num_tokens` of each clip's frames has neither problem.

    Args:
      sample_mask: Valid samples, [B, S] bool.
      num_frames: Frames F of the padded batch.
      config: Config of the model.

    Returns:
      Valid tokens, [B, N] bool. A token is invalid if no sample of its row is valid.
    """

    def reduce_rows(mask, num_rows):
        size = mask.shape[1] // num_rows
        return mask[:, : num_rows * size].reshape(mask.shape[0], num_rows, size).any(-1)

    return reduce_rows(reduce_rows(sample_mask, num_frames), config.num_tokens(num_frames))


def test_batch_token_mask_equals_the_official_code(model, golden):
    mask = batch_token_mask(
        jnp.asarray(~golden["in/padding_mask"]), golden["mid/fbank"].shape[1], model.config
    )
    np.testing.assert_array_equal(mask, ~golden["out/padding_mask"])


def test_batch_token_mask_drifts_as_in_the_official_code(model, golden):
    columns = str(golden["maskcases/columns"]).split(",")
    for row in golden["maskcases/table"]:
        case = dict(zip(columns, row.tolist(), strict=True))
        valid = np.arange(case["n_samples"]) < case["n_valid_samples"]
        # This call is not jitted, because every case has different shapes.
        mask = np.asarray(batch_token_mask(valid[None], case["n_frames"], model.config))
        expected = np.arange(case["n_tokens"]) < case["n_valid_tokens"]
        np.testing.assert_array_equal(mask[0], expected, err_msg=str(case))


def test_batch_and_padding_do_not_change_a_clip(model, golden):
    short, long = golden["in/wav"][0], golden["long/in/wav"][0]
    batch = np.full((2, long.size), np.nan, np.float32)
    batch[0, : short.size] = short
    batch[1] = long
    lengths = jax.jit(frontends.kaldi_fbank_lengths)(np.array([short.size, long.size]))
    counts = model.config.num_tokens(np.asarray(lengths))
    batched_fbank = compute_fbank(batch, model.config)
    mask = np.arange(counts.max()) < counts[:, None]
    outputs = np.asarray(encode(model, batched_fbank, mask))
    assert np.isfinite(outputs).all()
    for wave, output, count in zip((short, long), outputs, counts, strict=True):
        fbank = compute_fbank(wave[None], model.config)
        single = np.asarray(encode(model, fbank, all_tokens(fbank, model.config)))
        np.testing.assert_allclose(output[:count], single[0], atol=1e-5)


def test_padding_does_not_change_gradients(model, golden):
    fbank, mask = golden["mid/fbank"], ~golden["out/padding_mask"]
    frames = np.repeat(mask.reshape(2, 6, 8), 16, axis=1).repeat(16, axis=2)
    fbank_with_nan = fbank.copy()
    fbank_with_nan[:, :96][~frames] = np.nan

    @nnx.jit
    @nnx.grad
    def gradient(model, fbank):
        return jnp.sum(jnp.where(mask[..., None], model(fbank, mask), 0) ** 2)

    expected = gradient(model, fbank)
    chex.assert_trees_all_close(gradient(model, fbank_with_nan), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_to_float32(model, golden):
    config = BeatsConfig(**{**vars(model.config), "dtype": "bfloat16"})
    half_model = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: Beats(config, rngs=nnx.Rngs(0)))), nnx.state(model)
    )
    outputs = encode(half_model, golden["mid/fbank"], ~golden["out/padding_mask"])
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_allclose(outputs.astype(jnp.float32), golden["out/features"], atol=0.2)


def test_saved_weights_can_be_loaded(model, weights, golden):
    table = beats.key_table(model.config)
    saved = {name: tensor[...] for name, tensor in save_params(model, table).items()}
    ignored = {name for name in weights if name not in saved}
    assert ignored == {
        "predictor.weight",
        "predictor.bias",
        "encoder.layers.1.self_attn.relative_attention_bias.weight",
    }
    direction = "encoder.pos_conv.0.weight_v"  # Multiples of this tensor give the same kernel.
    for name in set(saved) - {direction}:
        np.testing.assert_allclose(saved[name], weights[name], atol=1e-6, err_msg=name)
    reloaded = nnx.eval_shape(lambda: Beats(model.config, rngs=nnx.Rngs(0)))
    load_params(reloaded, table, saved)
    expected = encode(model, golden["mid/fbank"], ~golden["out/padding_mask"])
    outputs = encode(reloaded, golden["mid/fbank"], ~golden["out/padding_mask"])
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_missing_and_unexpected_tensors_raise_an_error_that_names_them(cfg, weights):
    config = BeatsConfig.from_checkpoint(cfg)
    tensors = dict(weights, unexpected=np.zeros(2, np.float32))
    del tensors["encoder.pos_conv.0.weight_g"]
    with pytest.raises(InputError, match=r"missing: encoder\.pos_conv\.0\.weight_g.*unexpected"):
        load_params(
            nnx.eval_shape(lambda: Beats(config, rngs=nnx.Rngs(0))),
            beats.key_table(config),
            tensors,
            ignore=beats.IGNORED,
        )


def test_released_cfg_gives_the_preset(cfg):
    sizes = {
        "encoder_layers": 12,
        "encoder_embed_dim": 768,
        "encoder_ffn_embed_dim": 3072,
        "encoder_attention_heads": 12,
        "embed_dim": 512,
    }
    assert BeatsConfig.from_checkpoint(cfg | sizes) == BeatsConfig.iter3_plus()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deep_norm": False}, "deep_norm=False; allowed: True"),
        ({"encoder_attention_heads": 5}, "multiples of num_heads=5"),
        ({"conv_pos": 0}, "position_kernel=0; allowed: at least 1"),
        ({"num_buckets": "320"}, "num_buckets='320'; allowed: an integer"),
    ],
)
def test_unsupported_options_raise_an_error_that_names_them(cfg, change, message):
    with pytest.raises(InputError, match=message):
        BeatsConfig.from_checkpoint(cfg | change)


def test_missing_options_raise_an_error_that_names_them(cfg):
    names = {"conv_pos", "num_buckets"}
    with pytest.raises(InputError, match="missing fields conv_pos, num_buckets"):
        BeatsConfig.from_checkpoint({name: cfg[name] for name in set(cfg) - names})


def test_mask_of_another_length_raises_an_error(model, golden):
    with pytest.raises(ValueError, match=r"allowed: \(2, 48\) for 108 frames"):
        model(golden["mid/fbank"], np.ones((2, 47), bool))
