"""Llama, Qwen2 and Vicuna checkpoints: where each parameter of a `Decoder` is in them."""

from __future__ import annotations

from mister_jax.convert.key_table import KeyTable, Source, layer_names
from mister_jax.encoders.decoder import DecoderConfig

# Tensors of a checkpoint that a `Decoder` has no use for.
IGNORED = (r"(^|\.)lm_head\.weight$", r"(^|\.)rotary_emb\.inv_freq$")

# Our layer's part -> its name in a checkpoint.
_PROJECTIONS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_WITH_BIAS = ("attention/query", "attention/key", "attention/value")


def key_table(config: DecoderConfig, prefix: str = "model.") -> KeyTable:
    """Where the parameters of a `Decoder` are in a checkpoint.

    Args:
      config: the decoder's.
      prefix: of all names: "model." in checkpoints with a language-model head, "" in those
        without one, such as "language_model.model." inside another model.
    """

    def layers(name: str, axes: tuple[int, ...] | None = None) -> Source:
        pattern = f"{prefix}layers.{{}}.{name}"
        return Source(layer_names(pattern, config.num_layers), axes=axes, stacked=True)

    table = {
        "embedding/embedding": Source((f"{prefix}embed_tokens.weight",)),
        "norm/scale": Source((f"{prefix}norm.weight",)),
    }
    for ours, theirs in _NORMS.items():
        table[f"layers/layers/{ours}/scale"] = layers(f"{theirs}.weight")
    for ours, theirs in _PROJECTIONS.items():
        table[f"layers/layers/{ours}/kernel"] = layers(f"{theirs}.weight", axes=(1, 0))
    if config.query_key_value_bias:
        for ours in _WITH_BIAS:
            table[f"layers/layers/{ours}/bias"] = layers(f"{_PROJECTIONS[ours]}.bias")
    return table
