"""Decoder-only transformers used as encoders: Llama 2 and 3, Qwen2 and 2.5, Vicuna.

These models share one architecture: rotary position embedding, grouped-query attention, SwiGLU and
RMSNorm (arXiv 2302.13971, 2407.21783, 2407.10671). The output is one hidden state per token; the
language-model head, the key-value cache and generation are not implemented. Shape letters:
B sequences, N tokens, D hidden size, K query heads, G key and value heads, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mister_jax.config_checks import check_at_least, check_multiple, invalid_field
from mister_jax.convert.key_table import KeyTable, NameRules, linear, norm, parameter
from mister_jax.encoders import hf_config
from mister_jax.encoders.attention import dot_product_attention
from mister_jax.encoders.layers import dtypes, embedding
from mister_jax.nn.dropout import KeySource
from mister_jax.nn.lora import LoRALinear, add_lora
from mister_jax.nn.masking import positions_and_segment_mask
from mister_jax.nn.scanned_layers import SAVED_WITH_MLP, ScannedLayers

# Maps the fields of `DecoderConfig` to their names in a config.json and defaults in transformers.
_LLAMA_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("hidden_size", 4096),
    "mlp_dim": ("intermediate_size", 11008),
    "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
}
_QWEN2_FIELDS: dict[str, tuple[str, Any]] = {
    **_LLAMA_FIELDS,
    "vocab_size": ("vocab_size", 151936),
    "mlp_dim": ("intermediate_size", 22016),
}
# Options in a config.json that have only one supported value.
_FIXED_FIELDS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "use_mrope": False,
    "partial_rotary_factor": 1,
}

_SIZES = "vocab_size hidden_size mlp_dim num_layers num_heads num_key_value_heads head_dim"
# Maps a preset to its values of the fields in `_SIZES`.
_PRESETS = {
    "llama_3_1_8b": (128256, 4096, 14336, 32, 32, 8, 128),
    "llama_3_2_1b": (128256, 2048, 8192, 16, 32, 8, 64),
    "qwen2_5_7b": (152064, 3584, 18944, 28, 28, 4, 128),
    "qwen2_5_0_5b": (151936, 896, 4864, 24, 14, 2, 64),
    "vicuna_7b": (32000, 4096, 11008, 32, 32, 32, 128),
}


def _preset_sizes(name: str) -> dict[str, Any]:
    return dict(zip(_SIZES.split(), _PRESETS[name], strict=True))


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of low RoPE frequencies for long contexts, as in Llama 3.1 (`rope_type` "llama3").

    Frequencies with a wavelength above `original_positions / low_frequency_factor` are divided by
    `factor`. Frequencies with a wavelength below `original_positions / high_frequency_factor` stay
    the same. For the frequencies in between, the scale is interpolated.

    Attributes:
      factor: Divisor of the low frequencies, at least 1.
      low_frequency_factor: Number of rotations in the original context below which a frequency is
        low.
      high_frequency_factor: Number of rotations in the original context above which a frequency is
        high.
      original_positions: Context length before scaling.
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self):
        check_at_least(self, 1, "factor", "original_positions")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor < math.inf:
            allowed = f"positive and below high_frequency_factor={self.high_frequency_factor}"
            raise invalid_field(self, "low_frequency_factor", allowed)


@dataclasses.dataclass(frozen=True)
class DecoderConfig(hf_config.EncoderConfig):
    """Config of `Decoder`.

    Attributes:
      vocab_size: Number of rows in the token embedding.
      num_heads: Number of query heads K.
      num_key_value_heads: Number of key and value heads G; divides K. Each of these heads is shared
        by K / G query heads.
      head_dim: Size of a head; must be even.
      query_key_value_bias: Whether the query, key and value projections have a bias, as in Qwen2.
      rope_theta: Base of the RoPE wavelengths.
      rope_scaling: Scaling of the RoPE frequencies, or None.
      norm_epsilon: Epsilon of the RMSNorms.

    The LoRA targets are "query", "key", "value" and "out" in the attention, and "gate", "up" and
    "down" in the MLP.
    """

    vocab_size: int
    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    query_key_value_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        check_at_least(self, 1, *_SIZES.split())
        check_multiple(self, "num_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise invalid_field(self, "head_dim", "even sizes")
        for name in ("rope_theta", "norm_epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise invalid_field(self, name, "positive numbers")

    @classmethod
    def llama_3_1_8b(cls, **changes: Any) -> DecoderConfig:
        """Returns the config of Llama 3.1 8B (arXiv 2407.21783), with `changes`."""
        rope = {"rope_theta": 500000.0, "rope_scaling": RopeScaling(factor=8.0)}
        return cls(**_preset_sizes("llama_3_1_8b") | rope | changes)

    @classmethod
    def llama_3_2_1b(cls, **changes: Any) -> DecoderConfig:
        """Returns the config of Llama 3.2 1B, with `changes`."""
        rope = {"rope_scaling": RopeScaling(factor=32.0)}
        return cls.llama_3_1_8b(**_preset_sizes("llama_3_2_1b") | rope | changes)

    @classmethod
    def qwen2_5_7b(cls, **changes: Any) -> DecoderConfig:
        """Returns the config of Qwen2.5 7B (arXiv 2412.15115), with `changes`."""
        fields = {"query_key_value_bias": True, "rope_theta": 1000000.0, "norm_epsilon": 1e-6}
        return cls(**_preset_sizes("qwen2_5_7b") | fields | changes)

    @classmethod
    def qwen2_5_0_5b(cls, **changes: Any) -> DecoderConfig:
        """Returns the config of Qwen2.5 0.5B (arXiv 2412.15115), with `changes`."""
        return cls.qwen2_5_7b(**_preset_sizes("qwen2_5_0_5b") | changes)

    @classmethod
    def vicuna_7b(cls, **changes: Any) -> DecoderConfig:
        """Returns the config of Llama 2 7B and Vicuna 7B (arXiv 2307.09288), with `changes`."""
        return cls(**_preset_sizes("vicuna_7b") | changes)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], **changes: Any) -> DecoderConfig:
        """Reads a `config.json` with model type "llama" or "qwen2"; `changes` replace its values.

        Missing fields have the defaults of transformers.

        Raises:
          InputError: The value of a field is not supported.
        """
        model_type = config.get("model_type")
        if model_type not in ("llama", "qwen2"):
            raise hf_config.unsupported("model_type", model_type, "llama, qwen2")
        is_qwen2 = model_type == "qwen2"
        hf_config.check_fixed(config, _FIXED_FIELDS)
        fields = hf_config.read_fields(config, _QWEN2_FIELDS if is_qwen2 else _LLAMA_FIELDS)
        _check_window(config, fields["num_layers"])
        hidden_size, num_heads = fields["hidden_size"], fields["num_heads"]
        head_dim, num_groups = config.get("head_dim"), config.get("num_key_value_heads")
        if head_dim is None:
            if num_heads < 1 or hidden_size % num_heads:
                allowed = f"a multiple of num_attention_heads={num_heads}, or a head_dim"
                raise hf_config.unsupported("hidden_size", hidden_size, allowed)
            head_dim = hidden_size // num_heads
        if num_groups is None:
            default = 32 if is_qwen2 else num_heads
            num_groups = default if "num_key_value_heads" not in config else num_heads
        sizes = {"head_dim": head_dim, "num_key_value_heads": num_groups}
        fields |= hf_config.read_fields(sizes, {name: (name, int) for name in sizes})
        fields |= {"query_key_value_bias": is_qwen2, **_read_rope(config), **changes}
        return hf_config.make_config(cls, fields)


def _check_window(config: Mapping[str, Any], num_layers: int) -> None:
    """Raises InputError if a layer has sliding-window attention."""
    layer_types = config.get("layer_types") or []
    if set(layer_types) - {"full_attention"}:
        raise hf_config.unsupported("layer_types", layer_types, "full_attention in all layers")
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return
    # Without layer types, all layers from `max_window_layers` on have a window.
    if not layer_types and config.get("max_window_layers", 28) < num_layers:
        raise hf_config.unsupported("use_sliding_window", True, False)


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the RoPE fields from a config.json.

    transformers 5 writes `rope_parameters`; older versions write `rope_scaling` and `rope_theta`.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise hf_config.unsupported(name, rope, "one set of parameters for all layers")
    rotated_share = rope.get("partial_rotary_factor", 1)
    if rotated_share != 1:
        raise hf_config.unsupported(f"{name}.partial_rotary_factor", rotated_share, 1)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise hf_config.unsupported(f"{name}.rope_type", rope_type, "default, llama3")
    # As in transformers, a value in a later source replaces the value in an earlier source.
    positions = "original_max_position_embeddings"
    sources = (
        {positions: config.get("max_position_embeddings"), "rope_theta": config.get("rope_theta")},
        rope,
        {positions: config.get(positions)},
    )
    values = {
        key: value for source in sources for key, value in source.items() if value is not None
    }
    fields = hf_config.read_fields(values, {"rope_theta": ("rope_theta", 10000.0)})
    if rope_type == "llama3":
        table = {
            "factor": ("factor", float),
            "low_frequency_factor": ("low_freq_factor", float),
            "high_frequency_factor": ("high_freq_factor", float),
            "original_positions": (positions, int),
        }
        scaling = hf_config.read_fields(values, table, prefix=f"{name}.")
        fields["rope_scaling"] = hf_config.make_config(RopeScaling, scaling)
    return fields


Rotation = tuple[jax.Array, jax.Array]
"""Cosine and sine of the rotation angles, [B, N, 1, head_dim / 2] each."""


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Returns the RoPE frequencies, in radians per position, [head_dim / 2] float32."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        turns = scaling.original_positions * frequencies / (2 * np.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        unscaled_share = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (unscaled_share + (1 - unscaled_share) / scaling.factor)
    return frequencies.astype(np.float32)


def _rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Applies RoPE (arXiv 2104.09864) to x, [B, N, heads, head_dim], in float32."""
    cosine, sine = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class GroupedQueryAttention(nnx.Module):
    """Causal attention in which query heads share key and value heads (arXiv 2305.13245)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.implementation = config.attention_implementation
        query_dim = config.num_heads * config.head_dim
        key_dim = config.num_key_value_heads * config.head_dim
        options = dtypes(config) | {"use_bias": config.query_key_value_bias, "rngs": rngs}
        self.query = LoRALinear(config.hidden_size, query_dim, **options)
        self.key = LoRALinear(config.hidden_size, key_dim, **options)
        self.value = LoRALinear(config.hidden_size, key_dim, **options)
        self.out = LoRALinear(query_dim, config.hidden_size, **options | {"use_bias": False})

    def __call__(
        self, x: jax.Array, mask: jax.Array, rotation: Rotation, **options: Any
    ) -> jax.Array:
        """Transforms x, [B, N, D]; the mask, [B, 1, N, N], must allow a key for every query."""

        def split_heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*x.shape[:2], -1, self.head_dim)

        attended = dot_product_attention(
            _rotate(split_heads(self.query(x, **options)), rotation),  # [B, N, K, head_dim]
            _rotate(split_heads(self.key(x, **options)), rotation),  # [B, N, G, head_dim]
            split_heads(self.value(x, **options)),
            mask=mask,
            is_causal=True,
            implementation=self.implementation,
        )
        return self.out(attended.reshape(*x.shape[:2], -1), **options)


class SwiGLU(nnx.Module):
    """MLP that computes down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        options = dtypes(config) | {"use_bias": False, "rngs": rngs}
        self.gate = LoRALinear(config.hidden_size, config.mlp_dim, **options)
        self.up = LoRALinear(config.hidden_size, config.mlp_dim, **options)
        self.down = LoRALinear(config.mlp_dim, config.hidden_size, **options)

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        """Transforms x, [B, N, D]."""
        gate = checkpoint_name(self.gate(x, **options), SAVED_WITH_MLP)  # [B, N, mlp_dim]
        up = checkpoint_name(self.up(x, **options), SAVED_WITH_MLP)
        hidden = jax.nn.silu(gate) * up
        return self.down(hidden, **options)


