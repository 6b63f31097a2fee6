"""Key table and name rules of BERT and RoBERTa checkpoints, for `Bert`."""

from __future__ import annotations

from mister_jax.convert.key_table import KeyTable, Source, layer_names
from mister_jax.convert.names import NameRules
from mister_jax.encoders.bert import BertConfig

NAME_RULES = NameRules(
    prefixes=("", "bert.", "roberta."),
    # Checkpoints converted from TensorFlow, such as BERT-base, have the names on the left.
    renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    # The indices are buffers that old versions of transformers saved.
    unused=(r"^pooler\.", r"^embeddings\.(position_ids|token_type_ids)$"),
    heads=(r"^(cls|lm_head|classifier|qa_outputs)\.",),
)
"""Variants of the tensor names."""

_EMBEDDINGS = {
    "token_embedding": "word_embeddings",
    "position_embedding": "position_embeddings",
    "token_type_embedding": "token_type_embeddings",
}
# Module of a layer -> its name in a checkpoint.
_PROJECTIONS = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}


def key_table(config: BertConfig) -> KeyTable:
    """Returns the tensor names of the bare model for each parameter of a `Bert`."""

    def layers(name: str, axes: tuple[int, ...] | None = None) -> Source:
        names = layer_names(f"encoder.layer.{{}}.{name}", config.num_layers)
        return Source(names, axes=axes, stacked=True)

    table = {
        f"{ours}/embedding": Source((f"embeddings.{theirs}.weight",))
        for ours, theirs in _EMBEDDINGS.items()
    }
    table["embedding_norm/scale"] = Source(("embeddings.LayerNorm.weight",))
    table["embedding_norm/bias"] = Source(("embeddings.LayerNorm.bias",))
    for ours, theirs in _PROJECTIONS.items():
        table[f"layers/layers/{ours}/kernel"] = layers(f"{theirs}.weight", axes=(1, 0))
        table[f"layers/layers/{ours}/bias"] = layers(f"{theirs}.bias")
    for ours, theirs in _NORMS.items():
        table[f"layers/layers/{ours}/scale"] = layers(f"{theirs}.weight")
        table[f"layers/layers/{ours}/bias"] = layers(f"{theirs}.bias")
    return table
