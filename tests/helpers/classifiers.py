"""Checkpoints of classifiers with random weights, in the format of transformers."""

import json
import shutil

import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from mister_jax.encoders import registry

NAMES = {"0": "joy", "1": "anger", "2": "sadness"}


def write_text_classifier(bert_folder, folder, *, num_classes=3, head=True, **fields):
    """Writes a BERT, by default with a random head; returns its folder and tensors."""
    shutil.copytree(bert_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"id2label": NAMES} | fields
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"bert.{name.removeprefix('bert.')}": value for name, value in tensors.items()}
    random, dim = np.random.default_rng(0), config["hidden_size"]
    if head:
        tensors |= {
            "bert.pooler.dense.weight": random.normal(size=(dim, dim)).astype(np.float32),
            "bert.pooler.dense.bias": random.normal(size=dim).astype(np.float32),
            "classifier.weight": random.normal(size=(num_classes, dim)).astype(np.float32),
            "classifier.bias": random.normal(size=num_classes).astype(np.float32),
        }
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


WAV2VEC2_CONFIG = {
    "model_type": "wav2vec2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [4],
    "conv_kernel": [400],
    "conv_stride": [320],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}


def write_speech_classifier(folder, names=("ang", "neu", "hap", "sad")):
    """Writes a wav2vec 2.0 with a random head."""
    config = WAV2VEC2_CONFIG | {"id2label": {str(key): name for key, name in enumerate(names)}}
    registry.save_pretrained(registry.create_module(config, rngs=nnx.Rngs(0)), config, folder)
    random = np.random.default_rng(1)
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"wav2vec2.{name}": value for name, value in tensors.items()}
    for name, shape in {"projector": (8, 16), "classifier": (len(names), 8)}.items():
        tensors[f"{name}.weight"] = random.normal(size=shape).astype(np.float32)
        tensors[f"{name}.bias"] = random.normal(size=shape[0]).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    extractor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))
    return folder
