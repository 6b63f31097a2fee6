"""BEATs: a transformer over 16 x 16 patches of a Mel filter bank (arXiv 2212.09058).

It reads the normalised filter bank of `features` and gives one vector a patch. The classifier of
the fine-tuned checkpoints is not here. Shape letters: B clips, S samples, F frames, N patches
("tokens", in the order time, then frequency), D width, K heads, W width of a head, L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.encoders import frontends
from mister_jax.encoders.beats.config import BeatsConfig
from mister_jax.encoders.layers import dtypes
from mister_jax.encoders.relative_position import position_buckets
from mister_jax.nn import ScannedLayers
from mister_jax.nn.dropout import KeySource

# Over the filter banks of AudioSet; the models were trained on (x - mean) / (2 deviation).
FBANK_MEAN = 15.41663
FBANK_DEVIATION = 6.55582


def features(waveform: jax.Array, config: BeatsConfig) -> jax.Array:
    """The normalised filter bank that `Beats` reads.

    Args:
      waveform: [B, S] at 16 kHz, full scale 1.
      config: of the model.

    Returns:
      [B, F, Mel bins] float32; a frame depends on its own 400 samples alone.
    """
    fbank = frontends.kaldi_fbank(waveform * 2.0**15, num_mel_bins=config.num_mel_bins)
    return (fbank - FBANK_MEAN) / (2 * FBANK_DEVIATION)


def batch_token_mask(sample_mask: jax.Array, num_frames: int, config: BeatsConfig) -> jax.Array:
    """Which tokens of a padded batch the official code takes for valid.

    It halves the samples into as many equal rows as there are frames, then those into tokens, so
    in clips of a few seconds the edge is not where the frames' is, and a clip's mask depends on
    the batch's length. `config.num_tokens` of a clip's own frames has neither flaw.

    Args:
      sample_mask: true at samples of the clip [B, S] bool.
      num_frames: F of the padded batch.
      config: of the model.

    Returns:
      [B, N] bool; a token is masked if no sample of its row is valid.
    """

    def rows(mask: jax.Array, count: int) -> jax.Array:
        size = mask.shape[1] // count
        return mask[:, : count * size].reshape(mask.shape[0], count, size).any(-1)

    return rows(rows(sample_mask, num_frames), config.num_tokens(num_frames))


class GatedAttention(nnx.Module):
    """Attention whose relative position bias is gated by each query and head.

    The gate reads the projected query (arXiv 2212.09058), not the layer's input as in WavLM.

    Args:
      config: the model's.
    """

    def __init__(self, config: BeatsConfig, *, rngs: nnx.Rngs):
        hidden_size, heads = config.hidden_size, config.num_heads
        options = dtypes(config) | {"rngs": rngs}
        self.num_heads = heads
        self.query = nnx.Linear(hidden_size, hidden_size, **options)
        self.key = nnx.Linear(hidden_size, hidden_size, **options)
        self.value = nnx.Linear(hidden_size, hidden_size, **options)
        self.out = nnx.Linear(hidden_size, hidden_size, **options)
        self.gate = nnx.Linear(hidden_size // heads, 8, **options)
        self.gate_scale = nnx.Param(jnp.ones(heads, options["param_dtype"]))

    def __call__(self, x: jax.Array, mask: jax.Array, position_bias: jax.Array) -> jax.Array:
        """x [B, N, D], mask of keys [B, N] bool, position_bias [K, N, N] float32 (query, key)."""

        def heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*projected.shape[:2], self.num_heads, -1)  # B N K W

        query = heads(self.query(x))
        gates = self.gate(query).astype(jnp.float32)  # B N K 8
        update, reset = jnp.moveaxis(
            jax.nn.sigmoid(gates.reshape(*gates.shape[:-1], 2, 4).sum(-1)), -1, 0
        )  # B N K
        gate = update * (reset * self.gate_scale.astype(jnp.float32) - 1) + 2
        bias = jnp.moveaxis(gate, 1, 2)[..., None] * position_bias  # B K N N
        mixed = jax.nn.dot_product_attention(
            query, heads(self.key(x)), heads(self.value(x)), bias=bias, mask=mask[:, None, None]
        )
        return self.out(mixed.reshape(x.shape))


class BeatsLayer(nnx.Module):
    """Attention and a feed-forward block, a LayerNorm after each, the residual scaled up.

    Args:
      config: the model's.
    """

    def __init__(self, config: BeatsConfig, *, rngs: nnx.Rngs):
        options = dtypes(config) | {"rngs": rngs}
        norm = {"epsilon": config.layer_norm_epsilon, **options}
        self.residual_scale = (2 * config.num_layers) ** 0.25  # arXiv 2203.00555
        self.attention = GatedAttention(config, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(config.hidden_size, **norm)
        self.mlp_in = nnx.Linear(config.hidden_size, config.mlp_dim, **options)
        self.mlp_out = nnx.Linear(config.mlp_dim, config.hidden_size, **options)
        self.mlp_norm = nnx.LayerNorm(config.hidden_size, **norm)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        position_bias: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """x [B, N, D] anew; there is no dropout."""
        attended = self.attention(x, mask, position_bias)
        x = self.attention_norm(self.residual_scale * x + attended)
        transformed = self.mlp_out(jax.nn.gelu(self.mlp_in(x), approximate=False))
        return self.mlp_norm(self.residual_scale * x + transformed)


class Beats(nnx.Module):
    """The encoder.

    Args:
      config: sizes.
      rngs: for the initial parameters.
    """

    def __init__(self, config: BeatsConfig, *, rngs: nnx.Rngs):
        self.config = config
        options = dtypes(config) | {"rngs": rngs}
        norm = {"epsilon": config.layer_norm_epsilon, **options}
        self.patch_embedding = nnx.Linear(
            config.patch_size**2, config.patch_dim, use_bias=False, **options
        )
        self.patch_norm = nnx.LayerNorm(config.patch_dim, **norm)
        self.projection = nnx.Linear(config.patch_dim, config.hidden_size, **options)
        self.position_convolution = nnx.Conv(
            config.hidden_size,
            config.hidden_size,
            (config.position_kernel,),
            padding=[(config.position_kernel // 2, (config.position_kernel - 1) // 2)],
            feature_group_count=config.position_groups,
            **options,
        )
        self.norm = nnx.LayerNorm(config.hidden_size, **norm)
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
          fbank: normalised filter bank [B, F, Mel bins]; frames of an unfinished patch are cut.
          token_mask: true at tokens of the clip [B, N] bool, N = `config.num_tokens(F)`.

        Returns:
          [B, N, D]; at masked tokens finite and without meaning.

        Raises:
          ValueError: the mask has another N.
        """
        config = self.config
        batch, num_frames, _ = fbank.shape
        num_tokens = config.num_tokens(num_frames)
        if token_mask.shape != (batch, num_tokens):
            raise ValueError(
                f"token_mask {token_mask.shape}; {num_frames} frames need {(batch, num_tokens)}"
            )
        size, steps = config.patch_size, num_frames // config.patch_size
        patches = fbank[:, : steps * size].reshape(batch, steps, size, -1, size)
        patches = patches.swapaxes(2, 3).reshape(batch, num_tokens, size * size)
        valid = token_mask[..., None]
        # Masked before, too: a gradient of zero does not undo a value that is not finite.
        x = self.patch_norm(self.patch_embedding(jnp.where(valid, patches, 0)))
        x = jnp.where(valid, self.projection(x), 0)  # B N D
        x = self.norm(x + jax.nn.gelu(self.position_convolution(x), approximate=False))
        return self.layers(x, token_mask, self.relative_bias(num_tokens))[0]

    def relative_bias(self, num_tokens: int) -> jax.Array:
        """The bias before the gates [K, N, N] (query, key), float32."""
        config = self.config
        offsets = np.arange(1 - num_tokens, num_tokens)
        buckets = position_buckets(offsets, config.num_buckets, config.max_distance)
        table = self.position_bias.embedding[...].astype(jnp.float32)[buckets]  # 2N-1 K
        position = jnp.arange(num_tokens)
        place = position - position[:, None] + num_tokens - 1  # N N
        return jnp.moveaxis(table[place], -1, 0)
