"""MiSTER-E's experts: one context network per modality and a cross-modal network.

Shape letters: B dialogues, T utterances, D feature size, H context size, F fusion size, C classes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.models.config import MisterEConfig
from mister_jax.nn import GRU, CoAttentionLayer, Dropout, ParallelConvolution, run_grus
from mister_jax.nn.dropout import KeySource


class ContextExpert(nnx.Module):
    """Context network and classifier for one modality.

    The context is GRU(convolutions(x)) + skip(x), with parallel convolutions, a bidirectional GRU
    and a linear skip connection.

    Args:
      feature_dim: Size D of the input vectors.
      config: Model config.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, feature_dim: int, config: MisterEConfig, *, rngs: nnx.Rngs):
        context_dim = config.context_dim
        options: dict[str, Any] = config.types | {"rngs": rngs}
        self.dropout = Dropout(config.context_dropout)
        self.convolution = nnx.data(
            ParallelConvolution(feature_dim, context_dim, config.kernel_sizes, **options)
            if config.kernel_sizes
            else None
        )
        self.gru = nnx.data(
            GRU(
                context_dim if config.kernel_sizes else feature_dim,
                context_dim // 2,
                config.gru_layers,
                dropout=config.context_dropout,
                **options,
            )
            if config.gru_layers
            else None
        )
        self.skip = nnx.Linear(feature_dim, context_dim, **options)
        self.classifier = nnx.Linear(context_dim, config.num_classes, **options)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the expert's class logits and its context.

        Args:
          x: One finite vector per utterance, [B, T, D].
          mask: Valid utterances, [B, T] bool.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.

        Returns:
          Logits [B, T, C] float32 and context [B, T, H].
        """
        (output,) = apply_context_experts(
            (self,), (x,), mask, deterministic=deterministic, rngs=rngs
        )
        return output


def apply_context_experts(
    experts: tuple[ContextExpert, ...],
    inputs: tuple[jax.Array, ...],
    mask: jax.Array,
    *,
    deterministic: bool = True,
    rngs: KeySource | None = None,
) -> list[tuple[jax.Array, jax.Array]]:
    """Applies context experts with the same config; their GRUs share one scan per layer.

    Args:
      experts: Context experts.
      inputs: One input per expert, [B, T, D]; see `ContextExpert.__call__`.
      mask: Valid utterances, [B, T] bool.
      deterministic: Whether to disable dropout.
      rngs: Source of dropout keys.

    Returns:
      Logits and context of each expert.
    """
    options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
    hidden = []
    for expert, x in zip(experts, inputs, strict=True):
        if expert.convolution is not None:
            x = expert.dropout(expert.convolution(x, mask), **options)  # B T H
        hidden.append(x)
    grus = [expert.gru for expert in experts if expert.gru is not None]
    if grus:
        hidden = run_grus(grus, hidden, mask, **options)
    outputs = []
    for expert, x, hidden_x in zip(experts, inputs, hidden, strict=True):
        context = expert.skip(x)  # B T H
        if expert.gru is not None or expert.convolution is not None:
            context = context + hidden_x
        logits = expert.classifier(expert.dropout(context, **options)).astype(jnp.float32)
        outputs.append((logits, context))
    return outputs


class CrossModalExpert(nnx.Module):
    """Co-attention between a dialogue's speech and text, and a classifier on both streams.

    Args:
      config: Model config.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, config: MisterEConfig, *, rngs: nnx.Rngs):
        fusion_dim = config.fusion_dim
        options: dict[str, Any] = config.types | {"rngs": rngs}
        self.speech_in = nnx.Linear(config.speech_dim, fusion_dim, **options)
        self.text_in = nnx.Linear(config.text_dim, fusion_dim, **options)
        self.layers = nnx.List(
            CoAttentionLayer(
                fusion_dim,
                attention_dim=config.attention_dim,
                num_heads=config.attention_heads,
                attention_dropout=config.attention_dropout,
                dropout=config.fusion_dropout,
                epsilon=config.layer_norm_epsilon,
                implementation=config.attention_implementation,
                **options,
            )
            for _ in range(config.fusion_layers)
        )
        self.speech_skip = nnx.Linear(config.speech_dim, fusion_dim, **options)
        self.text_skip = nnx.Linear(config.text_dim, fusion_dim, **options)
        self.norm = nnx.LayerNorm(2 * fusion_dim, epsilon=config.layer_norm_epsilon, **options)
        self.context_dropout = Dropout(config.context_dropout)
        self.gru = nnx.data(
            GRU(
                2 * fusion_dim,
                fusion_dim // 2,
                config.fusion_gru_layers,
                dropout=config.context_dropout,
                **options,
            )
            if config.fusion_gru_layers
            else None
        )
        self.projection = nnx.Linear(2 * fusion_dim, fusion_dim, **options)
        self.dropout = Dropout(config.classifier_dropout)
        self.classifier = nnx.Linear(fusion_dim, config.num_classes, **options)

    def __call__(
        self,
        speech: jax.Array,
        text: jax.Array,
        speech_present: jax.Array,
        text_present: jax.Array,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes the expert's class logits and its representations of speech and text.

        Args:
          speech: Finite speech vectors, [B, T, D].
          text: Finite text vectors, [B, T, D].
          speech_present: Utterances whose speech may be attended to, [B, T] bool.
          text_present: Utterances whose text may be attended to, [B, T] bool.
          mask: Valid utterances, [B, T] bool; the GRU skips all others. By default, an utterance is
            valid if it has speech or text.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys.

        Returns:
          Logits [B, T, C] float32, speech representation [B, T, F], text representation [B, T, F].
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        speech_stream, text_stream = self.speech_in(speech), self.text_in(text)  # B T F
        for layer in self.layers:
            speech_stream, text_stream = layer(
                speech_stream, text_stream, speech_present, text_present, **options
            )
        speech_repr = speech_stream + self.speech_skip(speech)
        text_repr = text_stream + self.text_skip(text)
        joint = self.norm(jnp.concatenate([text_repr, speech_repr], axis=-1))  # B T 2F
        hidden = self.projection(joint)  # B T F
        if self.gru is not None:
            steps = speech_present | text_present if mask is None else mask
            hidden = hidden + self.gru(self.context_dropout(joint, **options), steps, **options)
        hidden = self.dropout(jax.nn.relu(hidden), **options)
        return self.classifier(hidden).astype(jnp.float32), speech_repr, text_repr
