"""DistilBERT: config, tensor names and files; equality with transformers."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from mister_jax.convert.safetensors import Checkpoint, save_tensors
from mister_jax.encoders import registry
from mister_jax.encoders.bert import Bert
from mister_jax.encoders.distilbert import DistilBertConfig
from mister_jax.encoders.hf_config import read_config
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig
from tests.helpers.tiny_encoders import make_word_tokenizer, save_encoder

SIZES = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 20}
TOKENS = np.array([[2, 5, 6, 7, 3], [2, 5, 3, 0, 0]])
MASK = TOKENS > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_distilbert")
    tokenizer = make_word_tokenizer(bert=True)
    config = {"model_type": "distilbert", "vocab_size": len(tokenizer), **SIZES}
    save_encoder(folder, config, tokenizer)
    return folder


@nnx.jit
def run(module, *inputs, **options):
    return module(*inputs, **options)


def test_it_is_saved_and_loaded_with_its_tokenizer(folder, tmp_path):
    module, tokenizer = registry.load_pretrained(folder)
    tokens = tokenizer(["i am happy"], return_tensors="np")["input_ids"]
    assert np.isfinite(run(module, tokens)).all()
    registry.save_pretrained(module, read_config(folder), tmp_path, tokenizer)
    names = Checkpoint.open(folder).keys()
    assert "transformer.layer.1.attention.q_lin.weight" in names
    assert "transformer.layer.1.ffn.lin2.bias" in names
    assert not any("token_type" in name for name in names)
    restored, _ = registry.load_pretrained(tmp_path)
    np.testing.assert_array_equal(run(restored, TOKENS, MASK), run(module, TOKENS, MASK))


def test_heads_and_position_ids_are_ignored(folder, tmp_path):
    tensors = {name: tensor[...] for name, tensor in Checkpoint.open(folder).items()}
    tensors = {f"distilbert.{name}": value for name, value in tensors.items()}
    tensors["distilbert.embeddings.position_ids"] = np.arange(20)[None]
    tensors["pre_classifier.weight"] = np.ones((16, 16), np.float32)
    save_tensors(tmp_path, tensors)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = run(registry.load_module(folder), TOKENS, MASK)
    np.testing.assert_array_equal(run(registry.load_module(tmp_path), TOKENS, MASK), expected)


def test_token_types_and_padding_are_ignored(folder):
    module = registry.load_module(folder)
    expected = np.asarray(run(module, TOKENS, MASK))
    typed = run(module, TOKENS, MASK, token_type_ids=np.ones_like(TOKENS))
    np.testing.assert_array_equal(typed, expected)
    alone = np.asarray(run(module, TOKENS[1:, :3]))
    np.testing.assert_allclose(alone[0], expected[1, :3], atol=1e-5)


def test_lora_paths_are_added(folder):
    module = registry.load_module(folder, lora=LoRAConfig(2, 4, targets=("query", "mlp_in")))
    assert len(jax.tree.leaves(nnx.state(module, nnx.LoRAParam))) == 4
    expected = run(registry.load_module(folder), TOKENS, MASK)
    np.testing.assert_allclose(run(module, TOKENS, MASK), expected, atol=1e-5)


def test_the_default_has_the_released_size():
    config = DistilBertConfig()
    shapes = nnx.state(nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 66_362_880
    assert config.max_length == 512
    assert DistilBertConfig.from_huggingface(config.to_huggingface()) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "bert", "model_type='bert'; allowed: 'distilbert'"),
        ("activation", "relu", "activation='relu'; allowed: 'gelu'"),
        ("dim", None, "dim=None; allowed: an integer"),
        ("dim", 15, "hidden_size=15; allowed: a multiple of num_heads=12"),
    ],
)
def test_unsupported_configs_are_rejected(field, value, message):
    config = DistilBertConfig().to_huggingface() | {field: value}
    with pytest.raises(InputError, match=message):
        DistilBertConfig.from_huggingface(config)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("sinusoidal", [False, True])
def test_every_layer_equals_transformers(sinusoidal, tmp_path):
    import torch

    from tests.encoders import test_transformers

    ids, mask = test_transformers.IDS, test_transformers.MASK
    model = test_transformers.torch_model(
        "distilbert", "DistilBertModel", sinusoidal_pos_embds=sinusoidal
    )
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["n_layers"] == 2
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask).long()}
        expected = model(**inputs, output_hidden_states=True).hidden_states
    module = registry.load_module(tmp_path)
    _, states = module(ids, mask, output_hidden_states=True)
    assert len(states) == len(expected) == 3
    for layer, expected_layer in zip(states, expected, strict=True):
        np.testing.assert_allclose(layer[mask], expected_layer.numpy()[mask], atol=1e-5)
