"""Heads of DistilBERT and Whisper, without PyTorch."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mister_jax.encoders.classification import load_classifier
from mister_jax.errors import InputError
from tests.helpers.tiny_encoders import WHISPER_CONFIG, save_encoder

NAMES = {"0": "joy", "1": "anger", "2": "sadness"}
DISTILBERT_CONFIG = {
    "model_type": "distilbert",
    "vocab_size": 24,
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 20,
}


def save_with_head(folder, config, shapes, *, prefix="", **others):
    """Saves a random encoder with a random head; returns the head's tensors."""
    save_encoder(folder, config)
    written = json.loads((folder / "config.json").read_text()) | {"id2label": NAMES}
    (folder / "config.json").write_text(json.dumps(written))
    random, head = np.random.default_rng(0), dict(others)
    for name, shape in shapes.items():
        head[f"{name}.weight"] = random.normal(size=shape).astype(np.float32)
        head[f"{name}.bias"] = random.normal(size=shape[0]).astype(np.float32)
    body = load_file(folder / "model.safetensors")
    body = {f"{prefix}{name}": value for name, value in body.items()}
    save_file(body | head, folder / "model.safetensors")
    return head


def test_head_of_distilbert_is_applied_to_the_first_token(tmp_path):
    tensors = save_with_head(
        tmp_path,
        DISTILBERT_CONFIG,
        {"pre_classifier": (16, 16), "classifier": (3, 16)},
        prefix="distilbert.",
    )
    classifier = load_classifier(tmp_path)
    assert (classifier.modality, classifier.class_names) == ("text", ("joy", "anger", "sadness"))
    tokens = np.array([[2, 5, 3, 0]])
    first = np.asarray(jax.jit(classifier.module)(tokens, tokens > 0))[:, 0]
    hidden = np.maximum(
        first @ tensors["pre_classifier.weight"].T + tensors["pre_classifier.bias"], 0
    )
    expected = hidden @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    logits = jax.jit(classifier.logits)(tokens, tokens > 0)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_head_of_whisper_averages_the_whole_window(weighted, tmp_path):
    config = {**WHISPER_CONFIG, "use_weighted_layer_sum": weighted}
    shapes = {"projector": (6, 16), "classifier": (3, 6)}
    weights = {"layer_weights": np.array([0.3, -1, 0.5], np.float32)} if weighted else {}
    tensors = save_with_head(tmp_path, config, shapes, **weights)
    classifier = load_classifier(tmp_path)
    assert classifier.modality == "speech" and not classifier.module.config.trim
    clip = np.random.default_rng(1).normal(size=(1, 3000)).astype(np.float32) * 0.1
    encode = jax.jit(functools.partial(classifier.module, output_hidden_states=True))
    x, _, states = encode(clip, np.array([3000]))
    x = np.asarray(x)
    assert x.shape == (1, 40, 16)
    if weighted:
        exponentials = np.exp(weights["layer_weights"])
        states = [*np.asarray(states)[:-1], x]
        x = sum(
            weight * state
            for weight, state in zip(exponentials / exponentials.sum(), states, strict=True)
        )
    projected = x @ tensors["projector.weight"].T + tensors["projector.bias"]
    expected = projected.mean(1) @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    logits = jax.jit(classifier.logits)(clip, np.array([3000]))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "fields", "message"),
    [
        ({"classifier": (3, 16)}, {}, "no classification head .pre_classifier.weight"),
        (
            {"pre_classifier": (16, 16), "classifier": (3, 8)},
            {},
            "classifier.weight .3, 8.; needed",
        ),
        ({"pre_classifier": (16, 16), "classifier": (3, 16)}, {"dim": None}, "dim=None; allowed"),
    ],
)
def test_an_unusable_distilbert_is_a_one_line_error(shapes, fields, message, tmp_path):
    save_with_head(tmp_path, DISTILBERT_CONFIG, shapes, prefix="distilbert.")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(InputError, match=message) as error:
        load_classifier(tmp_path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path))
