"""Key table and name rules of Llama, Qwen2 and Vicuna checkpoints, for `Decoder`."""

from __future__ import annotations

from mister_jax.convert.key_table import KeyTable, Source, layer_names
from mister_jax.convert.names import NameRules
from mister_jax.encoders.decoder import DecoderConfig

NAME_RULES = NameRules(
    # Models for question answering call their backbone "transformer".
    prefixes=("model.", "", "transformer."),
    # Old versions of transformers saved the rotary frequencies.
    unused=(r"(^|\.)rotary_emb\.inv_freq$",),
    heads=(r"^(lm_head|score|qa_outputs)\.",),
)
"""Variants of the tensor names; the key table's prefix is "" with them."""

# Module of a layer -> its name in a checkpoint.
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
    """Returns the tensor names for each parameter of a `Decoder`.

    Args:
      config: Config of the decoder.
      prefix: Prefix of all names, "model." in a checkpoint with a language-model head, "" in one
        of the bare model.
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
