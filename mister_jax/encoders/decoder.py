"""Decoder-only transformers read as encoders: Llama 2 and 3, Qwen2 and 2.5, Vicuna.

One architecture, told apart by its config: rotary positions, grouped-query attention, SwiGLU and
RMSNorm (arXiv 2302.13971, 2407.21783, 2407.10671). It gives hidden states; it has no language-model
head and no cache, and generates nothing. Shape letters: B sequences, N tokens, D width, K query
heads, G key and value heads, W width of a head, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.encoders.attention import token_layout
from mister_jax.encoders.fields import check_positive, types_of, unsupported
from mister_jax.errors import InputError
from mister_jax.nn.attention import Implementation
from mister_jax.nn.dropout import KeySource
from mister_jax.nn.lora import LoRAConfig, LoRALinear, add_lora
from mister_jax.nn.scanned_layers import Remat, ScannedLayers

Rotation = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of slow rotations (`rope_type` "llama3"), for long contexts.

    Rotations whose wavelength is above `original_positions / low_frequency_factor` are slowed by
    `factor`, those below `original_positions / high_frequency_factor` stay, and those between go
    smoothly from one to the other.

    Attributes:
      factor: at least 1.
      low_frequency_factor: positive.
      high_frequency_factor: above `low_frequency_factor`.
      original_positions: context length before the stretch.
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"RopeScaling.factor={self.factor}: must be at least 1")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                f"RopeScaling.low_frequency_factor={self.low_frequency_factor}: must be positive "
                f"and below high_frequency_factor={self.high_frequency_factor}"
            )
        if self.original_positions < 1:
            raise ValueError(
                f"RopeScaling.original_positions={self.original_positions}: must be at least 1"
            )


# Fields of a config.json that may be absent -> what transformers takes then.
_HUGGINGFACE_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-6,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
    },
}
# Fields with one value that this architecture has.
_HUGGINGFACE_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "use_mrope": False,
    "partial_rotary_factor": 1,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of `Decoder`.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: D.
      mlp_dim: hidden units of the SwiGLU.
      num_layers: L.
      num_heads: K, of the queries.
      num_key_value_heads: G; divides K, and each serves K / G query heads.
      head_dim: W, even.
      query_key_value_bias: Qwen2's bias on these three projections.
      rope_theta: base of the rotations' wavelengths.
      rope_scaling: Llama 3.1's, or None.
      norm_epsilon: of every RMSNorm.
      lora: low-rank paths, targets among "query", "key", "value", "out" of the attention and
        "gate", "up", "down" of the SwiGLU; None for none.
      remat: what the backward pass computes anew: "none" of it, "full" for all, "dots" for all but
        matrix products with parameters.
      attention_implementation: of `jax.nn.dot_product_attention`.
      dtype: of the computation; rotations, softmaxes and the norms' statistics are float32.
      param_dtype: of the parameters; those of the low-rank paths are float32.
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
    lora: LoRAConfig | None = None
    remat: Remat = "none"
    attention_implementation: Implementation | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        sizes = "vocab_size hidden_size mlp_dim num_layers num_heads num_key_value_heads head_dim"
        check_positive(self, sizes.split())
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"DecoderConfig.num_heads={self.num_heads}: must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim={self.head_dim}: must be even")
        for name in ("rope_theta", "norm_epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"DecoderConfig.{name}={getattr(self, name)}: must be positive")

    @classmethod
    def llama_3_1_8b(cls, **changes: Any) -> DecoderConfig:
        """Llama 3.1 8B (arXiv 2407.21783), with `changes`."""
        sizes: dict[str, Any] = {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "mlp_dim": 14336,
            "num_layers": 32,
            "num_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_theta": 500000.0,
            "rope_scaling": RopeScaling(factor=8.0),
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def llama_3_2_1b(cls, **changes: Any) -> DecoderConfig:
        """Llama 3.2 1B, with `changes`."""
        sizes: dict[str, Any] = {
            "hidden_size": 2048,
            "mlp_dim": 8192,
            "num_layers": 16,
            "head_dim": 64,
            "rope_scaling": RopeScaling(factor=32.0),
        }
        return cls.llama_3_1_8b(**{**sizes, **changes})

    @classmethod
    def qwen2_5_7b(cls, **changes: Any) -> DecoderConfig:
        """Qwen2.5 7B (arXiv 2412.15115), with `changes`."""
        sizes: dict[str, Any] = {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "mlp_dim": 18944,
            "num_layers": 28,
            "num_heads": 28,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "query_key_value_bias": True,
            "rope_theta": 1000000.0,
            "norm_epsilon": 1e-6,
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def qwen2_5_0_5b(cls, **changes: Any) -> DecoderConfig:
        """Qwen2.5 0.5B (arXiv 2412.15115), with `changes`."""
        sizes: dict[str, Any] = {
            "vocab_size": 151936,
            "hidden_size": 896,
            "mlp_dim": 4864,
            "num_layers": 24,
            "num_heads": 14,
            "num_key_value_heads": 2,
            "head_dim": 64,
        }
        return cls.qwen2_5_7b(**{**sizes, **changes})

    @classmethod
    def vicuna_7b(cls, **changes: Any) -> DecoderConfig:
        """Vicuna 7B v1.5, which is Llama 2 7B in size (arXiv 2307.09288), with `changes`."""
        sizes: dict[str, Any] = {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "mlp_dim": 11008,
            "num_layers": 32,
            "num_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], **changes: Any) -> DecoderConfig:
        """Reads a `config.json` of model type "llama" or "qwen2", with `changes`.

        Absent fields have the values transformers gives them.

        Raises:
          InputError: a field with a value that this architecture does not have.
        """
        model_type = config.get("model_type")
        if model_type not in _HUGGINGFACE_DEFAULTS:
            raise unsupported("model_type", model_type, sorted(_HUGGINGFACE_DEFAULTS))
        for name, allowed in _HUGGINGFACE_FIXED.items():
            value = config.get(name)
            if value is not None and value != allowed:
                raise unsupported(name, value, allowed)
        given = _HUGGINGFACE_DEFAULTS[model_type] | dict(config)
        hidden_size = _number(given, "hidden_size", int)
        num_heads = _number(given, "num_attention_heads", int)
        num_layers = _number(given, "num_hidden_layers", int)
        _check_window(given)
        if given.get("num_key_value_heads") is None:
            given["num_key_value_heads"] = num_heads
        if given.get("head_dim") is None:
            if hidden_size % num_heads:
                allowed = f"a multiple of num_attention_heads={num_heads}, or head_dim be given"
                raise unsupported("hidden_size", hidden_size, allowed)
            given["head_dim"] = hidden_size // num_heads
        fields = {
            "vocab_size": _number(given, "vocab_size", int),
            "hidden_size": hidden_size,
            "mlp_dim": _number(given, "intermediate_size", int),
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_key_value_heads": _number(given, "num_key_value_heads", int),
            "head_dim": _number(given, "head_dim", int),
            "query_key_value_bias": model_type == "qwen2",
            "norm_epsilon": _number(given, "rms_norm_eps", float),
        }
        try:
            return cls(**{**fields, **_rope(given), **changes})
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"config.json: no decoder has its sizes: {error}") from error


def _number(config: Mapping[str, Any], field: str, kind: type[int] | type[float]) -> Any:
    value = config.get(field.rpartition(".")[2])
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise unsupported(field, value, "a number")
    if not 0 < value < math.inf or value != kind(value):
        raise unsupported(
            field, value, "a positive integer" if kind is int else "a positive number"
        )
    return kind(value)


def _check_window(config: Mapping[str, Any]) -> None:
    layer_types = config.get("layer_types") or []
    if set(layer_types) - {"full_attention"}:
        raise unsupported("layer_types", layer_types, "full_attention in all layers")
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return
    # Unless the layers' types are given, those from this one on have a window.
    if not layer_types and config.get("max_window_layers", 28) < config["num_hidden_layers"]:
        raise unsupported("use_sliding_window", True, False)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the rotations: from `rope_parameters`, or `rope_scaling` and `rope_theta`."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise unsupported(field, rope, "one set of parameters for all layers")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise unsupported(f"{field}.partial_rotary_factor", rope["partial_rotary_factor"], 1)
    # The later of these wins.
    theta = {"rope_theta": 10000.0}
    positions = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    for values, sources in ((theta, (config, rope)), (positions, (rope, config))):
        for source in sources:
            values.update({name: source[name] for name in values if source.get(name) is not None})
    fields: dict[str, Any] = {"rope_theta": _number(theta, "rope_theta", float)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise unsupported(f"{field}.rope_type", kind, "default or llama3")
    if kind == "llama3":
        fields["rope_scaling"] = RopeScaling(
            factor=_number(rope, f"{field}.factor", float),
            low_frequency_factor=_number(rope, f"{field}.low_freq_factor", float),
            high_frequency_factor=_number(rope, f"{field}.high_freq_factor", float),
            original_positions=_number(positions, f"{field}.original_max_position_embeddings", int),
        )
    return fields


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians a position by which each pair of a head's units turns [W / 2] float32."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        # Turns in the original context: few for a slow rotation.
        turns = scaling.original_positions * frequencies / (2 * np.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def _rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns x [B, N, heads, W] by its positions (arXiv 2104.09864), in float32."""
    cosine, sine = rotation  # B N 1 W/2
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class GroupedQueryAttention(nnx.Module):
    """Causal attention in which several query heads share a key and value head (arXiv 2305.13245).

    Args:
      config: the model's.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.implementation = config.attention_implementation
        queries = config.num_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        options = types_of(config) | {"use_bias": config.query_key_value_bias, "rngs": rngs}
        self.query = LoRALinear(config.hidden_size, queries, **options)
        self.key = LoRALinear(config.hidden_size, keys, **options)
        self.value = LoRALinear(config.hidden_size, keys, **options)
        self.out = LoRALinear(queries, config.hidden_size, **options | {"use_bias": False})

    def __call__(
        self, x: jax.Array, mask: jax.Array, rotation: Rotation, **options: Any
    ) -> jax.Array:
        """x [B, N, D], mask [B, 1, N, N] bool with a key for every query; gives [B, N, D]."""

        def heads(x: jax.Array, number: int) -> jax.Array:
            return x.reshape(*x.shape[:2], number, -1)

        query = heads(self.query(x, **options), self.num_heads)  # B N K W
        key = heads(self.key(x, **options), self.num_key_value_heads)  # B N G W
        value = heads(self.value(x, **options), self.num_key_value_heads)  # B N G W
        mixed = jax.nn.dot_product_attention(
            _rotate(query, rotation),
            _rotate(key, rotation),
            value,
            mask=mask,
            is_causal=True,
            implementation=self.implementation,
        )
        return self.out(mixed.reshape(*x.shape[:2], -1), **options)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202).

    Args:
      config: the model's.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        options = types_of(config) | {"use_bias": False, "rngs": rngs}
        self.gate = LoRALinear(config.hidden_size, config.mlp_dim, **options)
        self.up = LoRALinear(config.hidden_size, config.mlp_dim, **options)
        self.down = LoRALinear(config.mlp_dim, config.hidden_size, **options)

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        """[B, N, D] to [B, N, D]."""
        hidden = jax.nn.silu(self.gate(x, **options)) * self.up(x, **options)
        return self.down(hidden, **options)


class DecoderLayer(nnx.Module):
    """Attention and SwiGLU, each on a normed input and added to it.

    Args:
      config: the model's.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        options = types_of(config) | {"epsilon": config.norm_epsilon, "rngs": rngs}
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
        """x [B, N, D], mask [B, 1, N, N] bool; gives [B, N, D]."""
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        x = x + self.attention(self.attention_norm(x), mask, rotation, **options)
        return x + self.mlp(self.mlp_norm(x), **options)


