"""DistilBERT (arXiv 1910.01108), a BERT with half the layers and without token types.

The module class is `bert.Bert`. This file defines the fields of DistilBERT's config.json and the
names of its tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mister_jax.convert.key_table import KeyTable, NameRules, linear, norm, parameter
from mister_jax.encoders import hf_config
from mister_jax.encoders.bert import BertConfig

# Maps the fields of `DistilBertConfig` to their names in a config.json, and to their defaults in
# transformers or, for required fields, their types.
_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("dim", int),
    "mlp_dim": ("hidden_dim", int),
    "num_layers": ("n_layers", int),
    "num_heads": ("n_heads", int),
    "num_positions": ("max_position_embeddings", int),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
}


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(BertConfig):
    """Config of `bert.Bert` for DistilBERT; the defaults match DistilBERT-base, uncased (66M)."""

    num_layers: int = 6
    num_token_types: int = 0

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], **changes: Any) -> DistilBertConfig:
        """Reads a `config.json` with model type "distilbert"; `changes` replace its values.

        Sinusoidal position embeddings need no option, because checkpoints contain them.

        Raises:
          InputError: A field is missing, or its value is not supported.
        """
        hf_config.check_fixed(config, {"model_type": "distilbert", "activation": "gelu"})
        return hf_config.make_config(cls, hf_config.read_fields(config, _FIELDS) | changes)

    def to_huggingface(self) -> dict[str, Any]:
        """Returns this model's config.json, for `from_huggingface` and transformers."""
        fields = {name: getattr(self, field) for field, (name, _) in _FIELDS.items()}
        return {
            "model_type": "distilbert",
            "architectures": ["DistilBertModel"],
            "activation": "gelu",
            "pad_token_id": 0,
            **fields,
        }


NAME_RULES = NameRules(
    prefixes=("", "distilbert."),
    # Old versions of transformers saved this index buffer.
    unused=(r"^embeddings\.position_ids$",),
    heads=(r"^(vocab_\w+|pre_classifier|classifier|qa_outputs)\.",),
)
"""Variants of tensor names in checkpoints."""

# Maps a layer's modules to their names in a checkpoint.
_PROJECTIONS = {
    "attention/query": "attention.q_lin",
    "attention/key": "attention.k_lin",
    "attention/value": "attention.v_lin",
    "attention/out": "attention.out_lin",
    "mlp_in": "ffn.lin1",
    "mlp_out": "ffn.lin2",
}
_NORMS = {"attention_norm": "sa_layer_norm", "mlp_norm": "output_layer_norm"}


def key_table(config: DistilBertConfig) -> KeyTable:
    """Returns the bare model's tensor names for each parameter of `bert.Bert`."""
    table = {
        "token_embedding/embedding": parameter("embeddings.word_embeddings.weight"),
        "position_embedding/embedding": parameter("embeddings.position_embeddings.weight"),
        **norm("embedding_norm", "embeddings.LayerNorm"),
    }
    for module, name in _PROJECTIONS.items():
        table |= linear(
            f"layers/layers/{module}", f"transformer.layer.{{}}.{name}", config.num_layers
        )
    for module, name in _NORMS.items():
        table |= norm(
            f"layers/layers/{module}", f"transformer.layer.{{}}.{name}", config.num_layers
        )
    return table
