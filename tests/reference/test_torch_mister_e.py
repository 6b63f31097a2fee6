"""The PyTorch reference of stage 2 against the outputs and gradients of the official code."""

import json

import numpy as np
import pytest

from mister_jax import MisterEConfig

pytestmark = pytest.mark.parity

PARTS = {
    "mixture": "focal_mixture",
    "speech": "focal_speech",
    "text": "focal_text",
    "fusion": "focal_fusion",
    "contrastive": "supcon",
    "agreement": "kl",
}


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    from tests.reference import torch_mister_e

    return torch_mister_e


@pytest.fixture(scope="module")
def model(reference, golden):
    official = json.loads(str(golden["config"][""]))
    config = MisterEConfig(
        num_classes=official["num_classes"],
        speech_dim=official["feature_dim"],
        text_dim=official["feature_dim"],
        context_dim=2 * official["gru_hidden"],
        kernel_sizes=tuple(official["kernel_sizes"]),
        gru_layers=official["gru_layers"],
        fusion_dim=official["fusion_dim"],
        fusion_layers=official["fusion_layers"],
        attention_dim=official["attention_dim"],
        attention_heads=official["attention_heads"],
        gate_dim=official["gate_hidden"],
    )
    return reference.from_official(golden["param"], config).eval()


@pytest.mark.parametrize(
    "group, rows, length", [("out", slice(None), 11), ("short", slice(1, 2), 7)]
)
def test_outputs_and_losses_equal_the_official_code(reference, model, golden, group, rows, length):
    import torch

    speech, text, label = (
        torch.as_tensor(golden["in"][name][rows, :length]) for name in ("speech", "text", "label")
    )
    with torch.no_grad():
        output = model(speech, text)
        total, parts = reference.loss(output, label.long())
    outputs = {
        "mixture_logits": output.logits,
        "speech_logits": output.expert_logits[:, :, 0],
        "text_logits": output.expert_logits[:, :, 1],
        "fusion_logits": output.expert_logits[:, :, 2],
        "gate_weights": output.gate,
        "speech_context": output.speech_context,
        "text_context": output.text_context,
        "fusion_speech_repr": output.speech_repr,
        "fusion_text_repr": output.text_repr,
    }
    for name, value in outputs.items():
        np.testing.assert_allclose(value, golden[group][name], rtol=1e-5, atol=1e-5, err_msg=name)
    expected = golden["loss" if group == "out" else "short_loss"]
    for part, official_name in PARTS.items():
        np.testing.assert_allclose(
            parts[part], expected[official_name], rtol=1e-5, err_msg=official_name
        )
    np.testing.assert_allclose(total, expected["total"], rtol=1e-5)


def test_gradients_equal_the_official_code(reference, model, golden):
    import torch

    speech, text, label = (
        torch.as_tensor(golden["in"][name]) for name in ("speech", "text", "label")
    )
    model.zero_grad()
    total, _ = reference.loss(model(speech, text), label.long())
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert golden["grad"].keys() <= gradients.keys()
    for name, expected in golden["grad"].items():
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_initial_parameters_have_the_distribution_of_pytorch(reference):
    import jax
    import torch
    from flax import nnx

    from mister_jax import MisterE
    from mister_jax.convert.official import load_mister_e

    config = MisterEConfig.small(speech_dim=48, text_dim=40, gate_dim=64, fusion_layers=2)
    torch.manual_seed(0)
    weights = reference.TorchMisterE(config).state_dict()
    official = load_mister_e(
        {name: value.numpy() for name, value in weights.items()},
        attention_heads=config.attention_heads,
    )
    initial = MisterE(config, rngs=nnx.Rngs(0))

    def parameters(model):
        leaves = jax.tree.leaves_with_path(nnx.state(model, nnx.Param))
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    official_parameters = parameters(official)
    assert official_parameters.keys() == parameters(initial).keys()
    for name, value in parameters(initial).items():
        expected = official_parameters[name]
        assert value.shape == expected.shape
        assert (np.std(value) > 0) == (np.std(expected) > 0)
        if value.size < 90:
            continue  # too few values to compare
        # The standard error of the ratio of two deviations of n values is about 1 / sqrt(n).
        tolerance = 5 / np.sqrt(value.size)
        deviation = np.std(expected)
        assert np.std(value) == pytest.approx(deviation, rel=tolerance), name
        assert np.mean(value) == pytest.approx(np.mean(expected), abs=tolerance * deviation), name
