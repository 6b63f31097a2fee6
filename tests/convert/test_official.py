"""Conversion of released MiSTER-E weights, compared with outputs of the official code."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from mister_jax import losses
from mister_jax.convert import official
from mister_jax.errors import InputError

SHORT = (1, 7)  # Dialogue and length of the short case in the golden file.
LOSSES = {
    "mixture": "focal_mixture",
    "speech": "focal_speech",
    "text": "focal_text",
    "fusion": "focal_fusion",
    "contrastive": "supcon",
    "agreement": "kl",
}
# Block, index in the stack -> official names of the attention, output projection and LayerNorm.
BLOCKS = {
    ("cross_attention", 0): ("aud", "audio", "a"),
    ("cross_attention", 1): ("asr", "text", "t"),
    ("self_attention", 0): ("selfaud", "aud_s", "a_s"),
    ("self_attention", 1): ("selfasr", "text_s", "t_s"),
}


def output_and_losses(model, speech, text, mask, label):
    """Returns the output and a dict of the loss terms and their total."""
    output = model(speech, text, mask)
    total, parts = losses.mister_e(output, label, mask)
    return output, {**parts, "total": total}


compiled_output_and_losses = nnx.jit(output_and_losses)


@nnx.jit
def losses_and_gradients(model, *batch):
    """Returns the output, a dict of the loss terms, and the gradients of the total."""

    def total_loss(model):
        output, parts = output_and_losses(model, *batch)
        return parts["total"], (output, parts)

    gradients, (output, parts) = nnx.grad(total_loss, has_aux=True)(model)
    return output, parts, gradients


@pytest.fixture(scope="module")
def model(golden):
    return official.load_mister_e(golden["param"])


@pytest.fixture(scope="module")
def full_batch(model, golden):
    """Outputs, losses and gradients for the golden batch."""
    speech, text, label = (golden["in"][name] for name in ("speech", "text", "label"))
    output, parts, gradients = losses_and_gradients(
        model, speech, text, np.ones(label.shape, bool), label
    )
    return output, parts, nnx.merge(nnx.graphdef(model), gradients)


@pytest.fixture(scope="module")
def short_in_padding(golden):
    """Batch of three dialogues, padded with NaN, whose middle row is the short dialogue.

    The last items of the batch are the mask of all dialogues and the mask of the short dialogue.
    """
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
    for part, name in {**LOSSES, "total": "total"}.items():
        np.testing.assert_allclose(parts[part], expected[name], rtol=1e-5, err_msg=name)


def official_gradients(gradients, weights):
    """Returns the gradients under the names of the official parameters.

    An output projection is the product of two official projections: kernel^T = fc @ out_proj and
    bias = fc @ out_proj.bias + fc.bias. The chain rule gives the gradients of both projections.
    """
    gradients_by_name = {}

    def linear(name, module):
        gradients_by_name[f"{name}.weight"] = np.asarray(module.kernel[...]).T
        gradients_by_name[f"{name}.bias"] = np.asarray(module.bias[...])

    def norm(name, module):
        gradients_by_name[f"{name}.weight"] = np.asarray(module.scale[...])
        gradients_by_name[f"{name}.bias"] = np.asarray(module.bias[...])

    for name, expert in (("audio_self", gradients.speech), ("text_self", gradients.text)):
        linear(f"{name}.fc_1", expert.skip)
        linear(f"{name}.fc", expert.classifier)
        branches = zip(expert.convolution.kernels, expert.convolution.biases, strict=True)
        for part, (kernel, bias) in zip(("conv", "conv3", "conv5"), branches, strict=True):
            gradients_by_name[f"{name}.{part}.weight"] = np.asarray(kernel[...]).transpose(2, 0, 1)
            gradients_by_name[f"{name}.{part}.bias"] = np.asarray(bias[...])
        for depth, layer in enumerate(expert.gru.layers):
            for direction, end in enumerate(("", "_reverse")):
                place = f"l{depth}{end}"
                gradients_by_name |= {
                    f"{name}.rnn_1.weight_ih_{place}": layer.input_kernel[:, direction].T,
                    f"{name}.rnn_1.weight_hh_{place}": layer.recurrent_kernel[direction].T,
                    f"{name}.rnn_1.bias_ih_{place}": layer.input_bias[direction],
                    f"{name}.rnn_1.bias_hh_{place}": layer.recurrent_bias[direction],
                }
    fusion = gradients.fusion
    for unit, layer in enumerate(fusion.layers):
        prefix = f"fusion.units.{unit}"
        for (name, index), (attention, projection, norm_name) in BLOCKS.items():
            stack = getattr(layer, name).stack
            block = jax.tree.map(lambda value, index=index: value[index], stack)
            norm(f"{prefix}.layer_norm_{norm_name}", block.norm)
            out = block.attention.out
            kernel, bias = np.asarray(out.kernel[...]).T, np.asarray(out.bias[...])
            inner, outer = (
                f"{prefix}.multihead_attn_{attention}.out_proj",
                f"{prefix}.fc_{projection}",
            )
            gradients_by_name |= {
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
    return gradients_by_name


def test_outputs_equal_the_official_code(full_batch, golden):
    outputs = by_official_name(full_batch[0])
    assert outputs.keys() == golden["out"].keys()
    for name, expected in golden["out"].items():
        np.testing.assert_allclose(outputs[name], expected, atol=1e-5, rtol=0, err_msg=name)


def test_losses_equal_the_official_code(full_batch, golden):
    assert_losses_equal(full_batch[1], golden["loss"])


def test_gradients_equal_the_official_code(full_batch, golden):
    gradients = official_gradients(full_batch[2], golden["param"])
    assert gradients.keys() == golden["grad"].keys()
    for name, expected in golden["grad"].items():
        error = np.linalg.norm(gradients[name] - expected)
        assert error <= 1e-4 * np.linalg.norm(expected), f"{name}: {error}"
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-3, atol=1e-5, err_msg=name)


def test_padding_does_not_change_outputs(model, golden, short_in_padding):
    speech, text, label, mask, _ = short_in_padding
    output, _ = compiled_output_and_losses(model, speech, text, mask, label)
    outputs = by_official_name(output)
    assert outputs.keys() == golden["short"].keys()
    for name, expected in golden["short"].items():
        row = outputs[name][1:2, : SHORT[1]]
        np.testing.assert_allclose(row, expected, atol=1e-5, rtol=0, err_msg=name)


def test_padding_and_other_dialogues_do_not_change_losses(model, golden, short_in_padding):
    speech, text, label, _, short_mask = short_in_padding
    _, parts = compiled_output_and_losses(model, speech, text, short_mask, label)
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
    assert_same_parameters(official.load_mister_e(path), model)
    assert_same_parameters(official.load_mister_e(str(path)), model)


@pytest.mark.parity
def test_weights_are_read_from_a_pytorch_file(model, golden, tmp_path):
    import torch

    state = {name: torch.tensor(value) for name, value in golden["param"].items()}
    torch.save(state, tmp_path / "head.pth")
    assert_same_parameters(official.load_mister_e(tmp_path / "head.pth"), model)
    torch.save({"epoch": 3, **state}, tmp_path / "training.pth")
    (tmp_path / "damaged.pth").write_bytes((tmp_path / "head.pth").read_bytes()[:1000])
    for name, reason in (("training.pth", "not a state_dict"), ("damaged.pth", "not a readable")):
        assert reason in error_message(tmp_path / name)


def test_further_config_fields_can_be_set(golden):
    model = official.load_mister_e(golden["param"], fusion_dropout=0.25, dtype="bfloat16")
    assert model.config.fusion_dropout == 0.25
    assert model.config.dtype == "bfloat16"
    assert model.speech.skip.kernel.dtype == jnp.float32


def error_message(source, **options):
    """Returns the message of the error that `load_mister_e` raises."""
    with pytest.raises(InputError) as error:
        official.load_mister_e(source, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_all_missing_and_unexpected_weights_are_named(golden):
    weights = dict(golden["param"])
    missing = ["gate.0.bias", "text_self.rnn_1.weight_hh_l1_reverse", "fusion.fc.weight"]
    unexpected = ["speaker.weight", "fusion.units.0.fc_other.bias"]
    for name in missing:
        del weights[name]
    message = error_message({**weights, **dict.fromkeys(unexpected, np.zeros(1))})
    assert "3 missing" in message
    assert "2 unexpected" in message
    for name in missing + unexpected:
        assert name in message


def test_all_mismatched_weights_are_named(golden):
    weights = dict(golden["param"])
    wrong = {
        "gate.0.bias": weights["gate.0.bias"][:-1],
        "text_self.conv3.weight": weights["text_self.conv3.weight"].transpose(2, 1, 0),
        "fusion.bn.weight": weights["fusion.bn.weight"][:-1],
    }
    message = error_message(weights | wrong)
    assert "3 mismatched" in message
    for name, value in wrong.items():
        assert f"{name} {list(value.shape)} instead of {list(weights[name].shape)}" in message


def test_all_weights_with_a_wrong_number_of_axes_are_named(golden):
    wrong = {
        "audio_self.fc_1.weight": np.zeros(()),  # Sizes are read from this tensor.
        "gate.0.bias": np.zeros((10, 1)),
    }
    message = error_message(golden["param"] | wrong)
    assert "audio_self.fc_1.weight () instead of 2 axes" in message
    assert "gate.0.bias (10, 1) instead of 1 axes" in message


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("audio_self.fc_1.weight", (15, 20), "context_dim=15; allowed: even"),
        ("gate.0.weight", (0, 18), "gate_dim=0; allowed: at least 1"),
    ],
)
def test_invalid_sizes_are_rejected(golden, name, shape, reason):
    message = error_message(golden["param"] | {name: np.zeros(shape, np.float32)})
    assert reason in message


def test_even_kernel_sizes_are_rejected(golden):
    wide = {f"{name}.conv3.weight": np.zeros((16, 20, 4)) for name in ("audio_self", "text_self")}
    assert "kernel_sizes=(1, 4, 5); allowed: odd" in error_message(golden["param"] | wide)


def test_heads_that_do_not_divide_the_attention_dim_are_rejected(golden):
    assert "attention_heads=5" in error_message(golden["param"], attention_heads=5)


def test_a_missing_file_is_rejected(tmp_path):
    assert "no such file" in error_message(tmp_path / "head.npz")
    assert "no such file" in error_message(tmp_path)


@pytest.mark.parametrize("name", ["head.npz", "head.safetensors"])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_truncated_file_is_rejected(golden, tmp_path, name, share):
    path = tmp_path / name
    if path.suffix == ".npz":
        np.savez(path, **golden["param"])
    else:
        save_file(golden["param"], path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = error_message(path)
    reasons = {".npz": "not a readable", ".safetensors": "(truncated|not a safetensors file)"}
    assert re.search(f"{path}: {reasons[path.suffix]}", message)


def test_other_file_types_are_rejected(tmp_path):
    (tmp_path / "head.csv").write_text("a,b\n")
    assert "unknown file type '.csv'" in error_message(tmp_path / "head.csv")
    for name, reason in (("head.npz", "not a readable"), ("head.safetensors", "not a safetensors")):
        (tmp_path / name).write_text("not weights\nat all\n")
        assert reason in error_message(tmp_path / name)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    assert "not a readable" in error_message(tmp_path / "array.npz")
