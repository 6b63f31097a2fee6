"""BEATs: a transformer over 16 x 16 patches of a mel filter bank (arXiv 2212.09058).

BEATs maps the standardized filter bank from `compute_fbank` to one vector per patch. The classifier
in the fine-tuned checkpoints is not implemented. Shape letters: B clips, S samples, F frames,
N tokens (one per patch, ordered by time, then by frequency), D hidden size, K heads, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.config_checks import check_at_least, invalid_field
from mister_jax.convert import key_table as keys
from mister_jax.encoders import frontends
from mister_jax.encoders.attention import dot_product_attention
from mister_jax.encoders.hf_config import make_config
from mister_jax.encoders.layers import dtypes, gelu, relative_bias, relative_gate
from mister_jax.errors import InputError
from mister_jax.nn import ScannedLayers
from mister_jax.nn.scanned_layers import Remat

# Options in a checkpoint's `cfg` that have only one supported value.
_FIXED_FIELDS = {
    "layer_norm_first": False,
    "conv_bias": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "deep_norm": True,
    "activation_fn": "gelu",
}
# Maps the fields of `BeatsConfig` to their names in a checkpoint's `cfg`.
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
    """Config of `Beats`; the defaults match all released BEATs models.

    Attributes:
      hidden_size: Hidden size D.
      num_layers: Number of layers L.
      num_heads: Number of heads K; divides `hidden_size`.
      mlp_dim: Hidden size of the feed-forward blocks.
      num_mel_bins: Number of mel bins in the filter bank; a multiple of `patch_size`.
      patch_size: Size of a square patch, both in frames and in mel bins.
      patch_dim: Size of a patch's embedding before the projection to D.
      position_kernel: Kernel size of the positional convolution.
      position_groups: Number of groups of the positional convolution; divides `hidden_size`.
      num_buckets: Total number of relative-position buckets for both directions.
      max_distance: Distance beyond which positions share the last bucket of their direction.
      layer_norm_epsilon: Epsilon of all LayerNorms.
      remat: Rematerialization policy; see `mister_jax.nn.ScannedLayers`.
      dtype: Computation dtype; attention scores and gates are float32.
      param_dtype: Parameter dtype.
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
                raise invalid_field(self, name, f"multiples of {divisor}={getattr(self, divisor)}")

    @classmethod
    def iter3_plus(cls, **changes: Any) -> BeatsConfig:
        """Returns the config of BEATs iter3+ (90M parameters), with `changes`."""
        return cls(**changes)

    @classmethod
    def from_checkpoint(cls, cfg: Mapping[str, Any], **changes: Any) -> BeatsConfig:
        """Creates a config from the `cfg` in a released checkpoint.

        Dropout and layer-drop rates are ignored, because the model is always frozen.

        Raises:
          InputError: A field is missing, or its value is not supported.
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
        return make_config(cls, sizes | changes, "BEATs cfg")

    @property
    def patches_per_step(self) -> int:
        """Number of patches per time step."""
        return self.num_mel_bins // self.patch_size

    def num_tokens(self, num_frames: Any) -> Any:
        """Returns the number of tokens N in a clip with F frames, for an int or an array."""
        return num_frames // self.patch_size * self.patches_per_step


# Statistics of the filter bank over AudioSet. The models were trained on (x - mean) / (2 std).
FBANK_MEAN = 15.41663
FBANK_STD = 6.55582


def compute_fbank(waveform: jax.Array, config: BeatsConfig) -> jax.Array:
    """Computes the standardized filter bank that `Beats` takes as input.

    Args:
      waveform: Mono 16 kHz audio in [-1, 1], [B, S].
      config: Model config.

    Returns:
      Filter bank, [B, F, num_mel_bins] float32. Each frame depends only on the 400 samples in it.
    """
    fbank = frontends.kaldi_fbank(waveform * 2.0**15, num_mel_bins=config.num_mel_bins)
    return (fbank - FBANK_MEAN) / (2 * FBANK_STD)


class GatedAttention(nnx.Module):
    """Attention with a relative position bias that is gated per query and head.

    The gate depends on the projected query (arXiv 2212.09058). WavLM's gate instead depends on the
    input of the attention.
    """

    def __init__(self, config: BeatsConfig, *, rngs: nnx.Rngs):
        hidden_size, num_heads = config.hidden_size, config.num_heads
        options = dtypes(config) | {"rngs": rngs}
        self.num_heads = num_heads
        self.query = nnx.Linear(hidden_size, hidden_size, **options)
        self.key = nnx.Linear(hidden_size, hidden_size, **options)
        self.value = nnx.Linear(hidden_size, hidden_size, **options)
        self.out = nnx.Linear(hidden_size, hidden_size, **options)
        self.gate = nnx.Linear(hidden_size // num_heads, 8, **options)
        self.gate_scale = nnx.Param(jnp.ones(num_heads, options["param_dtype"]))

    def __call__(self, x: jax.Array, mask: jax.Array, position_bias: jax.Array) -> jax.Array:
        """Computes attention within each clip.

        Args:
          x: Input, [B, N, D].
          mask: Keys that may be attended to, [B, N] bool.
          position_bias: Bias for each query and key, [K, N, N] float32.

        Returns:
          Output, [B, N, D].
        """

        def split_heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*projected.shape[:2], self.num_heads, -1)

        query = split_heads(self.query(x))  # [B, N, K, head_dim]
        gate = relative_gate(self.gate(query), self.gate_scale[...])  # [B, K, N, 1]
        attended = dot_product_attention(
            query,
            split_heads(self.key(x)),
            split_heads(self.value(x)),
            mask=mask[:, None, None],
            bias=(gate, position_bias[None]),
        )
        return self.out(attended.reshape(x.shape))


class BeatsLayer(nnx.Module):
    """Attention and an MLP, each followed by a scaled residual connection and a LayerNorm."""

    def __init__(self, config: BeatsConfig, *, rngs: nnx.Rngs):
        options = dtypes(config) | {"rngs": rngs}
        norm_options = {"epsilon": config.layer_norm_epsilon, **options}
        self.residual_scale = (2 * config.num_layers) ** 0.25  # DeepNorm, arXiv 2203.00555
        self.attention = GatedAttention(config, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(config.hidden_size, **norm_options)
        self.mlp_in = nnx.Linear(config.hidden_size, config.mlp_dim, **options)
        self.mlp_out = nnx.Linear(config.mlp_dim, config.hidden_size, **options)
        self.mlp_norm = nnx.LayerNorm(config.hidden_size, **norm_options)

    def __call__(
        self, x: jax.Array, mask: jax.Array, position_bias: jax.Array, **_: Any
    ) -> jax.Array:
        """Transforms x, [B, N, D]; `**_` are dropout arguments, which have no effect."""
        attended = self.attention(x, mask, position_bias)
        x = self.attention_norm(self.residual_scale * x + attended)
        hidden = gelu(self.mlp_in(x))
        return self.mlp_norm(self.residual_scale * x + self.mlp_out(hidden))


class Beats(nnx.Module):
    """BEATs encoder.

    Args:
      config: Model config.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, config: BeatsConfig, *, rngs: nnx.Rngs):
        self.config = config
        options = dtypes(config) | {"rngs": rngs}
        norm_options = {"epsilon": config.layer_norm_epsilon, **options}
        self.patch_embedding = nnx.Linear(
            config.patch_size**2, config.patch_dim, use_bias=False, **options
        )
        self.patch_norm = nnx.LayerNorm(config.patch_dim, **norm_options)
        self.projection = nnx.Linear(config.patch_dim, config.hidden_size, **options)
        self.position_convolution = nnx.Conv(
            config.hidden_size,
            config.hidden_size,
            (config.position_kernel,),
            padding=[(config.position_kernel // 2, (config.position_kernel - 1) // 2)],
            feature_group_count=config.position_groups,
            **options,
        )
        self.norm = nnx.LayerNorm(config.hidden_size, **norm_options)
        self.position_bias = nnx.Embed(config.num_buckets, config.num_heads, **options)
        self.layers = ScannedLayers(
            lambda rngs: BeatsLayer(config, rngs=rngs),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )

    def __call__(self, fbank: jax.Array, token_mask: jax.Array) -> jax.Array:
        """Encodes clips.

        Args:
          fbank: Filter bank from `compute_fbank`, [B, F, num_mel_bins]; frames after the last
            complete patch are ignored.
          token_mask: Valid tokens, [B, N] bool, with N = `config.num_tokens(F)`.

        Returns:
          Hidden states, [B, N, D]; finite but meaningless at masked tokens.

        Raises:
          ValueError: The mask has a wrong shape.
        """
        config = self.config
        batch_size, num_frames, _ = fbank.shape
        num_tokens = config.num_tokens(num_frames)
        if token_mask.shape != (batch_size, num_tokens):
            raise ValueError(
                f"token_mask {token_mask.shape}; allowed: {(batch_size, num_tokens)} for "
                f"{num_frames} frames"
            )
        size, num_steps = config.patch_size, num_frames // config.patch_size
        patches = fbank[:, : num_steps * size].reshape(batch_size, num_steps, size, -1, size)
        patches = patches.swapaxes(2, 3).reshape(batch_size, num_tokens, size * size)
        valid = token_mask[..., None]
        # The patches are masked too: NaN or infinity in the padding would cause NaN gradients.
        x = self.patch_norm(self.patch_embedding(jnp.where(valid, patches, 0)))
        x = jnp.where(valid, self.projection(x), 0)  # [B, N, D]
        x = self.norm(x + gelu(self.position_convolution(x)))
        return self.layers(x, token_mask, self.relative_bias(num_tokens))[0]

    def relative_bias(self, num_tokens: int) -> jax.Array:
        """Returns the position bias of each query and key before gating, [K, N, N] float32."""
        return relative_bias(self.position_bias, self.config, num_tokens)


IGNORED = (
    r"(^|\.)predictor\.",
    # Copies of the first layer's position bias.
    r"(^|\.)encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight$",
)
"""Regular expressions for tensors that `Beats` does not need: the classifier and duplicates."""

# Maps a layer's modules to their names in a checkpoint.
_LINEARS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "attention/gate": "self_attn.grep_linear",
    "mlp_in": "fc1",
    "mlp_out": "fc2",
}
_NORMS = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}


