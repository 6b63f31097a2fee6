"""BERT and RoBERTa (arXiv 1810.04805, 1907.11692).

These models are bidirectional text transformers with a LayerNorm after each block. MiniLM
(arXiv 2002.10957) and XLM-RoBERTa have the same architecture. DistilBERT has no token types; see
`distilbert`. The output is one hidden state per token; poolers and language-model heads are not
implemented. Shape letters: B sequences, N tokens, D hidden size, K heads, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.config_checks import check_at_least, check_multiple, check_rates, invalid_field
from mister_jax.convert.key_table import KeyTable, NameRules, linear, norm, parameter
from mister_jax.encoders import hf_config
from mister_jax.encoders.layers import PostNormLayer, embedding, layer_norm
from mister_jax.nn import Dropout, ScannedLayers
from mister_jax.nn.dropout import KeySource
from mister_jax.nn.lora import add_lora
from mister_jax.nn.masking import positions_and_segment_mask

# Padding token by model type, for a config.json without `pad_token_id`.
_PADDING_TOKENS = {"bert": 0, "roberta": 1, "xlm-roberta": 1}
# Options in a config.json that have only one supported value.
_HUGGINGFACE_FIXED = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
# Maps the fields of `BertConfig` to their names in a config.json, and to their defaults in
# transformers or, for required fields, their types.
_SIZES: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("hidden_size", int),
    "mlp_dim": ("intermediate_size", int),
    "num_layers": ("num_hidden_layers", int),
    "num_heads": ("num_attention_heads", int),
    "num_positions": ("max_position_embeddings", int),
    "num_token_types": ("type_vocab_size", 2),
}
_FIELDS = _SIZES | {
    "layer_norm_epsilon": ("layer_norm_eps", 1e-12),
    "dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
}
_LARGE = {"hidden_size": 1024, "mlp_dim": 4096, "num_layers": 24, "num_heads": 16}


@dataclasses.dataclass(frozen=True)
class BertConfig(hf_config.EncoderConfig):
    """Config of `Bert`; the defaults match BERT-base, uncased.

    Attributes:
      vocab_size: Number of rows in the token embedding.
      num_positions: Number of rows in the position embedding.
      num_token_types: Number of rows in the token-type embedding; 0 if there is no such embedding.
      position_offset: Row in the position embedding for the first token. In RoBERTa, this is the ID
        of the padding token plus 1, so the rows before it are unused.
      layer_norm_epsilon: Epsilon of the LayerNorms.
      dropout: Dropout rate on the embeddings and each block's output.

    The LoRA targets are "query", "key", "value" and "attention/out" in the attention, and "mlp_in"
    and "mlp_out" in the MLP.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    num_positions: int = 512
    num_token_types: int = 2
    position_offset: int = 0
    layer_norm_epsilon: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self):
        check_at_least(self, 1, *(name for name in _SIZES if name != "num_token_types"))
        check_at_least(self, 0, "num_token_types")
        check_rates(self, "dropout", "attention_dropout")
        check_multiple(self, "hidden_size", "num_heads")
        if not 0 <= self.position_offset < self.num_positions:
            allowed = f"0 to num_positions - 1, {self.num_positions - 1}"
            raise invalid_field(self, "position_offset", allowed)

    @classmethod
    def bert_base(cls, **changes: Any) -> BertConfig:
        """Returns the config of BERT-base, uncased (110M parameters), with `changes`."""
        return cls(**changes)

    @classmethod
    def bert_large(cls, **changes: Any) -> BertConfig:
        """Returns the config of BERT-large, uncased (335M parameters), with `changes`."""
        return cls(**{**_LARGE, **changes})

    @classmethod
    def roberta_base(cls, **changes: Any) -> BertConfig:
        """Returns the config of RoBERTa-base (125M parameters), with `changes`."""
        fields = {
            "vocab_size": 50265,
            "num_positions": 514,
            "num_token_types": 1,
            "position_offset": 2,
            "layer_norm_epsilon": 1e-5,
        }
        return cls(**{**fields, **changes})

    @classmethod
    def roberta_large(cls, **changes: Any) -> BertConfig:
        """Returns the config of RoBERTa-large (355M parameters), with `changes`."""
        return cls.roberta_base(**{**_LARGE, **changes})

    @classmethod
    def minilm_l6(cls, **changes: Any) -> BertConfig:
        """Returns the config of MiniLM-L6-H384, uncased (23M parameters), with `changes`."""
        sizes = {"hidden_size": 384, "mlp_dim": 1536, "num_layers": 6}
        return cls(**{**sizes, **changes})

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], **changes: Any) -> BertConfig:
        """Reads a `config.json` with model type "bert", "roberta" or "xlm-roberta".

        `changes` replace values of the config.

        Raises:
          InputError: A field is missing, or its value is not supported.
        """
        model_type = config.get("model_type")
        if model_type not in _PADDING_TOKENS:
            raise hf_config.unsupported("model_type", model_type, sorted(_PADDING_TOKENS))
        hf_config.check_fixed(config, _HUGGINGFACE_FIXED)
        fields = hf_config.read_fields(config, _FIELDS)
        if model_type != "bert":
            default = _PADDING_TOKENS[model_type]
            padding = hf_config.read_fields(config, {"token": ("pad_token_id", default)})
            fields["position_offset"] = padding["token"] + 1
        return hf_config.make_config(cls, fields | changes)

    def to_huggingface(self) -> dict[str, Any]:
        """Returns this model's config.json, for `from_huggingface` and transformers."""
        config = {"model_type": "bert", "architectures": ["BertModel"], "pad_token_id": 0}
        if self.position_offset:
            config = {
                "model_type": "roberta",
                "architectures": ["RobertaModel"],
                "pad_token_id": self.position_offset - 1,
            }
        fields = {name: getattr(self, field) for field, (name, _) in _FIELDS.items()}
        return {**config, **_HUGGINGFACE_FIXED, **fields}

    @property
    def max_length(self) -> int:
        """Maximum number of tokens in a sequence."""
        return self.num_positions - self.position_offset


