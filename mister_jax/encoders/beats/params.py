"""Key table of released BEATs checkpoints, for `Beats`."""

from __future__ import annotations

import numpy as np

from mister_jax.convert.key_table import KeyTable, Source, layer_names
from mister_jax.convert.weight_norm import merge_weight_norm, split_weight_norm
from mister_jax.encoders.beats.config import BeatsConfig

# The classifier, and copies of the first layer's relative position table.
IGNORED = (
    r"(^|\.)predictor\.",
    r"(^|\.)encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight$",
)

# Module of a layer -> its official name.
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
    """Returns the tensor names of a released checkpoint's `model` for a `Beats`."""
    size = config.patch_size

    def flatten(weights: list[np.ndarray]) -> np.ndarray:  # E 1 P P -> P*P E
        return weights[0].reshape(-1, size * size).T

    def unflatten(kernel: np.ndarray) -> list[np.ndarray]:
        return [kernel.T.reshape(-1, 1, size, size)]

    def of_layers(name: str) -> tuple[str, ...]:
        return layer_names(f"encoder.layers.{{}}.{name}", config.num_layers)

    first_layer = "encoder.layers.0.self_attn.relative_attention_bias.weight"
    convolution = "encoder.pos_conv.0"
    table = {
        "patch_embedding/kernel": Source(
            ("patch_embedding.weight",), combine=flatten, split=unflatten
        ),
        "projection/kernel": Source(("post_extract_proj.weight",), axes=(1, 0)),
        "projection/bias": Source(("post_extract_proj.bias",)),
        "position_convolution/kernel": Source(
            (f"{convolution}.weight_g", f"{convolution}.weight_v"),
            combine=merge_weight_norm,
            split=split_weight_norm,
        ),
        "position_convolution/bias": Source((f"{convolution}.bias",)),
        "position_bias/embedding": Source((first_layer,)),
        "layers/layers/attention/gate_scale": Source(
            of_layers("self_attn.grep_a"),
            stacked=True,
            combine=lambda scales: scales[0].reshape(-1),
            split=lambda scale: [scale.reshape(1, -1, 1, 1)],
        ),
    }
    for ours, theirs in {"patch_norm": "layer_norm", "norm": "encoder.layer_norm"}.items():
        table[f"{ours}/scale"] = Source((f"{theirs}.weight",))
        table[f"{ours}/bias"] = Source((f"{theirs}.bias",))
    for ours, theirs in _LINEARS.items():
        table[f"layers/layers/{ours}/kernel"] = Source(
            of_layers(f"{theirs}.weight"), axes=(1, 0), stacked=True
        )
        table[f"layers/layers/{ours}/bias"] = Source(of_layers(f"{theirs}.bias"), stacked=True)
    for ours, theirs in _NORMS.items():
        table[f"layers/layers/{ours}/scale"] = Source(of_layers(f"{theirs}.weight"), stacked=True)
        table[f"layers/layers/{ours}/bias"] = Source(of_layers(f"{theirs}.bias"), stacked=True)
    return table
