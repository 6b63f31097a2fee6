"""BERT and RoBERTa checkpoints: where each parameter of a `Bert` is in them."""

from __future__ import annotations

from mister_jax.convert.key_table import KeyTable, Source, layer_names
from mister_jax.encoders.bert import BertConfig

# Tensors of a checkpoint that a `Bert` has no use for: the pooler, the heads of pre-training and
# of fine-tuning, and the row numbers that older versions of transformers saved.
IGNORED = (
    r"(^|\.)pooler\.",
    r"^(cls|lm_head|classifier|qa_outputs)\.",
    r"(^|\.)embeddings\.(position_ids|token_type_ids)$",
)
# What may stand before the table's names: nothing, or the name models with a head have for it.
PREFIXES = ("", "bert.", "roberta.")
# Names that LayerNorm's parameters have in checkpoints made from TensorFlow's, such as BERT-base.
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

_EMBEDDINGS = {
    "token_embedding": "word_embeddings",
    "position_embedding": "position_embeddings",
    "token_type_embedding": "token_type_embeddings",
}
# Our layer's part -> its name in a checkpoint.
_PROJECTIONS = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "hidden": "intermediate.dense",
    "out": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "out_norm": "output.LayerNorm"}


def key_table(config: BertConfig) -> KeyTable:
    """Where the parameters of a `Bert` are in a checkpoint of the bare model."""

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
