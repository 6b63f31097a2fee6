"""Whisper's encoder (arXiv 2212.04356), which computes one vector per 20 ms for clips up to 30 s.

The decoder is not implemented. Whisper was trained on clips padded to 30 s with silence, and its
attention includes the silence. Shape letters: B clips, S samples, F frames of 10 ms, M mel bins,
N positions of 20 ms, D hidden size, K heads, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.config_checks import check_at_least, check_rates, invalid_field
from mister_jax.convert.key_table import KeyTable, NameRules, conv, linear, norm, parameter
from mister_jax.encoders import augment, frontends
from mister_jax.encoders.hf_config import EncoderConfig, check_fixed, make_config, read_fields
from mister_jax.encoders.layers import PreNormLayer, dtypes, gelu, layer_norm
from mister_jax.nn import ScannedLayers
from mister_jax.nn.dropout import Dropout, KeySource
from mister_jax.nn.lora import add_lora
from mister_jax.nn.masking import length_mask

SAMPLES_PER_POSITION = 2 * frontends.FRAME_STEP

# Maps the fields of `WhisperConfig` to their names in a config.json and defaults in transformers.
_FIELDS: dict[str, tuple[str, Any]] = {
    "num_mel_bins": ("num_mel_bins", 80),
    "hidden_size": ("d_model", 384),
    "num_layers": ("encoder_layers", 4),
    "num_heads": ("encoder_attention_heads", 6),
    "mlp_dim": ("encoder_ffn_dim", 1536),
    "max_positions": ("max_source_positions", 1500),
    "dropout": ("dropout", 0.0),
    "attention_dropout": ("attention_dropout", 0.0),
    "activation_dropout": ("activation_dropout", 0.0),
}


@dataclasses.dataclass(frozen=True)
class WhisperConfig(EncoderConfig):
    """Config of `Whisper`; the default sizes match large-v3.

    Attributes:
      num_mel_bins: Number of mel bins M.
      hidden_size: Hidden size D; must be even.
      max_positions: Number of positions in a padded clip, 1500 for 30 s.
      trim: Whether to pad clips only to the longest clip in the batch and to mask this padding in
        attention, which saves time and memory. Otherwise, as in the reference, clips are padded to
        `max_positions` and attention includes the padding. The outputs differ, so use the same
        value in training and extraction. In a tiny model with random weights, they differ by 0.3 to
        0.6 standard deviations if clips fill a fifth to a half of `max_positions`.
      dropout: Dropout rate on the transformer's input and each block's output.
      mask_spectrogram: Whether to mask time steps and mel bins in training; see
        `augment.mask_spectrogram`.

    The LoRA targets are "query", "key", "value" and "out" in the attention, and "mlp_in" and
    "mlp_out" in the MLP.
    """

    num_mel_bins: int = 128
    hidden_size: int = 1280
    num_layers: int = 32
    num_heads: int = 20
    mlp_dim: int = 5120
    max_positions: int = 1500
    trim: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    mask_spectrogram: bool = False

    def __post_init__(self):
        sizes = "num_mel_bins hidden_size num_layers num_heads mlp_dim max_positions"
        check_at_least(self, 1, *sizes.split())
        check_rates(self, "dropout", "attention_dropout", "activation_dropout")
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            allowed = f"even multiples of num_heads={self.num_heads}"
            raise invalid_field(self, "hidden_size", allowed)

    @property
    def max_samples(self) -> int:
        """Maximum number of samples in a clip; longer clips are truncated."""
        return self.max_positions * SAMPLES_PER_POSITION

    @classmethod
    def tiny(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper tiny (8M parameters), with `changes`."""
        return cls._with_sizes(384, 4, 6, **changes)

    @classmethod
    def base(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper base (21M parameters), with `changes`."""
        return cls._with_sizes(512, 6, 8, **changes)

    @classmethod
    def small(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper small (88M parameters), with `changes`."""
        return cls._with_sizes(768, 12, 12, **changes)

    @classmethod
    def medium(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper medium (307M parameters), with `changes`."""
        return cls._with_sizes(1024, 24, 16, **changes)

    @classmethod
    def large_v2(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper large-v2 (637M parameters), with `changes`."""
        return cls._with_sizes(1280, 32, 20, **changes)

    @classmethod
    def large_v3(cls, **changes: Any) -> WhisperConfig:
        """Returns the config of Whisper large-v3 (637M parameters), with `changes`."""
        return cls(**changes)

    @classmethod
    def _with_sizes(
        cls, hidden_size: int, num_layers: int, num_heads: int, **changes: Any
    ) -> WhisperConfig:
        sizes = {
            "num_mel_bins": 80,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "mlp_dim": 4 * hidden_size,
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], **changes: Any) -> WhisperConfig:
        """Reads the encoder's fields in a `config.json` with model type "whisper".

        Missing fields have the defaults of transformers. `changes` replace values of the config.

        Raises:
          InputError: The value of a field is not supported.
        """
        check_fixed(config, {"model_type": "whisper", "activation_function": "gelu"})
        fields = read_fields(config, _FIELDS)
        return make_config(cls, fields | changes)


def _sinusoids(num_positions: int, hidden_size: int) -> np.ndarray:
    """Returns sines and cosines with wavelengths from 2 pi to 20,000 pi, [N, D] float32."""
    rates = np.exp(-np.log(10_000) * np.arange(hidden_size // 2) / max(1, hidden_size // 2 - 1))
    angles = np.arange(num_positions)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Whisper(nnx.Module):
    """Whisper encoder.

    Args:
      config: Model config.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        hidden_size, options = config.hidden_size, dtypes(config) | {"rngs": rngs}
        self.config = config
        self.convolution = nnx.Conv(config.num_mel_bins, hidden_size, (3,), padding=1, **options)
        self.strided_convolution = nnx.Conv(
            hidden_size, hidden_size, (3,), strides=2, padding=1, **options
        )
        self.positions = nnx.Param(
            jnp.asarray(_sinusoids(config.max_positions, hidden_size), options["param_dtype"])
        )
        self.dropout = Dropout(config.dropout)
        self.layers = ScannedLayers(
            lambda rngs: PreNormLayer(
                config,
                epsilon=1e-5,
                activation_dropout=config.activation_dropout,
                key_bias=False,
                rngs=rngs,
            ),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = layer_norm(hidden_size, 1e-5, config, rngs)
        if config.lora is not None:
            add_lora(self, config.lora, rngs=rngs)

    def __call__(
        self,
        waveform: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """Encodes clips.

        Args:
          waveform: Mono 16 kHz audio in [-1, 1], [B, S]; padding is ignored. Clips longer than
            `config.max_samples` are truncated.
          lengths: Number of samples in each clip, [B] int.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.
          output_hidden_states: Whether to also return all hidden states.

        Returns:
          Hidden states, [B, N, D], and the mask of valid positions, [B, N] bool. N is
          `max_positions`, or with `trim` the number of positions for S samples. With
          `output_hidden_states`, also all hidden states, [L + 1, B, N, D]: the input of the first
          layer and the output of each layer, before the last LayerNorm.
        """
        mel, mel_lengths = self.mel(waveform, lengths)
        x, mask, layers = self._encode(
            mel,
            mel_lengths,
            deterministic=deterministic,
            rngs=rngs,
            output_hidden_states=output_hidden_states,
        )
        num_positions = self.num_positions(waveform.shape[1])
        x, mask = self.norm(x)[:, :num_positions], mask[:, :num_positions]
        return (x, mask) if layers is None else (x, mask, layers[:, :, :num_positions])

    def num_positions(self, num_samples: int) -> int:
        """Returns the number of positions N for waveforms with S samples."""
        if not self.config.trim:
            return self.config.max_positions
        num_positions = max(1, -(-num_samples // SAMPLES_PER_POSITION))
        return min(num_positions, self.config.max_positions)

    def mel(self, waveform: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes the input of `from_mel`: spectrograms, [B, F, M], and their lengths, [B]."""
        # The receptive field of a clip's last position includes up to two frames after the clip.
        num_frames = 2 * self.num_positions(waveform.shape[1]) + 2
        mel = frontends.log_mel(
            waveform,
            lengths,
            num_mel_bins=self.config.num_mel_bins,
            num_frames=num_frames,
            window_frames=2 * self.config.max_positions,
        )
        return mel, frontends.log_mel_lengths(lengths)

    def from_mel(
        self, mel: jax.Array, lengths: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes spectrograms.

        Args:
          mel: Spectrograms from `frontends.log_mel`, [B, F, M], with F even and at most twice
            `max_positions`. Padding affects the result, so it must be silence.
          lengths: Number of frames in each clip, [B] int.
          **options: Dropout arguments `deterministic` and `rngs`.

        Returns:
          Hidden states, [B, F / 2, D], and the mask of valid positions, [B, F / 2] bool.
        """
        x, mask, _ = self._encode(mel, lengths, **options)
        return self.norm(x), mask

    def _augment(
        self,
        mel: jax.Array,
        lengths: jax.Array,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> jax.Array:
        """Masks parts of the spectrograms in training if `mask_spectrogram` is set."""
        if deterministic or not self.config.mask_spectrogram:
            return mel
        if rngs is None:
            raise ValueError(
                "mask_spectrogram needs rngs (an nnx.Rngs or PerExampleRngs) in training"
            )
        key = rngs.dropout()
        keys = key if key.shape else jax.random.split(key, len(mel))
        return augment.mask_spectrogram(mel, length_mask(lengths, mel.shape[1]), keys)

    def _encode(
        self,
        mel: jax.Array,
        lengths: jax.Array,
        *,
        output_hidden_states: bool = False,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns the last layer's output, the mask and, if requested, all hidden states."""
        num_frames, max_frames = mel.shape[1], 2 * self.config.max_positions
        if num_frames % 2 or num_frames > max_frames:
            raise ValueError(f"{num_frames} frames; allowed: an even number up to {max_frames}")
        mel = self._augment(mel, lengths, **options)
        x = gelu(self.convolution(mel))
        x = gelu(self.strided_convolution(x))  # [B, N, D]
        # The positions are a parameter because checkpoints contain them, but they are not trained.
        # `optim` excludes them from weight decay.
        positions = jax.lax.stop_gradient(self.positions[: x.shape[1]]).astype(x.dtype)
        x = self.dropout(x + positions, **options)
        mask = length_mask(-(-lengths // 2), x.shape[1])
        key_mask = mask if self.config.trim else jnp.ones_like(mask)
        last, layers = self.layers(
            x, key_mask[:, None, None], output_hidden_states=output_hidden_states, **options
        )
        return last, mask, None if layers is None else jnp.concatenate([x[None], layers])


NAME_RULES = NameRules(
    prefixes=("", "model."),
    unused=(r"^decoder\.",),
    # `WhisperForAudioClassification` saves its encoder without a prefix.
    heads=(r"^proj_out\.", r"^(classifier|projector|layer_weights)\b"),
)
"""Variants of tensor names in checkpoints."""

# Maps a layer's modules to their names in transformers.
_LINEARS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp_in": "fc1",
    "mlp_out": "fc2",
}
_NORMS = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}


def key_table(config: WhisperConfig) -> KeyTable:
    """Returns the tensor names in `WhisperModel` for each parameter of `Whisper`."""
    table = {
        "positions": parameter("encoder.embed_positions.weight"),
        **conv("convolution", "encoder.conv1"),
        **conv("strided_convolution", "encoder.conv2"),
        **norm("norm", "encoder.layer_norm"),
    }
    for path, name in _LINEARS.items():
        table |= linear(
            f"layers/layers/{path}",
            f"encoder.layers.{{}}.{name}",
            config.num_layers,
            bias=path != "attention/key",
        )
    for path, name in _NORMS.items():
        table |= norm(f"layers/layers/{path}", f"encoder.layers.{{}}.{name}", config.num_layers)
    return table