class Decoder(nnx.Module):
    """A decoder-only transformer that gives the hidden states of whole sequences.

    Args:
      config: sizes and options.
      rngs: for the initial parameters.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        param_dtype = jnp.dtype(config.param_dtype)
        # In the parameters' own dtype: a cast of the whole table would cost more than all rows
        # that are read of it.
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=param_dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.layers = ScannedLayers(
            lambda rngs: DecoderLayer(config, rngs=rngs),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = nnx.RMSNorm(
            config.hidden_size, epsilon=config.norm_epsilon, rngs=rngs, **types_of(config)
        )
        if config.lora is not None:
            add_lora(self, config.lora, rngs=rngs)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Embeddings [B, N, D] of tokens [B, N] int, for `embeddings` of a call."""
        return self.embedding(input_ids).astype(self.config.dtype)

    @overload
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
        output_hidden_states: Literal[False] = False,
    ) -> jax.Array: ...

    @overload
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
        output_hidden_states: Literal[True],
    ) -> tuple[jax.Array, jax.Array]: ...

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        *,
        embeddings=None,
        positions=None,
        segment_ids=None,
        deterministic=True,
        rngs=None,
        output_hidden_states=False,
    ):
        """Reads a batch of sequences.

        A token sees those before it in its own sequence, or segment, and itself. Values in padding
        are finite and have no meaning, and nothing depends on what the padding holds.

        Args:
          input_ids: tokens [B, N] int.
          attention_mask: true at tokens, false in padding on either side [B, N] bool; all true by
            default.
          embeddings: [B, N, D] in place of `input_ids`.
          positions: [B, N] int. By default the number of tokens before in the sequence, or
            segment: padding is not counted, so a sequence has the same positions whether it is
            padded left or right.
          segment_ids: for several sequences packed in a row, a number that changes from each to
            the next [B, N] int.
          deterministic: no dropout.
          rngs: source of dropout keys in training.
          output_hidden_states: give all hidden states, too.

        Returns:
          The last layer's hidden states after the final norm [B, N, D]. If `output_hidden_states`, also all
          hidden states [L + 1, B, N, D]: the embeddings and what each layer gave, of which the
          last is normed, as in transformers.

        Raises:
          ValueError: neither or both of `input_ids` and `embeddings`.
        """
        if (input_ids is None) == (embeddings is None):
            raise ValueError("a decoder reads input_ids or embeddings, one of them")
        x = self.embed(input_ids) if embeddings is None else embeddings
        mask = jnp.ones(x.shape[:2], bool) if attention_mask is None else attention_mask
        mask = jnp.asarray(mask).astype(bool)
        x = jnp.where(mask[..., None], x, 0).astype(self.config.dtype)  # B N D

        found, together = token_layout(mask, segment_ids)  # B N, B 1 N N
        positions = found if positions is None else positions
        frequencies = rope_frequencies(
            self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        )
        angles = positions[..., None, None] * frequencies  # B N 1 W/2

        last, given = self.layers(
            x,
            together,
            (jnp.cos(angles), jnp.sin(angles)),
            deterministic=deterministic,
            rngs=rngs,
            output_hidden_states=output_hidden_states,
        )
        last = self.norm(last)
        if not output_hidden_states:
            return last
        return last, jnp.concatenate([x[None], given[:-1], last[None]])
