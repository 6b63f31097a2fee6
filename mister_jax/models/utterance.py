"""Utterance models, which pool a backbone's hidden states into a vector and classify this vector.

This is stage 1 of MiSTER-E (arXiv 2602.23300). Stage 2 takes the vector `UtteranceOutput.feature`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.config_checks import check_at_least, check_choice, check_dtypes, check_rates
from mister_jax.nn import AttentiveStatisticsPooling, Dropout, masked_mean
from mister_jax.nn.dropout import KeySource

Pooling = Literal["statistics", "mean", "last"]


@dataclasses.dataclass(frozen=True)
class UtteranceConfig:
    """Options of an utterance head; the defaults match the released text encoder.

    Attributes:
      num_classes: Number of classes C.
      feature_dim: Size F of the feature vector.
      pooling: "statistics" (see `nn.AttentiveStatisticsPooling`), "mean", or "last" (the last valid
        token).
      dropout: Dropout rate before the classifier.
      dtype: Computation dtype, "float32" or "bfloat16".
      param_dtype: Parameter dtype, "float32" or "bfloat16".
    """

    num_classes: int
    feature_dim: int = 2048
    pooling: Pooling = "statistics"
    dropout: float = 0.5
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        check_at_least(self, 1, "num_classes", "feature_dim")
        check_choice(self, "pooling", get_args(Pooling))
        check_rates(self, "dropout")
        check_dtypes(self)


class UtteranceOutput(NamedTuple):
    """Output of an utterance model.

    Attributes:
      logits: Class logits, [B, C] float32.
      feature: Feature vector, [B, F] float32; the output of the first linear layer, before the
        ReLU.
    """

    logits: jax.Array
    feature: jax.Array


class UtteranceHead(nnx.Module):
    """LayerNorm, pooling over valid tokens, linear layer (feature), ReLU, dropout, classifier.

    Args:
      hidden_dim: Size D of the backbone's hidden states.
      config: Options of the head.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, hidden_dim: int, config: UtteranceConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype),
            "param_dtype": jnp.dtype(config.param_dtype),
            "rngs": rngs,
        }
        self.config = config
        # A few dimensions of an LLM's hidden states are far larger than the others, so the fast
        # variance E[x^2] - E[x]^2 would lose precision by cancellation.
        self.norm = nnx.LayerNorm(hidden_dim, epsilon=1e-5, use_fast_variance=False, **options)
        statistics = config.pooling == "statistics"
        self.pooling = nnx.data(
            AttentiveStatisticsPooling(hidden_dim, **options) if statistics else None
        )
        pooled_dim = 2 * hidden_dim if statistics else hidden_dim
        self.feature = nnx.Linear(pooled_dim, config.feature_dim, **options)
        self.dropout = Dropout(config.dropout)
        self.classifier = nnx.Linear(config.feature_dim, config.num_classes, **options)

    def __call__(
        self,
        hidden: jax.Array,
        mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> UtteranceOutput:
        """Classifies utterances from a backbone's hidden states.

        Args:
          hidden: Hidden states, [B, N, D].
          mask: Valid hidden states, [B, N] bool; a row may have none.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.
        """
        # NaN or infinity in the padding would cause NaN gradients in the norm.
        hidden = self.norm(jnp.where(mask[..., None], hidden, 0))  # B N D
        if self.pooling is not None:
            pooled = self.pooling(hidden, mask)  # B 2D
        elif self.config.pooling == "mean":
            pooled = masked_mean(hidden, mask)  # B D
        else:
            last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # B
            pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # B D
        feature = self.feature(pooled)  # B F
        dropped = self.dropout(jax.nn.relu(feature), deterministic=deterministic, rngs=rngs)
        logits = self.classifier(dropped)  # B C
        return UtteranceOutput(logits.astype(jnp.float32), feature.astype(jnp.float32))


class TextUtterance(nnx.Module):
    """Text backbone with an utterance head.

    Args:
      backbone: Module called as `backbone(input_ids, attention_mask)` that returns hidden states
        [B, N, D].
      head: Head for hidden states of size D.
    """

    def __init__(self, backbone: nnx.Module, head: UtteranceHead):
        self.backbone = backbone
        self.head = head

    def __call__(
        self,
        input_ids: jax.Array,
        mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> UtteranceOutput:
        """Classifies token sequences.

        Args:
          input_ids: Token IDs, [B, N] int.
          mask: Valid tokens, [B, N] bool.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        hidden = self.backbone(input_ids, mask, **options)
        return self.head(hidden, mask, **options)


class SpeechUtterance(nnx.Module):
    """Speech backbone with an utterance head.

    Args:
      backbone: Module called as `backbone(waveform, lengths)` that returns hidden states
        [B, N, D] and the mask of valid states, [B, N] bool.
      head: Head for hidden states of size D.
    """

    def __init__(self, backbone: nnx.Module, head: UtteranceHead):
        self.backbone = backbone
        self.head = head

    def __call__(
        self,
        waveform: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> UtteranceOutput:
        """Classifies clips.

        Args:
          waveform: Mono 16 kHz audio in [-1, 1], [B, S].
          lengths: Number of samples of each clip, [B] int.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        hidden, mask = self.backbone(waveform, lengths, **options)
        return self.head(hidden, mask, **options)
