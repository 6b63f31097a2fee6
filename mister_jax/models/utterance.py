"""An utterance encoder: a backbone's hidden states, pooled into one vector, classified.

Stage 1 of MiSTER-E (arXiv 2602.23300). The vector that stage 2 reads is `feature`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.nn import AttentiveStatisticsPooling, Dropout, masked_mean
from mister_jax.nn.dropout import KeySource

Pooling = Literal["statistics", "mean", "last"]
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class UtteranceConfig:
    """What stands on the backbone; the defaults are the released text encoder's.

    Attributes:
      num_classes: C.
      feature_dim: F, width of the feature.
      pooling: "statistics" (attentive mean and deviation, see `nn.AttentiveStatisticsPooling`),
        "mean", or "last", the last valid token.
      dropout: rate before the classifier.
      dtype: of the computation, "float32" or "bfloat16".
      param_dtype: of the parameters, likewise.
    """

    num_classes: int
    feature_dim: int = 2048
    pooling: Pooling = "statistics"
    dropout: float = 0.5
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if min(self.num_classes, self.feature_dim) < 1:
            raise ValueError(
                f"UtteranceConfig: num_classes {self.num_classes}, feature_dim {self.feature_dim}; "
                "both must be at least 1"
            )
        if self.pooling not in get_args(Pooling):
            raise ValueError(
                f"UtteranceConfig.pooling={self.pooling!r}: allowed are "
                f"{', '.join(get_args(Pooling))}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"UtteranceConfig.dropout={self.dropout}: allowed are 0 <= rate < 1")
        check_dtypes(self)


def check_dtypes(config: Any) -> None:
    """Raises ValueError if the `dtype` or the `param_dtype` of a config is none of `DTYPES`."""
    for field in ("dtype", "param_dtype"):
        value = getattr(config, field)
        if value not in DTYPES:
            raise ValueError(
                f"{type(config).__name__}.{field}={value!r}: allowed are {', '.join(DTYPES)}"
            )


class UtteranceOutput(NamedTuple):
    """What an utterance encoder gives.

    Attributes:
      logits: [B, C] float32.
      feature: [B, F] float32, the first Linear's output, before its ReLU.
    """

    logits: jax.Array
    feature: jax.Array


class UtteranceHead(nnx.Module):
    """LayerNorm, pooling over valid tokens, Linear (the feature), ReLU, dropout, classifier.

    Args:
      width: D, of the hidden states.
      config: of the head.
    """

    def __init__(self, width: int, config: UtteranceConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype),
            "param_dtype": jnp.dtype(config.param_dtype),
            "rngs": rngs,
        }
        self.config = config
        # A few dimensions of an LLM are far larger than the rest; the fast variance would cancel.
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, **options)
        statistics = config.pooling == "statistics"
        self.pooling = nnx.data(
            AttentiveStatisticsPooling(width, **options) if statistics else None
        )
        self.feature = nnx.Linear(2 * width if statistics else width, config.feature_dim, **options)
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
        """Reads hidden states [B, N, D] where `mask` [B, N] is true; a row may have none."""
        # A padded position may hold anything, and a norm would spread what is not finite.
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
    """A text backbone and its head.

    Args:
      backbone: called as `backbone(input_ids, attention_mask)`, gives hidden states [B, N, D].
      head: of width D.
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
        """Reads token ids [B, N] where `mask` [B, N] bool is true."""
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        hidden = self.backbone(input_ids, mask, **options)
        return self.head(hidden, mask, **options)


class SpeechUtterance(nnx.Module):
    """A speech backbone and its head.

    Args:
      backbone: called as `backbone(waveform, lengths)`, gives hidden states [B, N, D] and which of
        them are valid [B, N] bool.
      head: of width D.
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
        """Reads clips [B, S] at 16 kHz, full scale 1, of `lengths` [B] samples."""
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        hidden, mask = self.backbone(waveform, lengths, **options)
        return self.head(hidden, mask, **options)
