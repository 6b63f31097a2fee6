"""Key table of released BEATs checkpoints."""

from __future__ import annotations

import numpy as np

from mister_jax.convert.key_table import (
    KeyTable,
    Source,
    layer_names,
    linear,
    norm,
    parameter,
    weight_norm_conv,
)
from mister_jax.encoders.beats.config import BeatsConfig

IGNORED = (
    r"(^|\.)predictor\.",
    # Copies of the first layer's position bias.
    r"(^|\.)encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight$",
)
"""Patterns of the tensors that `Beats` does not need: the classifier and duplicates."""

# Module of a layer -> name in the checkpoint.
_LINEARS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "attention/gate": "self_attn.grep_linear",
    "mlp_in": "fc1",
    "mlp_out": "fc2",
}
_NORMS = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}


def key_table(config: BeatsConfig) -> KeyTable:
    """Returns the tensor names in a checkpoint's `model` for each parameter of a `Beats`."""
    size = config.patch_size

    def flatten_patches(weights: list[np.ndarray]) -> np.ndarray:
        return weights[0].reshape(-1, size * size).T  # patch_dim 1 P P -> P*P patch_dim

    def unflatten_patches(kernel: np.ndarray) -> list[np.ndarray]:
        return [kernel.T.reshape(-1, 1, size, size)]

    table = {
        "patch_embedding/kernel": Source(
            ("patch_embedding.weight",), combine=flatten_patches, split=unflatten_patches
        ),
        "position_bias/embedding": parameter(
            "encoder.layers.0.self_attn.relative_attention_bias.weight"
        ),
        "layers/layers/attention/gate_scale": Source(
            layer_names("encoder.layers.{}.self_attn.grep_a", config.num_layers),
            stacked=True,
            combine=lambda scales: scales[0].reshape(-1),
            split=lambda scale: [scale.reshape(1, -1, 1, 1)],
        ),
        **norm("patch_norm", "layer_norm"),
        **linear("projection", "post_extract_proj"),
        **weight_norm_conv("position_convolution", "encoder.pos_conv.0"),
        **norm("norm", "encoder.layer_norm"),
    }
    for path, name in _LINEARS.items():
        table |= linear(f"layers/layers/{path}", f"encoder.layers.{{}}.{name}", config.num_layers)
    for path, name in _NORMS.items():
        table |= norm(f"layers/layers/{path}", f"encoder.layers.{{}}.{name}", config.num_layers)
    return table
