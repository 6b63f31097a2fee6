"""Sizes of BEATs, and how they are read from a released checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mister_jax.config_checks import check_at_least
from mister_jax.errors import InputError
from mister_jax.nn.scanned_layers import Remat

# Supported values of the options in a checkpoint's `cfg` that change the architecture.
_FIXED_FIELDS = {
    "layer_norm_first": False,
    "conv_bias": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "deep_norm": True,
    "activation_fn": "gelu",
}
# Field of `BeatsConfig` -> its name in a checkpoint's `cfg`.
_FIELDS = {
    "hidden_size": "encoder_embed_dim",
    "num_layers": "encoder_layers",
    "num_heads": "encoder_attention_heads",
    "mlp_dim": "encoder_ffn_embed_dim",
    "patch_dim": "embed_dim",
    "patch_size": "input_patch_size",
    "position_kernel": "conv_pos",
    "position_groups": "conv_pos_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_distance",
}


@dataclasses.dataclass(frozen=True)
class BeatsConfig:
    """Sizes of `Beats`; the defaults are those of all released BEATs.

    Attributes:
      hidden_size: Hidden size D.
      num_layers: Number of layers L.
      num_heads: Number of heads K; divides `hidden_size`.
      mlp_dim: Hidden size of the feed-forward blocks.
      num_mel_bins: Number of mel bins of the filter bank; a multiple of `patch_size`.
      patch_size: Size of a square patch, both in frames and in mel bins.
      patch_dim: Size of a patch's embedding before it is projected to D.
      position_kernel: Kernel size of the positional convolution.
      position_groups: Groups of the positional convolution; divides `hidden_size`.
      num_buckets: Total number of relative-position buckets for both directions.
      max_distance: Distance beyond which positions share the last bucket of their direction.
      layer_norm_epsilon: Epsilon of all LayerNorms.
      remat: Rematerialization, see `mister_jax.nn.ScannedLayers`.
      dtype: Type of the computation; attention scores and gates are float32.
      param_dtype: Type of the parameters.
    """

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_mel_bins: int = 128
    patch_size: int = 16
    patch_dim: int = 512
    position_kernel: int = 128
    position_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    layer_norm_epsilon: float = 1e-5
    remat: Remat = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        check_at_least(self, 1, *_FIELDS)
        for name, divisor in (
            ("hidden_size", "num_heads"),
            ("hidden_size", "position_groups"),
            ("num_mel_bins", "patch_size"),
        ):
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(
                    f"BeatsConfig.{name}={getattr(self, name)}; allowed: multiples of "
                    f"{divisor}={getattr(self, divisor)}"
                )

    @classmethod
    def iter3_plus(cls, **changes: Any) -> BeatsConfig:
        """Returns the config of BEATs iter3+ (90 M parameters), with `changes`."""
        return cls(**changes)

    @classmethod
    def from_checkpoint(cls, cfg: Mapping[str, Any], **changes: Any) -> BeatsConfig:
        """Reads the `cfg` of a released checkpoint.

        Its rates of dropout and layer drop are not read, since the model is used frozen.

        Args:
          cfg: Content of the checkpoint's `cfg`.
          **changes: Further fields of the config.

        Raises:
          InputError: A field is missing, or has a value that no released model has.
        """
        missing = sorted({*_FIXED_FIELDS, *_FIELDS.values()} - set(cfg))
        if missing:
            raise InputError(f"BEATs cfg: missing fields {', '.join(missing)}")
        for name, allowed in _FIXED_FIELDS.items():
            if cfg[name] != allowed:
                raise InputError(f"BEATs cfg: {name}={cfg[name]!r}; allowed: {allowed!r}")
        sizes = {field: cfg[name] for field, name in _FIELDS.items()}
        for field, value in sizes.items():
            if type(value) is not int:
                raise InputError(f"BEATs cfg: {_FIELDS[field]}={value!r}; allowed: an integer")
        try:
            return cls(**{**sizes, **changes})
        except ValueError as error:
            raise InputError(f"BEATs cfg: {error}") from error

    @property
    def patches_per_step(self) -> int:
        """Number of patches that cover the same frames."""
        return self.num_mel_bins // self.patch_size

    def num_tokens(self, num_frames: Any) -> Any:
        """Returns the number of tokens N of a clip of F frames, for an int or an array."""
        return num_frames // self.patch_size * self.patches_per_step
