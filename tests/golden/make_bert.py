"""Writes `bert.npz` and `roberta.npz` with outputs of tiny models of transformers.

    python -m tests.golden.make_bert

Requires the extra `parity`. Each file contains one model with random weights, in float32: its
config.json as `config`, and arrays grouped by the first part of their name:

| group | content |
|---|---|
| `param/` | `state_dict` |
| `in/` | `input_ids`, `attention_mask`, `token_type_ids` [3, 8]; see below |
| `out/` | `hidden_states` [3, 3, 8, 16] of the embeddings and both layers |

The first row has no padding, the second has padding on the right, and the third on the left. By
default, BERT in transformers counts padding in its positions. Here, positions count only valid
tokens, as in RoBERTa.
"""

import json
import pathlib

import numpy as np

NAMES = ("bert", "roberta")
_SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
_FIELDS = {
    "bert": {"max_position_embeddings": 9, "type_vocab_size": 2},
    "roberta": {
        "max_position_embeddings": 11,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
    },
}


def huggingface_model(name):
    """Returns a model of transformers with random weights and biases."""
    import torch
    import transformers

    torch.manual_seed(0)
    config_class = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[name]
    model = transformers.AutoModel.from_config(config_class(**_SIZES, **_FIELDS[name])).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def batch(name):
    random = np.random.default_rng(0)
    mask = np.ones((3, 8), bool)
    mask[1, 5:] = False
    mask[2, :3] = False
    ids = random.integers(3, _SIZES["vocab_size"], size=mask.shape)
    types = random.integers(_FIELDS[name]["type_vocab_size"], size=mask.shape)
    padding = _FIELDS[name].get("pad_token_id", 0)
    return {
        "input_ids": np.where(mask, ids, padding).astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": types.astype(np.int32),
    }


def hidden_states(model, inputs):
    """Returns the hidden states of a model of transformers, [L + 1, B, N, D]."""
    import torch

    tensors = {key: torch.tensor(value).long() for key, value in inputs.items()}
    if model.config.model_type == "bert":
        tensors["position_ids"] = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(**tensors, output_hidden_states=True)
    return torch.stack(output.hidden_states).float().numpy()


def main():
    for name in NAMES:
        model, inputs = huggingface_model(name), batch(name)
        arrays = {f"in/{key}": value for key, value in inputs.items()}
        for key, value in model.state_dict().items():
            arrays[f"param/{key}"] = value.numpy().copy()
        arrays["out/hidden_states"] = hidden_states(model, inputs)
        arrays["config"] = np.array(json.dumps(model.config.to_dict()))
        path = pathlib.Path(__file__).with_name(f"{name}.npz")
        np.savez_compressed(path, **arrays)
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
