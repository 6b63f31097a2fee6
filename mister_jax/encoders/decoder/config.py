"""Sizes and options of a decoder, and how they are read from a config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mister_jax.config_checks import check_at_least, check_multiple, invalid_field
from mister_jax.encoders.hf_config import check_fixed, read_fields, unsupported
from mister_jax.errors import InputError
from mister_jax.nn.attention import Implementation
from mister_jax.nn.lora import LoRAConfig
from mister_jax.nn.scanned_layers import Remat

# Field of `DecoderConfig` -> its name in a config.json and the default of transformers.
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
# Supported values of the options that change the architecture.
_FIXED_FIELDS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "use_mrope": False,
    "partial_rotary_factor": 1,
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of slow rotations for long contexts, as in Llama 3.1 (`rope_type` "llama3").

    Rotations whose wavelength is above `original_positions / low_frequency_factor` are slowed by
    `factor`, those below `original_positions / high_frequency_factor` are kept, and those between
    are interpolated.

    Attributes:
      factor: Factor of the slow rotations' wavelengths, at least 1.
      low_frequency_factor: Number of turns in the original context below which a rotation is slow.
      high_frequency_factor: Number of turns above which a rotation is fast.
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
class DecoderConfig:
    """Sizes and options of `Decoder`.

    Attributes:
      vocab_size: Number of rows of the embedding.
      hidden_size: Hidden size D.
      mlp_dim: Hidden size of the SwiGLU blocks.
      num_layers: Number of layers L.
      num_heads: Number of query heads K.
      num_key_value_heads: Number of key and value heads G, each shared by K / G query heads;
        divides K.
      head_dim: Size of a head, even.
      query_key_value_bias: Whether these three projections have a bias, as in Qwen2.
      rope_theta: Base of the rotations' wavelengths.
      rope_scaling: Scaling of the rotations, or None.
      norm_epsilon: Epsilon of the RMSNorms.
      lora: Low-rank paths, or None. Targets are "query", "key", "value" and "out" of the attention
        and "gate", "up" and "down" of the SwiGLU.
      remat: Rematerialization, see `mister_jax.nn.ScannedLayers`.
      attention_implementation: Implementation of `jax.nn.dot_product_attention`.
      dtype: Type of the computation; rotations, softmaxes and statistics of norms are float32.
      param_dtype: Type of the parameters; low-rank paths are float32.
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
        check_at_least(self, 1, *sizes.split())
        check_multiple(self, "num_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise invalid_field(self, "head_dim", "even sizes")
        for name in ("rope_theta", "norm_epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise invalid_field(self, name, "positive numbers")

    @classmethod
    def llama_3_1_8b(cls, **changes: Any) -> DecoderConfig:
        """Returns the config of Llama 3.1 8B (arXiv 2407.21783), with `changes`."""
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
        """Returns the config of Llama 3.2 1B, with `changes`."""
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
        """Returns the config of Qwen2.5 7B (arXiv 2412.15115), with `changes`."""
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
        """Returns the config of Qwen2.5 0.5B (arXiv 2412.15115), with `changes`."""
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
        """Returns the config of Llama 2 7B and Vicuna 7B (arXiv 2307.09288), with `changes`."""
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
        """Reads a config.json of model type "llama" or "qwen2".

        Args:
          config: Content of the file; absent fields have the defaults of transformers.
          **changes: Further fields.

        Raises:
          InputError: A field has a value that this architecture does not support.
        """
        model_type = config.get("model_type")
        if model_type not in ("llama", "qwen2"):
            raise unsupported("model_type", model_type, "llama, qwen2")
        is_qwen2 = model_type == "qwen2"
        check_fixed(config, _FIXED_FIELDS)
        fields = read_fields(config, _QWEN2_FIELDS if is_qwen2 else _LLAMA_FIELDS)
        _check_window(config, fields["num_layers"])
        hidden_size, num_heads = fields["hidden_size"], fields["num_heads"]
        head_dim, num_groups = config.get("head_dim"), config.get("num_key_value_heads")
        if head_dim is None:
            if num_heads < 1 or hidden_size % num_heads:
                allowed = f"a multiple of num_attention_heads={num_heads}, or a head_dim"
                raise unsupported("hidden_size", hidden_size, allowed)
            head_dim = hidden_size // num_heads
        if num_groups is None:
            default = 32 if is_qwen2 else num_heads
            num_groups = default if "num_key_value_heads" not in config else num_heads
        sizes = {"head_dim": head_dim, "num_key_value_heads": num_groups}
        fields |= read_fields(sizes, {name: (name, int) for name in sizes})
        try:
            return cls(
                **{**fields, "query_key_value_bias": is_qwen2, **_read_rope(config), **changes}
            )
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"config.json: {error}") from error


def _check_window(config: Mapping[str, Any], num_layers: int) -> None:
    """Raises InputError if a layer has sliding-window attention."""
    layer_types = config.get("layer_types") or []
    if set(layer_types) - {"full_attention"}:
        raise unsupported("layer_types", layer_types, "full_attention in all layers")
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return
    # Without layer types, the layers from `max_window_layers` on have a window.
    if not layer_types and config.get("max_window_layers", 28) < num_layers:
        raise unsupported("use_sliding_window", True, False)


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the fields of the rotations from a config.json.

    transformers 5 writes them to `rope_parameters`, older versions to `rope_scaling` and
    `rope_theta`.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise unsupported(name, rope, "one set of parameters for all layers")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise unsupported(f"{name}.partial_rotary_factor", rope["partial_rotary_factor"], 1)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise unsupported(f"{name}.rope_type", rope_type, "default, llama3")
    # In the order of precedence of transformers, the last source wins.
    positions = "original_max_position_embeddings"
    sources = (
        {positions: config.get("max_position_embeddings"), "rope_theta": config.get("rope_theta")},
        rope,
        {positions: config.get(positions)},
    )
    values = {
        key: value for source in sources for key, value in source.items() if value is not None
    }
    fields = read_fields(values, {"rope_theta": ("rope_theta", 10000.0)})
    if rope_type == "llama3":
        table = {
            "factor": ("factor", float),
            "low_frequency_factor": ("low_freq_factor", float),
            "high_frequency_factor": ("high_freq_factor", float),
            "original_positions": (positions, int),
        }
        fields["rope_scaling"] = RopeScaling(**read_fields(values, table, prefix=f"{name}."))
    return fields