class DecoderLayer(nnx.Module):
    """Attention and SwiGLU, each with a preceding RMSNorm and a residual connection."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        options = dtypes(config) | {"epsilon": config.norm_epsilon, "rngs": rngs}
        self.attention_norm = nnx.RMSNorm(config.hidden_size, **options)
        self.attention = GroupedQueryAttention(config, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.hidden_size, **options)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        rotation: Rotation,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Transforms x, [B, N, D]; the mask, [B, 1, N, N], selects the keys of each query."""
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        x = x + self.attention(self.attention_norm(x), mask, rotation, **options)
        return x + self.mlp(self.mlp_norm(x), **options)


class Decoder(nnx.Module):
    """Decoder-only transformer that returns the hidden states of whole sequences.

    Args:
      config: Model config.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = embedding(config.vocab_size, config, rngs)
        self.layers = ScannedLayers(
            lambda rngs: DecoderLayer(config, rngs=rngs),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = nnx.RMSNorm(
            config.hidden_size, epsilon=config.norm_epsilon, rngs=rngs, **dtypes(config)
        )
        if config.lora is not None:
            add_lora(self, config.lora, rngs=rngs)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Returns the token embeddings, [B, N, D], for tokens, [B, N] int."""
        return self.embedding(input_ids).astype(self.config.dtype)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        embeddings: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        rngs: KeySource | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """Encodes a batch of sequences.

        A token attends to itself and to the tokens before it in its sequence. Outputs in padding
        are finite but meaningless, and the padding's content does not affect any output.

        Args:
          input_ids: Token IDs, [B, N] int.
          attention_mask: Whether a position has a token, [B, N] bool; padding may be on either
            side. All True by default.
          embeddings: Token embeddings, [B, N, D], instead of `input_ids`.
          positions: Positions, [B, N] int. By default, the number of tokens before each token in
            its sequence, which does not depend on the padding.
          segment_ids: Sequence number of each token, [B, N] int, for rows that pack several
            sequences. Adjacent sequences must have different numbers.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.
          output_hidden_states: Whether to also return all hidden states.

        Returns:
          Hidden states of the last layer after the final norm, [B, N, D]. With
          `output_hidden_states`, also all hidden states, [L + 1, B, N, D]: the embeddings and the
          output of each layer. As in Hugging Face Transformers, the last layer's output includes
          the final norm.

        Raises:
          ValueError: Neither or both of `input_ids` and `embeddings` are given.
        """
        if (input_ids is None) == (embeddings is None):
            raise ValueError("Decoder: pass either input_ids or embeddings")
        x = embeddings if input_ids is None else self.embed(input_ids)
        assert x is not None
        mask = jnp.ones(x.shape[:2], bool) if attention_mask is None else attention_mask
        mask = jnp.asarray(mask).astype(bool)
        x = jnp.where(mask[..., None], x, 0).astype(self.config.dtype)  # [B, N, D]
        default_positions, same_sequence = positions_and_segment_mask(mask, segment_ids)
        positions = default_positions if positions is None else positions
        frequencies = rope_frequencies(
            self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        )
        angles = positions[..., None, None] * frequencies  # [B, N, 1, head_dim / 2]
        last, outputs = self.layers(
            x,
            same_sequence,
            (jnp.cos(angles), jnp.sin(angles)),
            deterministic=deterministic,
            rngs=rngs,
            output_hidden_states=output_hidden_states,
        )
        last = self.norm(last)
        if outputs is None:
            return last
        return last, jnp.concatenate([x[None], outputs[:-1], last[None]])


NAME_RULES = NameRules(
    # Question-answering models name their backbone "transformer".
    prefixes=("model.", "", "transformer."),
    # Old versions of transformers saved the rotary frequencies.
    unused=(r"(^|\.)rotary_emb\.inv_freq$",),
    heads=(r"^(lm_head|score|qa_outputs)\.",),
)
"""Variants of tensor names in checkpoints."""

# Maps a layer's modules to their names in a checkpoint.
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
    """Returns the names of the checkpoint tensors for each parameter of `Decoder`.

    Args:
      config: Decoder config.
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
