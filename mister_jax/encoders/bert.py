"""BERT and RoBERTa: a bidirectional transformer over text, normed after each block.

arXiv 1810.04805 and 1907.11692; MiniLM (arXiv 2002.10957) and XLM-RoBERTa are the same at other
sizes. It gives a hidden state a token; the pooler and the language-model heads of the checkpoints
are not here. Shape letters: B sequences, N tokens, D width, K heads, W width of a head, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.encoders.attention import SelfAttention, token_layout
from mister_jax.encoders.fields import (
    check_fixed,
    check_positive,
    check_rates,
    layer_norm,
    read,
    types_of,
    unsupported,
)
from mister_jax.errors import InputError
from mister_jax.nn import Dropout, ScannedLayers
from mister_jax.nn.attention import Implementation
from mister_jax.nn.dropout import KeySource
from mister_jax.nn.lora import LoRAConfig, LoRALinear, add_lora
from mister_jax.nn.scanned_layers import Remat

# What transformers takes where a config.json lacks a field, by model type. Sizes have no default.
_ROBERTA_DEFAULTS = {"pad_token_id": 1, "type_vocab_size": 2}
_HUGGINGFACE_DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {"pad_token_id": 0, "type_vocab_size": 2},
    "roberta": _ROBERTA_DEFAULTS,
    "xlm-roberta": _ROBERTA_DEFAULTS,
}
# Options that change the architecture, and the one value of each that is supported.
_HUGGINGFACE_FIXED = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
# Field of `BertConfig` -> its name in a config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_positions": "max_position_embeddings",
    "num_token_types": "type_vocab_size",
}
_RATES: dict[str, tuple[str, Any]] = {
    "layer_norm_epsilon": ("layer_norm_eps", 1e-12),
    "dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and options of `Bert`; the defaults are those of BERT-base, uncased.

    Attributes:
      vocab_size: rows of the token embedding.
      hidden_size: D.
      mlp_dim: of the feed-forward blocks.
      num_layers: L.
      num_heads: K; divides `hidden_size`.
      num_positions: rows of the position embedding.
      num_token_types: rows of the token type embedding.
      position_offset: row of the first token's position. RoBERTa's is the padding token's id plus
        1, so its tables have rows that no token uses.
      layer_norm_epsilon: of every LayerNorm.
      dropout: rate on the embeddings and on each block's output before the residual.
      attention_dropout: rate on the attention weights.
      lora: low-rank paths, targets among "query", "key", "value" of the attention, "hidden" of the
        feed-forward block, "out" of both and "attention/out"; None for none.
      remat: see `mister_jax.nn.ScannedLayers`.
      attention_implementation: of `jax.nn.dot_product_attention`, used where dropout is off.
      dtype: of the computation; softmaxes and the norms' statistics are float32.
      param_dtype: of the parameters; those of the low-rank paths are float32.
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
    lora: LoRAConfig | None = None
    remat: Remat = "none"
    attention_implementation: Implementation | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        check_positive(self, _SIZES)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"BertConfig.hidden_size={self.hidden_size}: must be a multiple of "
                f"num_heads={self.num_heads}"
            )
        if not 0 <= self.position_offset < self.num_positions:
            raise ValueError(
                f"BertConfig.position_offset={self.position_offset}: allowed are 0 to "
                f"num_positions - 1, {self.num_positions - 1}"
            )
        check_rates(self, ("dropout", "attention_dropout"))

    @classmethod
    def bert_base(cls, **changes: Any) -> BertConfig:
        """BERT-base, uncased (110 M parameters), with `changes`."""
        return cls(**changes)

    @classmethod
    def bert_large(cls, **changes: Any) -> BertConfig:
        """BERT-large, uncased (335 M parameters), with `changes`."""
        sizes = {"hidden_size": 1024, "mlp_dim": 4096, "num_layers": 24, "num_heads": 16}
        return cls(**{**sizes, **changes})

    @classmethod
    def roberta_base(cls, **changes: Any) -> BertConfig:
        """RoBERTa-base (125 M parameters), with `changes`."""
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
        """RoBERTa-large (355 M parameters), with `changes`."""
        sizes = {"hidden_size": 1024, "mlp_dim": 4096, "num_layers": 24, "num_heads": 16}
        return cls.roberta_base(**{**sizes, **changes})

    @classmethod
    def minilm_l6(cls, **changes: Any) -> BertConfig:
        """MiniLM-L6-H384, uncased (23 M parameters), with `changes`."""
        sizes = {"hidden_size": 384, "mlp_dim": 1536, "num_layers": 6}
        return cls(**{**sizes, **changes})

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], **changes: Any) -> BertConfig:
        """Reads a `config.json` of model type "bert", "roberta" or "xlm-roberta".

        Args:
          config: its content.
          **changes: further fields.

        Raises:
          InputError: a field is missing, or has a value that this architecture does not have.
        """
        model_type = config.get("model_type")
        if model_type not in _HUGGINGFACE_DEFAULTS:
            raise unsupported("model_type", model_type, sorted(_HUGGINGFACE_DEFAULTS))
        check_fixed(config, _HUGGINGFACE_FIXED)
        given = _HUGGINGFACE_DEFAULTS[model_type] | dict(config)
        fields = read(given, {field: (name, int) for field, name in _SIZES.items()} | _RATES)
        if model_type != "bert":
            padding = read(given, {"token": ("pad_token_id", int)})
            fields["position_offset"] = padding["token"] + 1
        try:
            return cls(**{**fields, **changes})
        except ValueError as error:
            raise InputError(f"config.json: no model has its sizes: {error}") from error

    def to_huggingface(self) -> dict[str, Any]:
        """A `config.json` of which `from_huggingface` and transformers make the same model."""
        names = _SIZES | {field: name for field, (name, _) in _RATES.items()}
        kind = {"model_type": "bert", "architectures": ["BertModel"], "pad_token_id": 0}
        if self.position_offset:
            kind = {
                "model_type": "roberta",
                "architectures": ["RobertaModel"],
                "pad_token_id": self.position_offset - 1,
            }
        return {
            **kind,
            **_HUGGINGFACE_FIXED,
            **{name: getattr(self, field) for field, name in names.items()},
        }

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.num_positions - self.position_offset


def _norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layer_norm(config.hidden_size, config.layer_norm_epsilon, config, rngs)


class BertLayer(nnx.Module):
    """Attention and a feed-forward block, each added to its input and normed.

    Args:
      config: the model's.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        options = types_of(config) | {"rngs": rngs}
        self.attention = SelfAttention(
            config.hidden_size,
            config.num_heads,
            dropout=config.attention_dropout,
            implementation=config.attention_implementation,
            **options,
        )
        self.attention_norm = _norm(config, rngs)
        self.mlp_in = LoRALinear(config.hidden_size, config.mlp_dim, **options)
        self.mlp_out = LoRALinear(config.mlp_dim, config.hidden_size, **options)
        self.mlp_norm = _norm(config, rngs)
        self.dropout = Dropout(config.dropout)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """x [B, N, D], mask [B, 1, N, N] bool; gives [B, N, D]."""
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        attended = self.attention(x, mask, **options)
        x = self.attention_norm(x + self.dropout(attended, **options))
        hidden = jax.nn.gelu(self.mlp_in(x, **options), approximate=False)  # B N hidden
        return self.mlp_norm(x + self.dropout(self.mlp_out(hidden, **options), **options))


