"""Key table and name rules of Whisper checkpoints in the format of transformers."""

from __future__ import annotations

from mister_jax.convert.key_table import KeyTable, NameRules, conv, linear, norm, parameter
from mister_jax.encoders.whisper.config import WhisperConfig

NAME_RULES = NameRules(
    prefixes=("", "model."),
    unused=(r"^decoder\.",),
    # `WhisperForAudioClassification` stores its encoder without a prefix.
    heads=(r"^proj_out\.", r"^(classifier|projector|layer_weights)\b"),
)
"""Variants of the tensor names."""

# Module of a layer -> name in transformers.
_LINEARS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp_in": "fc1",
    "mlp_out": "fc2",
}
_NORMS = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}


def key_table(config: WhisperConfig) -> KeyTable:
    """Returns the tensor names of a `WhisperModel` for each parameter of a `Whisper`."""
    table = {
        "positions": parameter("encoder.embed_positions.weight"),
        **conv("convolution", "encoder.conv1"),
        **conv("strided_convolution", "encoder.conv2"),
        **norm("norm", "encoder.layer_norm"),
    }
    for path, name in _LINEARS.items():
        table |= linear(
            f"layers/layers/{path}",
            f"encoder.layers.{{}}.{name}",
            config.num_layers,
            bias=path != "attention/key",
        )
    for path, name in _NORMS.items():
        table |= norm(f"layers/layers/{path}", f"encoder.layers.{{}}.{name}", config.num_layers)
    return table
