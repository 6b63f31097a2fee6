"""MiSTER-E's experts: one context network per modality and a cross-modal network.

Shape letters: B dialogues, T utterances, D feature size, H context size, F fusion size, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.models.config import MisterEConfig
from mister_jax.nn import GRU, CoAttentionLayer, Dropout, ParallelConvolution, run_grus
from mister_jax.nn.attention import CoAttentionState
from mister_jax.nn.dropout import KeySource


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContextState:
    """State of a causal `ContextExpert` between utterances.

    Attributes:
      convolution: State of the convolutions, or None without convolutions.
      gru: State of the GRU, or None without a GRU.
    """

    convolution: Any
    gru: Any


class ContextExpert(nnx.Module):
    """Context network and classifier for one modality.

    The context is GRU(convolutions(x)) + skip(x), with parallel convolutions, a bidirectional GRU
    and a linear skip connection. In a causal model, the GRU has only the forward direction.

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
            ParallelConvolution(
                feature_dim, context_dim, config.kernel_sizes, causal=config.causal, **options
            )
            if config.kernel_sizes
            else None
        )
        self.gru = nnx.data(
            GRU(
                context_dim if config.kernel_sizes else feature_dim,
                context_dim if config.causal else context_dim // 2,
                config.gru_layers,
                bidirectional=not config.causal,
                dropout=config.context_dropout,
                **options,
            )
            if config.gru_layers
            else None
        )
        self.skip = nnx.Linear(feature_dim, context_dim, **options)
        self.classifier = nnx.Linear(context_dim, config.num_outputs, **options)

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
          Logits, [B, T, C] float32, and context, [B, T, H]. If the model predicts a score, the
          score is appended to the logits, [B, T, C + 1].
        """
        (output,) = apply_context_experts(
            (self,), (x,), mask, deterministic=deterministic, rngs=rngs
        )
        return output

    def initial_state(self, batch_size: int) -> ContextState:
        """Returns the state before the first `step`; only for a causal model."""
        return ContextState(
            None if self.convolution is None else self.convolution.initial_state(batch_size),
            None if self.gru is None else self.gru.initial_state(batch_size),
        )

    def step(
        self, state: ContextState, x: jax.Array
    ) -> tuple[ContextState, tuple[jax.Array, jax.Array]]:
        """Computes logits and context of the next utterance.

        Args:
          state: State after the previous utterance.
          x: Vector of the utterance, [B, D].

        Returns:
          The new state, and the logits [B, C] float32 and the context [B, H].
        """
        hidden, convolution_state, gru_state = x, state.convolution, state.gru
        if self.convolution is not None:
            convolution_state, hidden = self.convolution.step(convolution_state, hidden)
        if self.gru is not None:
            gru_state, hidden = self.gru.step(gru_state, hidden)
        return ContextState(convolution_state, gru_state), self._classify(x, hidden)

    def _classify(
        self, x: jax.Array, hidden: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Computes logits and context from x and the output of the convolutions and the GRU."""
        context = self.skip(x)  # ... H
        if self.gru is not None or self.convolution is not None:
            context = context + hidden
        logits = self.classifier(self.dropout(context, **options)).astype(jnp.float32)
        return logits, context


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
    return [
        expert._classify(x, hidden_x, **options)
        for expert, x, hidden_x in zip(experts, inputs, hidden, strict=True)
    ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossModalState:
    """State of a causal `CrossModalExpert` between utterances.

    Attributes:
      layers: State of each co-attention layer.
      gru: State of the GRU, or None without a GRU.
    """

    layers: list[CoAttentionState]
    gru: Any


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
                window=config.attention_window if config.causal else None,
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
                fusion_dim if config.causal else fusion_dim // 2,
                config.fusion_gru_layers,
                bidirectional=not config.causal,
                dropout=config.context_dropout,
                **options,
            )
            if config.fusion_gru_layers
            else None
        )
        self.projection = nnx.Linear(2 * fusion_dim, fusion_dim, **options)
        self.dropout = Dropout(config.classifier_dropout)
        self.classifier = nnx.Linear(fusion_dim, config.num_outputs, **options)

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
          Logits as in `ContextExpert`, [B, T, C] float32, speech representation, [B, T, F], and
          text representation, [B, T, F].
        """
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        speech_stream, text_stream = self.speech_in(speech), self.text_in(text)  # B T F
        for layer in self.layers:
            speech_stream, text_stream = layer(
                speech_stream, text_stream, speech_present, text_present, **options
            )
        speech_repr = speech_stream + self.speech_skip(speech)
        text_repr = text_stream + self.text_skip(text)
        joint = self._join(speech_repr, text_repr)  # B T 2F
        hidden = self.projection(joint)  # B T F
        if self.gru is not None:
            steps = speech_present | text_present if mask is None else mask
            hidden = hidden + self.gru(self.context_dropout(joint, **options), steps, **options)
        return self._classify(hidden, **options), speech_repr, text_repr

    def initial_state(self, batch_size: int) -> CrossModalState:
        """Returns the state before the first `step`; only for a causal model."""
        return CrossModalState(
            [layer.initial_state(batch_size) for layer in self.layers],
            None if self.gru is None else self.gru.initial_state(batch_size),
        )

    def step(
        self,
        state: CrossModalState,
        speech: jax.Array,
        text: jax.Array,
        speech_present: jax.Array,
        text_present: jax.Array,
    ) -> tuple[CrossModalState, tuple[jax.Array, jax.Array, jax.Array]]:
        """Computes logits and representations of the next utterance.

        Args:
          state: State after the previous utterance.
          speech: Finite speech vector, [B, D].
          text: Finite text vector, [B, D].
          speech_present: Whether the speech may be attended to, [B] bool.
          text_present: Whether the text may be attended to, [B] bool.

        Returns:
          The new state, and logits [B, C] float32, speech representation [B, F] and text
          representation [B, F].
        """
        speech_stream, text_stream = self.speech_in(speech), self.text_in(text)  # B F
        layer_states, gru_state = [], state.gru
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            layer_state, (speech_stream, text_stream) = layer.step(
                layer_state, speech_stream, text_stream, speech_present, text_present
            )
            layer_states.append(layer_state)
        speech_repr = speech_stream + self.speech_skip(speech)
        text_repr = text_stream + self.text_skip(text)
        joint = self._join(speech_repr, text_repr)  # B 2F
        hidden = self.projection(joint)  # B F
        if self.gru is not None:
            gru_state, output = self.gru.step(gru_state, joint)
            hidden = hidden + output
        outputs = self._classify(hidden), speech_repr, text_repr
        return CrossModalState(layer_states, gru_state), outputs

    def _join(self, speech_repr: jax.Array, text_repr: jax.Array) -> jax.Array:
        return self.norm(jnp.concatenate([text_repr, speech_repr], axis=-1))

    def _classify(self, hidden: jax.Array, **options: Any) -> jax.Array:
        hidden = self.dropout(jax.nn.relu(hidden), **options)
        return self.classifier(hidden).astype(jnp.float32)
