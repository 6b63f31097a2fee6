"""Config of X."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mister_jax.encoders.hf_config import check_positive
from mister_jax.errors import InputError
from mister_jax.nn.scanned_layers import Remat

# What a checkpoint's `cfg` may say of the options that change the architecture.
_SUPPORTED = {
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
      hidden_size: D.
      num_layers: L.
      num_heads: K; divides `hidden_size`.
      mlp_dim: of the feed-forward blocks.
      num_mel_bins: of the filter bank.
      patch_size: frames and Mel bins of a patch.
      patch_dim: of a patch's embedding before it is projected to D.
      position_kernel: taps of the positional convolution.
      position_groups: groups of the positional convolution.
      num_buckets: of relative positions, both directions together.
      max_distance: positions as far as this or farther share a bucket.
      layer_norm_epsilon: of every LayerNorm.
      remat: see `mister_jax.nn.ScannedLayers`.
      dtype: of the computation; attention scores and gates are float32.
      param_dtype: of the parameters.
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
        check_positive(self, _FIELDS)
        for name, divisor in (
            ("hidden_size", "num_heads"),
            ("hidden_size", "position_groups"),
            ("num_mel_bins", "patch_size"),
        ):
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(
                    f"BeatsConfig.{name}={getattr(self, name)}: must be a multiple of "
                    f"{divisor}={getattr(self, divisor)}"
                )

    @classmethod
    def iter3_plus(cls, **changes: Any) -> BeatsConfig:
        """BEATs iter3+ (90 M parameters), with `changes`."""
        return cls(**changes)

    @classmethod
    def from_checkpoint(cls, cfg: Mapping[str, Any], **changes: Any) -> BeatsConfig:
        """Reads the `cfg` of a released checkpoint.

        Its rates of dropout and layer drop are not read: the model is used frozen.

        Args:
          cfg: the mapping.
          **changes: further fields.

        Raises:
          InputError: a field is missing, or has a value no released model has.
        """
        missing = sorted({*_SUPPORTED, *_FIELDS.values()} - set(cfg))
        if missing:
            raise InputError(f"BEATs cfg: no {', '.join(missing)}; all are needed")
        for name, allowed in _SUPPORTED.items():
            if cfg[name] != allowed:
                raise InputError(f"BEATs cfg: {name} {cfg[name]!r}; allowed: {allowed!r}")
        sizes = {field: cfg[name] for field, name in _FIELDS.items()}
        for field, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"BEATs cfg: {_FIELDS[field]} {value!r}; allowed: an integer")
        try:
            return cls(**{**sizes, **changes})
        except ValueError as error:
            raise InputError(f"BEATs cfg: {error}") from error

    @property
    def patches_per_step(self) -> int:
        """Patches that share their frames."""
        return self.num_mel_bins // self.patch_size

    def num_tokens(self, num_frames: Any) -> Any:
        """N of a clip of F frames; works on ints and on arrays."""
        return num_frames // self.patch_size * self.patches_per_step
