"""MiSTER-E config."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp

from mister_jax.config_checks import (
    check_at_least,
    check_choice,
    check_dtypes,
    check_multiple,
    check_rates,
    invalid_field,
)
from mister_jax.nn.attention import Implementation

EXPERTS = ("speech", "text", "fusion")
Mixture = Literal["gate", "mean", "majority"]
Initialization = Literal["torch", "lecun"]


@dataclasses.dataclass(frozen=True)
class MisterEConfig:
    """Config of `MisterE`; the defaults match the released model.

    Attributes:
      num_classes: Number of classes C.
      speech_dim: Size D of the speech vectors.
      text_dim: Size D of the text vectors.
      causal: Whether the prediction for an utterance uses only this utterance and earlier ones, so
        that `MisterE.step` can predict live dialogues. In a causal model, the GRUs have only the
        forward direction, with the full hidden size. The convolutions cover only the current and
        past utterances. Attention reaches back `attention_window` utterances. The CRF has only the
        forward pass. False in the released model.
      context_dim: Size H of the contexts; each direction of a bidirectional GRU has size H / 2.
      kernel_sizes: Odd kernel sizes of the parallel convolutions; empty for no convolutions.
      gru_layers: Number of GRU layers, bidirectional unless `causal` is True; 0 for no GRU.
      fusion_dim: Size F of the cross-modal expert's streams.
      fusion_layers: Number of co-attention layers.
      fusion_gru_layers: Number of GRU layers, bidirectional unless `causal` is True, that the
        cross-modal expert applies to both streams. Without these layers, the expert of a non-causal
        model ignores the order of the utterances. 0 in the released model.
      attention_dim: Total size of all attention heads.
      attention_heads: Number of attention heads.
      attention_window: Window of causal attention: number of most recent utterances, including the
        current one, that an utterance attends to. The window bounds the cost per utterance in long
        dialogues. Ignored unless `causal` is True.
      gate_dim: Hidden size of the gate.
      gate_temperature: Temperature of the gate's softmax.
      gate_reads_contexts: Whether the gate reads the contexts of the speech and the text expert in
        addition to the logits of all experts; False in the released model.
      input_dropout: Dropout rate of the input vectors.
      context_dropout: Dropout rate after the convolutions, between GRU layers, before the
        cross-modal expert's GRU, and before the classifiers of the speech and text experts.
      attention_dropout: Dropout rate of the attention weights.
      fusion_dropout: Dropout rate of each attention's output.
      classifier_dropout: Dropout rate before the cross-modal expert's classifier.
      modality_dropout: Probability of hiding an utterance's speech in training, and,
        independently, its text. An utterance without speech and text is predicted from its context.
      experts: Enabled experts, a subset of ("speech", "text", "fusion").
      mixture: Method that combines the experts' logits: "gate" weights them by the gate, "mean"
        averages them, and "majority" is a majority vote in which the fusion expert breaks ties.
      crf: Whether to apply a linear-chain conditional random field to the mixture's logits; False
        in the released model.
      predict_score: Whether each expert also predicts a number, such as the sentiment of CMU-MOSI;
        False in the released model.
      layer_norm_epsilon: Epsilon of all LayerNorms.
      initialization: Distribution of the initial parameters: "torch" has the distributions of the
        released code (see `nn.initialize_like_torch`). "lecun" has Flax's default distributions,
        in which the weights of linear layers and convolutions have three times the variance.
      attention_implementation: Implementation of `jax.nn.dot_product_attention`.
      dtype: Computation dtype; recurrent states, softmaxes, output logits and output
        probabilities are always float32.
      param_dtype: Parameter dtype.
    """

    num_classes: int = 6
    speech_dim: int = 2048
    text_dim: int = 2048
    causal: bool = False
    context_dim: int = 1024
    kernel_sizes: tuple[int, ...] = (1, 3, 5)
    gru_layers: int = 3
    fusion_dim: int = 1024
    fusion_layers: int = 4
    fusion_gru_layers: int = 0
    attention_dim: int = 120
    attention_heads: int = 3
    attention_window: int = 64
    gate_dim: int = 10
    gate_temperature: float = 2.0
    gate_reads_contexts: bool = False
    input_dropout: float = 0.0
    context_dropout: float = 0.0
    attention_dropout: float = 0.1
    fusion_dropout: float = 0.5
    classifier_dropout: float = 0.0
    modality_dropout: float = 0.0
    experts: tuple[str, ...] = EXPERTS
    mixture: Mixture = "gate"
    crf: bool = False
    predict_score: bool = False
    layer_norm_epsilon: float = 1e-6
    initialization: Initialization = "torch"
    attention_implementation: Implementation | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        fields = [field.name for field in dataclasses.fields(self)]
        check_at_least(self, 1, "num_classes", "attention_heads", "attention_window")
        check_at_least(self, 1, *(name for name in fields if name.endswith("_dim")))
        check_at_least(self, 0, *(name for name in fields if name.endswith("_layers")))
        check_rates(self, *(name for name in fields if name.endswith("_dropout")))
        check_multiple(self, "attention_dim", "attention_heads")
        if self.context_dim % 2 and not self.causal:
            raise invalid_field(self, "context_dim", "even numbers")
        if self.fusion_gru_layers and self.fusion_dim % 2 and not self.causal:
            raise invalid_field(self, "fusion_dim", "even numbers with fusion_gru_layers")
        check_dtypes(self)
        if not self.gate_temperature > 0:  # also rejects NaN
            raise invalid_field(self, "gate_temperature", "positive numbers")
        check_at_least(self, 0, "layer_norm_epsilon")
        check_choice(self, "attention_implementation", (None, *get_args(Implementation)))
        check_choice(self, "mixture", get_args(Mixture))
        check_choice(self, "initialization", get_args(Initialization))
        enabled = set(self.experts)
        if not enabled or enabled - set(EXPERTS) or len(enabled) != len(self.experts):
            raise invalid_field(self, "experts", f"one or more of {EXPERTS}, each once")

    @property
    def num_outputs(self) -> int:
        """Number of outputs of each expert: the class logits, and the score if there is one."""
        return self.num_classes + self.predict_score

    @property
    def types(self) -> dict[str, Any]:
        """Keyword arguments `dtype` and `param_dtype` of the layers."""
        return {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}

    @classmethod
    def paper(cls, **changes) -> MisterEConfig:
        """Returns the config of the released model (90M parameters) with `changes`."""
        return cls(**changes)

    @classmethod
    def small(cls, **changes) -> MisterEConfig:
        """Returns a config for a few hundred dialogues or quick tests, with `changes`."""
        sizes = {
            "context_dim": 128,
            "gru_layers": 1,
            "fusion_dim": 128,
            "fusion_layers": 2,
            "attention_dim": 96,
        }
        return cls(**{**sizes, **changes})