class Bert(nnx.Module):
    """BERT encoder, from tokens to hidden states.

    Args:
      config: Model config.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = embedding(config.vocab_size, config, rngs)
        self.position_embedding = embedding(config.num_positions, config, rngs)
        if config.num_token_types:
            self.token_type_embedding = embedding(config.num_token_types, config, rngs)
        self.embedding_norm = layer_norm(
            config.hidden_size, config.layer_norm_epsilon, config, rngs
        )
        self.dropout = Dropout(config.dropout)
        self.layers = ScannedLayers(
            lambda rngs: PostNormLayer(config, epsilon=config.layer_norm_epsilon, rngs=rngs),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )
        if config.lora is not None:
            add_lora(self, config.lora, rngs=rngs)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Returns the token embeddings, [B, N, D], for tokens, [B, N] int."""
        return self.token_embedding(input_ids)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        token_type_ids: jax.Array | None = None,
        embeddings: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        rngs: KeySource | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """Encodes a batch of sequences.

        A token attends to all tokens in its sequence. Outputs in padding are finite but
        meaningless, and the padding's content does not affect any output.

        Args:
          input_ids: Token IDs, [B, N] int.
          attention_mask: Whether a position has a token, [B, N] bool; padding may be on either
            side. All True by default.
          token_type_ids: Token types, [B, N] int; 0 by default. Ignored by a model without token
            types.
          embeddings: Token embeddings, [B, N, D], instead of `input_ids`.
          positions: Positions counted from 0, without the config's offset, [B, N] int. By default,
            the number of tokens before each token in its sequence, which does not depend on the
            padding.
          segment_ids: Sequence number of each token, [B, N] int, for rows that pack several
            sequences. Adjacent sequences must have different numbers.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.
          output_hidden_states: Whether to also return all hidden states.

        Returns:
          Hidden states of the last layer, [B, N, D]. With `output_hidden_states`, also all hidden
          states, [L + 1, B, N, D]: the normalized embeddings and the output of each layer.

        Raises:
          ValueError: Neither or both of `input_ids` and `embeddings` are given, or a sequence is
            too long. If the positions are traced (under `jax.jit` with `positions` or
            `segment_ids`), a sequence that is too long gets non-finite outputs instead.
        """
        if (input_ids is None) == (embeddings is None):
            raise ValueError("Bert: pass either input_ids or embeddings")
        config = self.config
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        inputs = input_ids if embeddings is None else embeddings
        assert inputs is not None
        shape = inputs.shape[:2]
        mask = jnp.ones(shape, bool) if attention_mask is None else attention_mask
        mask = jnp.asarray(mask).astype(bool)  # [B, N]
        default_positions, same_sequence = positions_and_segment_mask(mask, segment_ids)
        if shape[1] > config.max_length:
            if positions is None and segment_ids is None:
                raise ValueError(f"{shape[1]} tokens; allowed: at most {config.max_length}")
            _check_positions(default_positions if positions is None else positions, mask, config)
        positions = default_positions if positions is None else positions
        if embeddings is None:
            embeddings = self.embed(jnp.where(mask, inputs, 0))

        def look_up(table: nnx.Embed, index: jax.Array) -> jax.Array:
            return table(jnp.where(mask, index, 0)).astype(config.dtype)

        x = jnp.where(mask[..., None], embeddings, 0).astype(config.dtype)  # [B, N, D]
        if config.num_token_types:
            types = jnp.zeros(shape, int) if token_type_ids is None else token_type_ids
            x = x + look_up(self.token_type_embedding, types)
        x = x + look_up(self.position_embedding, positions + config.position_offset)
        x = self.dropout(self.embedding_norm(x), **options)
        last, outputs = self.layers(
            x, same_sequence, output_hidden_states=output_hidden_states, **options
        )
        return last if outputs is None else (last, jnp.concatenate([x[None], outputs]))