class Bert(nnx.Module):
    """The encoder, from tokens to hidden states.

    Args:
      config: sizes and options.
      rngs: for the initial parameters.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        # In the parameters' own dtype: a cast of the whole table would cost more than all rows
        # that are read of it.
        param_dtype = jnp.dtype(config.param_dtype)
        options: dict[str, Any] = {"dtype": param_dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, **options)
        self.position_embedding = nnx.Embed(config.num_positions, config.hidden_size, **options)
        self.token_type_embedding = nnx.Embed(config.num_token_types, config.hidden_size, **options)
        self.embedding_norm = _norm(config, rngs)
        self.dropout = Dropout(config.dropout)
        self.layers = ScannedLayers(
            lambda rngs: BertLayer(config, rngs=rngs),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )
        if config.lora is not None:
            add_lora(self, config.lora, rngs=rngs)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Embeddings [B, N, D] of tokens [B, N] int alone, for `embeddings` of a call."""
        return self.token_embedding(input_ids)

    @overload
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
        output_hidden_states: Literal[False] = False,
    ) -> jax.Array: ...

    @overload
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
        output_hidden_states: Literal[True],
    ) -> tuple[jax.Array, jax.Array]: ...

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        *,
        token_type_ids=None,
        embeddings=None,
        positions=None,
        segment_ids=None,
        deterministic=True,
        rngs=None,
        output_hidden_states=False,
    ):
        """Reads a batch of sequences.

        A token sees all of its own sequence, or segment. Values in padding are finite and have no
        meaning, and nothing depends on what the padding holds.

        Args:
          input_ids: tokens [B, N] int.
          attention_mask: true at tokens, false in padding on either side [B, N] bool; all true by
            default.
          token_type_ids: [B, N] int; all 0 by default.
          embeddings: of the tokens [B, N, D] in place of `input_ids`.
          positions: [B, N] int, from 0, before the config's offset. By default the number of
            tokens before in the sequence, or segment: padding is not counted, so a sequence has
            the same positions whether it is padded left or right.
          segment_ids: for several sequences packed in a row, a number that changes from each to
            the next [B, N] int.
          deterministic: no dropout.
          rngs: source of dropout keys in training.
          output_hidden_states: give all hidden states, too.

        Returns:
          The last layer's hidden states [B, N, D]. If `output_hidden_states`, also all hidden states
          [L + 1, B, N, D]: the normed embeddings and what each layer gave.

        Raises:
          ValueError: neither or both of `input_ids` and `embeddings`, or a sequence longer than
            there are positions for. Where `positions` or `segment_ids` are traced, that is not
            known, and what such a sequence gives is not finite.
        """
        if (input_ids is None) == (embeddings is None):
            raise ValueError("BERT reads input_ids or embeddings, one of them")
        config = self.config
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        shape = (embeddings if input_ids is None else input_ids).shape[:2]
        if shape[1] > config.max_length and positions is None and segment_ids is None:
            raise ValueError(f"rows of {shape[1]} tokens; allowed are at most {config.max_length}")
        mask = jnp.ones(shape, bool) if attention_mask is None else attention_mask
        mask = jnp.asarray(mask).astype(bool)  # B N
        found, together = token_layout(mask, segment_ids)  # B N, B 1 N N
        positions = found if positions is None else positions
        if shape[1] > config.max_length and not isinstance(positions, jax.core.Tracer):
            last = int(jnp.where(mask, positions, 0).max())
            if last >= config.max_length:
                raise ValueError(
                    f"a token at position {last}; allowed are those below {config.max_length}"
                )
        if token_type_ids is None:
            token_type_ids = jnp.zeros(shape, int)
        if embeddings is None:
            embeddings = self.embed(jnp.where(mask, input_ids, 0))

        def rows(table: nnx.Embed, index: jax.Array) -> jax.Array:
            return table(jnp.where(mask, index, 0)).astype(config.dtype)

        x = jnp.where(mask[..., None], embeddings, 0).astype(config.dtype)  # B N D
        x = x + rows(self.token_type_embedding, token_type_ids)
        x = x + rows(self.position_embedding, positions + config.position_offset)
        x = self.dropout(self.embedding_norm(x), **options)

        last, given = self.layers(x, together, output_hidden_states=output_hidden_states, **options)
        return (last, jnp.concatenate([x[None], given])) if output_hidden_states else last
