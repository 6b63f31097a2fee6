"""Key table and name rules of Whisper checkpoints in transformers' format, for `Whisper`."""

from __future__ import annotations

from mister_jax.convert.key_table import KeyTable, Source, layer_names
from mister_jax.convert.names import NameRules
from mister_jax.encoders.whisper.config import WhisperConfig

NAME_RULES = NameRules(
    prefixes=("", "model."),
    unused=(r"^decoder\.",),
    # `WhisperForAudioClassification` has its encoder under no prefix.
    heads=(r"^proj_out\.", r"^(classifier|projector|layer_weights)\b"),
)
"""Variants of the tensor names."""

# Module of a layer, or of the encoder -> its name in transformers.
_LINEARS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp_in": "fc1",
    "mlp_out": "fc2",
}
_NORMS = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}
_CONVOLUTIONS = {"convolution": "conv1", "strided_convolution": "conv2"}


def key_table(config: WhisperConfig) -> KeyTable:
    """Returns the tensor names of a `WhisperModel` for each parameter of a `Whisper`."""

    def of_layers(name: str, axes: tuple[int, ...] | None = None) -> Source:
        names = layer_names(f"encoder.layers.{{}}.{name}", config.num_layers)
        return Source(names, axes, stacked=True)

    table = {
        "positions": Source(("encoder.embed_positions.weight",)),
        "norm/scale": Source(("encoder.layer_norm.weight",)),
        "norm/bias": Source(("encoder.layer_norm.bias",)),
    }
    for ours, theirs in _CONVOLUTIONS.items():
        table[f"{ours}/kernel"] = Source((f"encoder.{theirs}.weight",), (2, 1, 0))
        table[f"{ours}/bias"] = Source((f"encoder.{theirs}.bias",))
    for ours, theirs in _LINEARS.items():
        table[f"layers/layers/{ours}/kernel"] = of_layers(f"{theirs}.weight", (1, 0))
        if theirs != "self_attn.k_proj":  # which has no bias
            table[f"layers/layers/{ours}/bias"] = of_layers(f"{theirs}.bias")
    for ours, theirs in _NORMS.items():
        table[f"layers/layers/{ours}/scale"] = of_layers(f"{theirs}.weight")
        table[f"layers/layers/{ours}/bias"] = of_layers(f"{theirs}.bias")
    return table
