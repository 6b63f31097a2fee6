"""Writes `decoder_*.npz` with outputs of tiny Llama and Qwen2 models of transformers and peft.

    python -m tests.golden.make_decoder

Requires the extra `parity`. Each file contains one model with random weights, in float32: its
config.json as `config`, and arrays grouped by the first part of their name:

| group | content |
|---|---|
| `param/` | `state_dict` |
| `in/` | `input_ids` and `attention_mask` [3, 8], random `weights` [3, 8, 16]; see below |
| `out/` | `hidden_states` [3, 3, 8, 16] |
| `lora/` | tensors of an adapter |
| `lora_out/` | `last`, the last hidden states with the adapter |
| `lora_gradient/` | gradients of the sum of `last` times `in/weights` over the valid tokens |

The first row has no padding, the second has padding on the right, and the third on the left.
"""

import json
import pathlib

import numpy as np

_SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 30.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    # The head size is not hidden_size / heads, query heads share keys, and RoPE is scaled.
    "llama3": {"num_key_value_heads": 2, "head_dim": 6, "rope_parameters": _LLAMA_3_ROPE},
    "llama2": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "qwen2": {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 100.0}},
}
RANK, ALPHA, TARGETS = 2, 6, ("q_proj", "v_proj")


def huggingface_config(name, **changes):
    import transformers

    config_class = transformers.Qwen2Config if name == "qwen2" else transformers.LlamaConfig
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = {**_SIZES, "rope_parameters": rope, **CONFIGS[name], **changes}
    sizes["rope_parameters"] = rope | sizes["rope_parameters"]
    return config_class(**sizes)


def huggingface_model(name, causal_lm=False, **changes):
    """Returns a model of transformers with random weights and biases."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = huggingface_config(name, **changes)
    model_class = transformers.AutoModelForCausalLM if causal_lm else transformers.AutoModel
    model = model_class.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def with_lora(model, seed=0, targets=TARGETS):
    """Returns the model in a `peft.PeftModel` with a random adapter."""
    import peft
    import torch

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets))
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model


def batch():
    random = np.random.default_rng(0)
    mask = np.ones((3, 8), bool)
    mask[1, 5:] = False
    mask[2, :3] = False
    return {
        "input_ids": random.integers(_SIZES["vocab_size"], size=mask.shape).astype(np.int32),
        "attention_mask": mask,
        "weights": random.normal(size=(*mask.shape, _SIZES["hidden_size"])).astype(np.float32),
    }


def hidden_states(model, inputs, **options):
    """Returns the hidden states of a model of transformers, [L + 1, B, N, D]."""
    import torch

    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(inputs["input_ids"]).long(),
            attention_mask=torch.tensor(inputs["attention_mask"]).long(),
            output_hidden_states=True,
            **options,
        )
    return torch.stack(output.hidden_states).float().numpy()


def last_and_gradients(model, inputs):
    """Returns the last hidden states of a `PeftModel` and the gradients that the files contain."""
    import torch

    ids, mask, weights = (torch.tensor(inputs[name]) for name in inputs)
    last = model(input_ids=ids.long(), attention_mask=mask.long()).last_hidden_state
    (last * weights * mask[..., None]).sum().backward()
    gradients = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    return last.detach().numpy(), gradients


def main():
    import peft

    for name in CONFIGS:
        model, inputs = huggingface_model(name), batch()
        arrays = {f"in/{key}": value for key, value in inputs.items()}
        for key, value in model.state_dict().items():
            arrays[f"param/{key}"] = value.numpy().copy()
        arrays["out/hidden_states"] = hidden_states(model, inputs)
        arrays["config"] = np.array(json.dumps(model.config.to_dict()))
        model = with_lora(model)
        for key, value in peft.get_peft_model_state_dict(model).items():
            arrays[f"lora/{key}"] = value.numpy().copy()
        arrays["lora_out/last"], gradients = last_and_gradients(model, inputs)
        for key, value in gradients.items():
            arrays[f"lora_gradient/{key}"] = value
        path = pathlib.Path(__file__).with_name(f"decoder_{name}.npz")
        np.savez_compressed(path, **arrays)
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