def _check_positions(positions: jax.Array, mask: jax.Array, config: BertConfig) -> None:
    """Raises ValueError if a position has no row in the embedding; ignores traced positions."""
    if isinstance(positions, jax.core.Tracer):
        return
    last = int(jnp.where(mask, positions, 0).max())
    if last >= config.max_length:
        raise ValueError(f"a token at position {last}; allowed: below {config.max_length}")


NAME_RULES = NameRules(
    prefixes=("", "bert.", "roberta."),
    # Checkpoints converted from TensorFlow, such as BERT-base, use the names on the left.
    renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    # `Bert` has no pooler. Old versions of transformers saved the two index buffers.
    unused=(r"^pooler\.", r"^embeddings\.(position_ids|token_type_ids)$"),
    heads=(r"^(cls|lm_head|classifier|qa_outputs)\.",),
)
"""Variants of tensor names in checkpoints."""

# Maps modules to their names in a checkpoint.
_EMBEDDINGS = {
    "token_embedding": "word_embeddings",
    "position_embedding": "position_embeddings",
    "token_type_embedding": "token_type_embeddings",
}
# Maps a layer's modules to their names in a checkpoint.
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
    """Returns the bare model's tensor names for each parameter of `Bert`."""
    table = norm("embedding_norm", "embeddings.LayerNorm")
    for module, name in _EMBEDDINGS.items():
        if module == "token_type_embedding" and not config.num_token_types:
            continue
        table[f"{module}/embedding"] = parameter(f"embeddings.{name}.weight")
    for module, name in _PROJECTIONS.items():
        table |= linear(f"layers/layers/{module}", f"encoder.layer.{{}}.{name}", config.num_layers)
    for module, name in _NORMS.items():
        table |= norm(f"layers/layers/{module}", f"encoder.layer.{{}}.{name}", config.num_layers)
    return table
