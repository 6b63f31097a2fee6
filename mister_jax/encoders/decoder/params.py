"""Key table and name rules of Llama, Qwen2 and Vicuna checkpoints."""

from __future__ import annotations

from mister_jax.convert.key_table import KeyTable, NameRules, linear, norm, parameter
from mister_jax.encoders.decoder.config import DecoderConfig

NAME_RULES = NameRules(
    # Question-answering models call their backbone "transformer".
    prefixes=("model.", "", "transformer."),
    # Old versions of transformers saved the rotary frequencies.
    unused=(r"(^|\.)rotary_emb\.inv_freq$",),
    heads=(r"^(lm_head|score|qa_outputs)\.",),
)
"""Variants of the tensor names in checkpoints."""

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
_BIASES = ("attention/query", "attention/key", "attention/value")


def key_table(config: DecoderConfig, prefix: str = "") -> KeyTable:
    """Returns the tensor names for each parameter of a `Decoder`.

    Args:
      config: Config of the decoder.
      prefix: Prefix of all names: "" for the bare model, "model." with a language-model head.
    """
    layer = f"{prefix}layers.{{}}"
    table = norm("norm", f"{prefix}norm", bias=False)
    table["embedding/embedding"] = parameter(f"{prefix}embed_tokens.weight")
    for module, name in _NORMS.items():
        table |= norm(f"layers/layers/{module}", f"{layer}.{name}", config.num_layers, bias=False)
    for module, name in _PROJECTIONS.items():
        bias = config.query_key_value_bias and module in _BIASES
        path = f"layers/layers/{module}"
        table |= linear(path, f"{layer}.{name}", config.num_layers, bias=bias)
    return table
