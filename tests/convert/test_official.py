"""The importer of released weights: it gives the official numbers, or says what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from mister_jax import losses
from mister_jax.convert import official
from mister_jax.errors import InputError

SHORT = (1, 7)  # dialogue and length of the golden file's short case
LOSSES = {
    "mixture": "focal_mixture",
    "speech": "focal_speech",
    "text": "focal_text",
    "fusion": "focal_fusion",
    "contrastive": "supcon",
    "agreement": "kl",
}
# Our block -> official attention, output projection and LayerNorm.
BLOCKS = {
    "first_to_second": ("aud", "audio", "a"),
    "second_to_first": ("asr", "text", "t"),
    "first_self": ("selfaud", "aud_s", "a_s"),
    "second_self": ("selfasr", "text_s", "t_s"),
}


def output_and_losses(model, speech, text, mask, label):
    """Output, and {part: loss}."""
    output = model(speech, text, mask)
    total, parts = losses.mister_e(output, label, mask)
    return output, {**parts, "total": total}


compiled_output_and_losses = nnx.jit(output_and_losses)


@nnx.jit
def losses_and_gradients(model, *batch):
    """Output, {part: loss} and gradients of the total."""

    def total_loss(model):
        output, parts = output_and_losses(model, *batch)
        return parts["total"], (output, parts)

    gradients, (output, parts) = nnx.grad(total_loss, has_aux=True)(model)
    return output, parts, gradients


@pytest.fixture(scope="module")
def model(golden):
    return official.load_head(golden["param"])


@pytest.fixture(scope="module")
def full_batch(model, golden):
    """What the golden batch gives."""
    speech, text, label = (golden["in"][name] for name in ("speech", "text", "label"))
    output, parts, gradients = losses_and_gradients(
        model, speech, text, np.ones(label.shape, bool), label
    )
    return output, parts, nnx.merge(nnx.graphdef(model), gradients)


@pytest.fixture(scope="module")
def short_in_padding(golden):
    """The short dialogue as the middle row, padded to four times its length with NaN, between
    two others; and the mask of all three, and of the short one alone."""
    dialogue, length = SHORT
    lengths = np.array([11, length, 11])
    mask = np.arange(4 * length) < lengths[:, None]

    def padded(values, fill):
        rows = np.full((3, 4 * length, *values.shape[2:]), fill, values.dtype)
        for row, source in enumerate((0, dialogue, 2)):
            rows[row, : lengths[row]] = values[source, : lengths[row]]
        return rows

    speech, text = (padded(golden["in"][name], np.nan) for name in ("speech", "text"))
    label = padded(golden["in"]["label"], -1)
    return speech, text, label, mask, mask & (np.arange(3) == 1)[:, None]


def by_official_name(output):
    logits = {
        f"{name}_logits": output.expert_logits[:, :, index]
        for index, name in enumerate(("speech", "text", "fusion"))
    }
    return {
        **logits,
        "mixture_logits": output.logits,
        "gate_weights": output.gate,
        "speech_context": output.speech_context,
        "text_context": output.text_context,
        "fusion_speech_repr": output.speech_repr,
        "fusion_text_repr": output.text_repr,
    }


def assert_losses_equal(parts, expected):
    for ours, theirs in {**LOSSES, "total": "total"}.items():
        np.testing.assert_allclose(parts[ours], expected[theirs], rtol=1e-5, err_msg=theirs)


def official_gradients(gradients, weights):
    """Our gradients under official names, as far as ours have a counterpart.

    An output projection of ours is the product of two official ones, kernel^T = fc out_proj and
    bias = fc out_proj.bias + fc.bias, so the chain rule leads back to both.
    """
    found = {}

    def linear(name, module):
        found[f"{name}.weight"] = np.asarray(module.kernel[...]).T
        found[f"{name}.bias"] = np.asarray(module.bias[...])

    def norm(name, module):
        found[f"{name}.weight"] = np.asarray(module.scale[...])
        found[f"{name}.bias"] = np.asarray(module.bias[...])

    for name, expert in (("audio_self", gradients.speech), ("text_self", gradients.text)):
        linear(f"{name}.fc_1", expert.skip)
        linear(f"{name}.fc", expert.classifier)
        branches = zip(expert.convolution.kernels, expert.convolution.biases, strict=True)
        for part, (kernel, bias) in zip(("conv", "conv3", "conv5"), branches, strict=True):
            found[f"{name}.{part}.weight"] = np.asarray(kernel[...]).transpose(2, 0, 1)
            found[f"{name}.{part}.bias"] = np.asarray(bias[...])
        for depth, layer in enumerate(expert.gru.layers):
            for direction, end in enumerate(("", "_reverse")):
                place = f"l{depth}{end}"
                found |= {
                    f"{name}.rnn_1.weight_ih_{place}": layer.input_kernel[:, direction].T,
                    f"{name}.rnn_1.weight_hh_{place}": layer.recurrent_kernel[direction].T,
                    f"{name}.rnn_1.bias_ih_{place}": layer.input_bias[direction],
                    f"{name}.rnn_1.bias_hh_{place}": layer.recurrent_bias[direction],
                }
    fusion = gradients.fusion
    for unit, layer in enumerate(fusion.layers):
        prefix = f"fusion.units.{unit}"
        for block, (attention, projection, norm_name) in BLOCKS.items():
            norm(f"{prefix}.layer_norm_{norm_name}", getattr(layer, block).norm)
            out = getattr(layer, block).attention.out
            kernel, bias = np.asarray(out.kernel[...]).T, np.asarray(out.bias[...])
            inner, outer = (
                f"{prefix}.multihead_attn_{attention}.out_proj",
                f"{prefix}.fc_{projection}",
            )
            found |= {
                f"{inner}.weight": weights[f"{outer}.weight"].T @ kernel,
                f"{inner}.bias": weights[f"{outer}.weight"].T @ bias,
                f"{outer}.weight": kernel @ weights[f"{inner}.weight"].T
                + np.outer(bias, weights[f"{inner}.bias"]),
                f"{outer}.bias": bias,
            }
    linear("fusion.fc_aud", fusion.speech_in)
    linear("fusion.fc_text", fusion.text_in)
    linear("fusion.fc_aud_self", fusion.speech_skip)
    linear("fusion.fc_text_self", fusion.text_skip)
    norm("fusion.bn", fusion.norm)
    linear("fusion.fc", fusion.projection)
    linear("fusion.fc_2", fusion.classifier)
    linear("gate.0", gradients.gate.mlp_in)
    linear("gate.2", gradients.gate.mlp_out)
    return found


def test_outputs_equal_the_official_ones(full_batch, golden):
    ours = by_official_name(full_batch[0])
    assert ours.keys() == golden["out"].keys()
    for name, expected in golden["out"].items():
        np.testing.assert_allclose(ours[name], expected, atol=1e-5, rtol=0, err_msg=name)


def test_losses_equal_the_official_ones(full_batch, golden):
    assert_losses_equal(full_batch[1], golden["loss"])


def test_gradients_equal_the_official_ones(full_batch, golden):
    ours = official_gradients(full_batch[2], golden["param"])
    assert ours.keys() == golden["grad"].keys()
    for name, expected in golden["grad"].items():
        error = np.linalg.norm(ours[name] - expected)
        assert error <= 1e-4 * np.linalg.norm(expected), f"{name}: {error}"
        np.testing.assert_allclose(ours[name], expected, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_dialogue_in_a_padded_batch_gives_what_it_gives_alone(model, golden, short_in_padding):
    speech, text, label, mask, _ = short_in_padding
    output, _ = compiled_output_and_losses(model, speech, text, mask, label)
    ours = by_official_name(output)
    assert ours.keys() == golden["short"].keys()
    for name, expected in golden["short"].items():
        row = ours[name][1:2, : SHORT[1]]
        np.testing.assert_allclose(row, expected, atol=1e-5, rtol=0, err_msg=name)


def test_losses_of_a_padded_dialogue_are_those_of_it_alone(model, golden, short_in_padding):
    speech, text, label, _, alone = short_in_padding
    _, parts = compiled_output_and_losses(model, speech, text, alone, label)
    assert_losses_equal(parts, golden["short_loss"])


def assert_same_parameters(model, other):
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(model, nnx.Param), nnx.state(other, nnx.Param)
    )


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights_are_read_from_a_file(model, golden, tmp_path, suffix):
    path = tmp_path / f"head{suffix}"
    if suffix == ".npz":
        np.savez(path, **golden["param"])
    else:
        save_file(golden["param"], path)
    assert_same_parameters(official.load_head(path), model)
    assert_same_parameters(official.load_head(str(path)), model)


@pytest.mark.parity
def test_weights_are_read_from_a_pytorch_file(model, golden, tmp_path):
    import torch

    state = {name: torch.tensor(value) for name, value in golden["param"].items()}
    torch.save(state, tmp_path / "head.pth")
    assert_same_parameters(official.load_head(tmp_path / "head.pth"), model)
    torch.save({"epoch": 3, **state}, tmp_path / "training.pth")
    (tmp_path / "damaged.pth").write_bytes((tmp_path / "head.pth").read_bytes()[:1000])
    for name, reason in (("training.pth", "not a state_dict"), ("damaged.pth", "not a readable")):
        assert reason in refusal(tmp_path / name)


def test_further_fields_of_the_config_can_be_given(golden):
    model = official.load_head(golden["param"], fusion_dropout=0.25, dtype="bfloat16")
    assert model.config.fusion_dropout == 0.25
    assert model.config.dtype == "bfloat16"
    assert model.speech.skip.kernel.dtype == jnp.float32


def refusal(source, **options):
    """The message `load_head` ends with."""
    with pytest.raises(InputError) as error:
        official.load_head(source, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_all_missing_and_surplus_weights_are_named(golden):
    weights = dict(golden["param"])
    missing = ["gate.0.bias", "text_self.rnn_1.weight_hh_l1_reverse", "fusion.fc.weight"]
    surplus = ["speaker.weight", "fusion.units.0.fc_other.bias"]
    for name in missing:
        del weights[name]
    message = refusal({**weights, **dict.fromkeys(surplus, np.zeros(1))})
    assert "3 missing" in message
    assert "2 surplus" in message
    for name in missing + surplus:
        assert name in message


def test_all_misshapen_weights_are_named(golden):
    weights = dict(golden["param"])
    wrong = {
        "gate.0.bias": weights["gate.0.bias"][:-1],
        "text_self.conv3.weight": weights["text_self.conv3.weight"].transpose(2, 1, 0),
        "fusion.bn.weight": weights["fusion.bn.weight"][:-1],
    }
    message = refusal(weights | wrong)
    assert "3 misshapen" in message
    for name, value in wrong.items():
        assert f"{name} {value.shape} instead of {weights[name].shape}" in message


def test_all_weights_with_a_wrong_number_of_axes_are_named(golden):
    wrong = {
        "audio_self.fc_1.weight": np.zeros(()),  # sizes are read off this one
        "gate.0.bias": np.zeros((10, 1)),
    }
    message = refusal(golden["param"] | wrong)
    assert "audio_self.fc_1.weight () instead of 2 axes" in message
    assert "gate.0.bias (10, 1) instead of 1 axes" in message


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("audio_self.fc_1.weight", (15, 20), "context_dim=15; allowed: even"),
        ("gate.0.weight", (0, 18), "gate_dim=0; allowed: at least 1"),
    ],
)
def test_sizes_no_model_can_have_are_refused(golden, name, shape, reason):
    message = refusal(golden["param"] | {name: np.zeros(shape, np.float32)})
    assert reason in message


def test_even_kernels_are_refused(golden):
    wide = {f"{name}.conv3.weight": np.zeros((16, 20, 4)) for name in ("audio_self", "text_self")}
    assert "kernel_sizes=(1, 4, 5); allowed: odd" in refusal(golden["param"] | wide)


def test_heads_that_do_not_divide_the_width_are_refused(golden):
    assert "attention_heads=5" in refusal(golden["param"], attention_heads=5)


def test_a_missing_file_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "head.npz")
    assert "no such file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["head.npz", "head.safetensors"])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_truncated_file_is_refused(golden, tmp_path, name, share):
    path = tmp_path / name
    if path.suffix == ".npz":
        np.savez(path, **golden["param"])
    else:
        save_file(golden["param"], path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert f"not a readable {path.suffix} file" in refusal(path)


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "head.csv").write_text("a,b\n")
    assert "unknown kind of file '.csv'" in refusal(tmp_path / "head.csv")
    for name in ("head.npz", "head.safetensors"):
        (tmp_path / name).write_text("not weights\nat all\n")
        assert "not a readable" in refusal(tmp_path / name)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    assert "not a readable" in refusal(tmp_path / "array.npz")