def key_table(config: BeatsConfig) -> keys.KeyTable:
    """Returns the tensor names in a checkpoint's `model` for each parameter of `Beats`."""
    size, num_layers = config.patch_size, config.num_layers

    def flatten_patches(weights: list[np.ndarray]) -> np.ndarray:
        return weights[0].reshape(-1, size * size).T  # patch_dim 1 P P -> P*P patch_dim

    def unflatten_patches(kernel: np.ndarray) -> list[np.ndarray]:
        return [kernel.T.reshape(-1, 1, size, size)]

    table = {
        "patch_embedding/kernel": keys.Source(
            ("patch_embedding.weight",), combine=flatten_patches, split=unflatten_patches
        ),
        "position_bias/embedding": keys.parameter(
            "encoder.layers.0.self_attn.relative_attention_bias.weight"
        ),
        "layers/layers/attention/gate_scale": keys.Source(
            keys.layer_names("encoder.layers.{}.self_attn.grep_a", num_layers),
            stacked=True,
            combine=lambda scales: scales[0].reshape(-1),
            split=lambda scale: [scale.reshape(1, -1, 1, 1)],
        ),
        **keys.norm("patch_norm", "layer_norm"),
        **keys.linear("projection", "post_extract_proj"),
        **keys.weight_norm_conv("position_convolution", "encoder.pos_conv.0"),
        **keys.norm("norm", "encoder.layer_norm"),
    }
    for path, name in _LINEARS.items():
        table |= keys.linear(f"layers/layers/{path}", f"encoder.layers.{{}}.{name}", num_layers)
    for path, name in _NORMS.items():
        table |= keys.norm(f"layers/layers/{path}", f"encoder.layers.{{}}.{name}", num_layers)
    return table
