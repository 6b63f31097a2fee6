"""MiSTER-E: a gated mixture of a speech, a text and a cross-modal expert over a dialogue.

Stage 2 of arXiv 2602.23300. It reads one speech and one text vector an utterance, and gives an
emotion, the three experts' votes and the gate that weighed them. How the vectors are made is not
here. Shape letters: B dialogues, T utterances, D feature width, H context width, F fusion width,
E experts (speech, text, fusion), C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.nn import (
    GRU,
    CoAttentionLayer,
    ConditionalRandomField,
    Dropout,
    ParallelConvolution,
    PerExampleRngs,
    run_grus,
)
from mister_jax.nn.attention import Implementation
from mister_jax.nn.dropout import KeySource

EXPERTS = ("speech", "text", "fusion")
MIXTURES = ("gate", "mean", "majority")


@dataclasses.dataclass(frozen=True)
class MisterEConfig:
    """Sizes and options of `MisterE`; the defaults are the released model's.

    Attributes:
      num_classes: C.
      speech_dim: D of the speech vectors.
      text_dim: D of the text vectors.
      context_dim: H, width of the context networks; half of it is one direction of their GRU.
      kernel_sizes: of the parallel convolutions, odd; none of them leaves the convolutions out.
      gru_layers: bidirectional layers; 0 leaves the GRU out.
      fusion_dim: F, of the cross-modal expert's streams.
      fusion_layers: co-attention layers.
      fusion_gru_layers: bidirectional layers of a GRU over the two streams joined, so that the
        cross-modal expert, too, knows the order of the utterances; not in the released model.
      attention_dim: of all heads together.
      attention_heads: heads of each attention.
      gate_dim: hidden units of the gate.
      gate_temperature: the gate's logits are divided by it.
      gate_reads_contexts: the gate reads the contexts of the speech and the text expert beside the
        votes, and so can tell an expert that knows something from one that is sure of itself; not
        in the released model.
      input_dropout: rate on the vectors that come in.
      context_dropout: rate before each GRU layer and before the context classifiers.
      attention_dropout: rate on attention weights.
      fusion_dropout: rate on each attention's output.
      classifier_dropout: rate before the cross-modal expert's last Linear.
      modality_dropout: rate at which, in training, an utterance loses its speech, and at which it
        loses its text; one that loses both is still to be told from its context.
      experts: in use, of "speech", "text", "fusion".
      mixture: "gate" weighs by the gate, "mean" evenly, "majority" counts votes (the fusion
        expert's decides a tie).
      crf: read the mixture's logits with a linear-chain conditional random field, which learns how
        emotions last and change; not in the released model.
      layer_norm_epsilon: of every LayerNorm.
      attention_implementation: of `jax.nn.dot_product_attention`.
      dtype: of the computation; recurrent states, softmaxes and all outputs that are logits or
        probabilities are float32.
      param_dtype: of the parameters.
    """

    num_classes: int = 6
    speech_dim: int = 2048
    text_dim: int = 2048
    context_dim: int = 1024
    kernel_sizes: tuple[int, ...] = (1, 3, 5)
    gru_layers: int = 3
    fusion_dim: int = 1024
    fusion_layers: int = 4
    fusion_gru_layers: int = 0
    attention_dim: int = 120
    attention_heads: int = 3
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
    mixture: Literal["gate", "mean", "majority"] = "gate"
    crf: bool = False
    layer_norm_epsilon: float = 1e-6
    attention_implementation: Implementation | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        at_least_one = (
            "num_classes speech_dim text_dim context_dim fusion_dim attention_dim "
            "attention_heads gate_dim"
        )
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise ValueError(f"MisterEConfig.{name}={getattr(self, name)}: must be at least 1")
        for name in ("gru_layers", "fusion_layers", "fusion_gru_layers"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"MisterEConfig.{name}={getattr(self, name)}: must not be negative"
                )
        if self.context_dim % 2:
            raise ValueError(f"MisterEConfig.context_dim={self.context_dim}: must be even")
        if self.fusion_gru_layers and self.fusion_dim % 2:
            raise ValueError(
                f"MisterEConfig.fusion_dim={self.fusion_dim}: must be even with fusion_gru_layers"
            )
        if self.gate_temperature <= 0:
            raise ValueError(
                f"MisterEConfig.gate_temperature={self.gate_temperature}: must be positive"
            )
        if self.attention_dim % self.attention_heads:
            raise ValueError(
                f"MisterEConfig.attention_dim={self.attention_dim}: must be a multiple of "
                f"attention_heads={self.attention_heads}"
            )
        for name in ("input", "context", "attention", "fusion", "classifier", "modality"):
            rate = getattr(self, f"{name}_dropout")
            if not 0 <= rate < 1:
                raise ValueError(f"MisterEConfig.{name}_dropout={rate}: allowed are 0 <= rate < 1")
        if self.mixture not in MIXTURES:
            raise ValueError(f"MisterEConfig.mixture={self.mixture!r}: allowed are {MIXTURES}")
        unknown = set(self.experts) - set(EXPERTS)
        if unknown or not self.experts or len(set(self.experts)) != len(self.experts):
            raise ValueError(
                f"MisterEConfig.experts={self.experts}: allowed are one or more of {EXPERTS}, "
                "each once"
            )

    @classmethod
    def paper(cls, **changes) -> MisterEConfig:
        """The released sizes, 90 M parameters, with `changes`."""
        return cls(**changes)

    @classmethod
    def small(cls, **changes) -> MisterEConfig:
        """Sizes for a few hundred dialogues or a quick test, with `changes`."""
        sizes = {
            "context_dim": 128,
            "gru_layers": 1,
            "fusion_dim": 128,
            "fusion_layers": 2,
            "attention_dim": 96,
        }
        return cls(**{**sizes, **changes})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MisterEOutput:
    """What `MisterE` gives; values at positions outside the mask have no meaning.

    Attributes:
      logits: of the mixture [B, T, C], float32.
      expert_logits: of the experts, speech, text, fusion [B, T, E, C], float32; zero for one that
        is not in use.
      gate: weights of the experts [B, T, E], float32, sum 1; zero for an expert that is missing.
      expert_present: true for experts in use that have their modality [B, T, E] bool.
      speech_context: of the speech expert, before its classifier [B, T, H].
      text_context: likewise of the text expert.
      speech_repr: the fusion expert's representation of the speech [B, T, F].
      text_repr: likewise of the text.
      speech_present: utterances whose speech was read [B, T] bool.
      text_present: utterances whose text was read [B, T] bool.

    The contexts and representations of an expert that is not in use have width 0.
    """

    logits: jax.Array
    expert_logits: jax.Array
    gate: jax.Array
    expert_present: jax.Array
    speech_context: jax.Array
    text_context: jax.Array
    speech_repr: jax.Array
    text_repr: jax.Array
    speech_present: jax.Array
    text_present: jax.Array


def _types(config: MisterEConfig) -> dict[str, Any]:
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


class ContextExpert(nnx.Module):
    """One modality's context network with its classifier.

    Parallel convolutions, a bidirectional GRU over them, a Linear skip around both.

    Args:
      features: D of the modality.
      config: the model's.
    """

    def __init__(self, features: int, config: MisterEConfig, *, rngs: nnx.Rngs):
        width = config.context_dim
        options = _types(config) | {"rngs": rngs}
        self.dropout = Dropout(config.context_dropout)
        self.convolution = nnx.data(
            ParallelConvolution(features, width, config.kernel_sizes, **options)
            if config.kernel_sizes
            else None
        )
        self.gru = nnx.data(
            GRU(
                width if config.kernel_sizes else features,
                width // 2,
                config.gru_layers,
                dropout=config.context_dropout,
                **options,
            )
            if config.gru_layers
            else None
        )
        self.skip = nnx.Linear(features, width, **options)
        self.classifier = nnx.Linear(width, config.num_classes, **options)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Votes.

        Args:
          x: one vector an utterance [B, T, D], finite.
          mask: true at utterances [B, T] bool.

        Returns:
          logits [B, T, C] float32, and the context [B, T, H] they were read from.
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
    """`ContextExpert.__call__` of several experts of one config, whose GRUs share their scans."""
    options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
    hidden = []
    for expert, x in zip(experts, inputs, strict=True):
        if expert.convolution is not None:
            x = expert.dropout(expert.convolution(x, mask), **options)  # B T H
        hidden.append(x)
    outputs = []
    grus = [expert.gru for expert in experts if expert.gru is not None]
    if grus:
        hidden = run_grus(grus, hidden, mask, **options)
    for expert, x, recurrent in zip(experts, inputs, hidden, strict=True):
        context = expert.skip(x)  # B T H
        if expert.gru is not None or expert.convolution is not None:
            context = context + recurrent
        logits = expert.classifier(expert.dropout(context, **options)).astype(jnp.float32)
        outputs.append((logits, context))
    return outputs


class CrossModalExpert(nnx.Module):
    """Speech and text attend to each other across the dialogue; one classifier reads both.

    Args:
      config: the model's.
    """

    def __init__(self, config: MisterEConfig, *, rngs: nnx.Rngs):
        width = config.fusion_dim
        options = _types(config) | {"rngs": rngs}
        self.speech_in = nnx.Linear(config.speech_dim, width, **options)
        self.text_in = nnx.Linear(config.text_dim, width, **options)
        self.layers = nnx.List(
            CoAttentionLayer(
                width,
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
        self.speech_skip = nnx.Linear(config.speech_dim, width, **options)
        self.text_skip = nnx.Linear(config.text_dim, width, **options)
        self.norm = nnx.LayerNorm(2 * width, epsilon=config.layer_norm_epsilon, **options)
        self.context_dropout = Dropout(config.context_dropout)
        self.gru = nnx.data(
            GRU(
                2 * width,
                width // 2,
                config.fusion_gru_layers,
                dropout=config.context_dropout,
                **options,
            )
            if config.fusion_gru_layers
            else None
        )
        self.hidden = nnx.Linear(2 * width, width, **options)
        self.dropout = Dropout(config.classifier_dropout)
        self.classifier = nnx.Linear(width, config.num_classes, **options)

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
        """Votes.

        Args:
          speech: [B, T, D of speech], finite.
          text: [B, T, D of text], finite.
          speech_present: utterances whose speech may be attended to [B, T] bool.
          text_present: likewise for text.
          mask: true at utterances [B, T] bool, the steps of the GRU; those that have speech or
            text by default.

        Returns:
          logits [B, T, C] float32, and the fusion representations of speech and text [B, T, F].
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
        hidden = self.hidden(joint)  # B T F
        if self.gru is not None:
            steps = speech_present | text_present if mask is None else mask
            hidden = hidden + self.gru(self.context_dropout(joint, **options), steps, **options)
        hidden = self.dropout(jax.nn.relu(hidden), **options)
        return self.classifier(hidden).astype(jnp.float32), speech_repr, text_repr


class Gate(nnx.Module):
    """Weighs the experts by their votes: Linear, ReLU, Linear, softmax with a temperature.

    With `gate_reads_contexts` by the contexts behind the votes, too. Computed in float32, whatever
    the model's dtype.

    Args:
      config: the model's.
    """

    def __init__(self, config: MisterEConfig, *, rngs: nnx.Rngs):
        experts = len(EXPERTS)
        options = _types(config) | {"dtype": jnp.float32, "rngs": rngs}
        self.temperature = config.gate_temperature
        self.reads_contexts = config.gate_reads_contexts
        features = experts * config.num_classes
        if self.reads_contexts:
            features += config.context_dim * len({"speech", "text"}.intersection(config.experts))
        self.hidden = nnx.Linear(features, config.gate_dim, **options)
        self.out = nnx.Linear(config.gate_dim, experts, **options)

    def __call__(
        self,
        expert_logits: jax.Array,
        present: jax.Array,
        speech_context: jax.Array | None = None,
        text_context: jax.Array | None = None,
    ) -> jax.Array:
        """Weighs.

        Args:
          expert_logits: [B, T, E, C].
          present: experts that may vote [B, T, E] bool.
          speech_context: [B, T, H], or [B, T, 0] where the expert is not in use; needed by a gate
            that reads contexts, and by no other.
          text_context: likewise.

        Returns:
          Weights [B, T, E], sum 1, zero where `present` is false.

        Raises:
          ValueError: contexts that the gate needs are not given.
        """
        votes = jnp.where(present[..., None], expert_logits, 0)
        read = [votes.reshape(*votes.shape[:2], -1)]  # B T E*C
        if self.reads_contexts:
            if speech_context is None or text_context is None:
                raise ValueError("a gate of gate_reads_contexts needs both contexts")
            read += [
                jnp.where(present[..., :1], speech_context, 0),  # B T H
                jnp.where(present[..., 1:2], text_context, 0),  # B T H
            ]
        flat = jnp.concatenate(read, axis=-1)
        scores = self.out(jax.nn.relu(self.hidden(flat))) / self.temperature  # B T E
        return jax.nn.softmax(jnp.where(present, scores, jnp.finfo(scores.dtype).min), axis=-1)


class MisterE(nnx.Module):
    """Gated mixture of the three experts.

    Args:
      config: sizes and options.
      rngs: for the initial parameters.
    """

    def __init__(self, config: MisterEConfig, *, rngs: nnx.Rngs):
        self.config = config

        def expert(name: str, make):
            return nnx.data(make() if name in config.experts else None)

        self.speech = expert("speech", lambda: ContextExpert(config.speech_dim, config, rngs=rngs))
        self.text = expert("text", lambda: ContextExpert(config.text_dim, config, rngs=rngs))
        self.fusion = expert("fusion", lambda: CrossModalExpert(config, rngs=rngs))
        gated = config.mixture == "gate" and len(config.experts) > 1
        self.gate = nnx.data(Gate(config, rngs=rngs) if gated else None)
        self.crf = nnx.data(
            ConditionalRandomField(config.num_classes, param_dtype=jnp.dtype(config.param_dtype))
            if config.crf
            else None
        )
        self.input_dropout = Dropout(config.input_dropout)

    def __call__(
        self,
        speech: jax.Array,
        text: jax.Array,
        mask: jax.Array,
        *,
        speech_present: jax.Array | None = None,
        text_present: jax.Array | None = None,
        deterministic: bool = True,
        rngs: KeySource | jax.Array | None = None,
    ) -> MisterEOutput:
        """Reads a batch of dialogues.

        A dialogue's outputs do not depend on its padding or on the rest of the batch.

        Args:
          speech: [B, T, D of speech]; what stands outside the mask or where the modality is
            missing is not read and may be anything.
          text: [B, T, D of text].
          mask: true at utterances, false in padding, [B, T] bool.
          speech_present: utterances that have speech [B, T] bool; all by default.
          text_present: utterances that have text [B, T] bool; all by default.
          deterministic: no dropout.
          rngs: source of dropout keys in training: an `nnx.Rngs`, a `PerExampleRngs`, or one key a
            dialogue [B].

        Returns:
          The mixture's logits, and all it was made from.

        Raises:
          ValueError: shapes that do not fit each other or the config.
        """
        self._check(speech, text, mask, speech_present, text_present)
        if isinstance(rngs, jax.Array):
            rngs = PerExampleRngs(rngs)
        mask = mask.astype(bool)
        speech_present = mask if speech_present is None else mask & speech_present
        text_present = mask if text_present is None else mask & text_present
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        if not deterministic and self.config.modality_dropout:
            speech_present, text_present = drop_modalities(
                speech_present, text_present, self.config.modality_dropout, rngs
            )
        dtype = jnp.dtype(self.config.dtype)
        speech = jnp.where(speech_present[..., None], speech, 0).astype(dtype)
        text = jnp.where(text_present[..., None], text, 0).astype(dtype)
        speech, text = self.input_dropout(speech, **options), self.input_dropout(text, **options)

        shape = (*mask.shape, self.config.num_classes)
        logits = dict.fromkeys(EXPERTS, jnp.zeros(shape, jnp.float32))
        contexts = dict.fromkeys(("speech", "text"), jnp.zeros((*mask.shape, 0), dtype))
        representations = dict(contexts)
        in_use = [
            (name, network, x)
            for name, network, x in (("speech", self.speech, speech), ("text", self.text, text))
            if network is not None
        ]
        votes = apply_context_experts(
            tuple(network for _, network, _ in in_use),
            tuple(x for _, _, x in in_use),
            mask,
            **options,
        )
        for (name, _, _), (vote, context) in zip(in_use, votes, strict=True):
            logits[name], contexts[name] = vote, context
        if self.fusion is not None:
            logits["fusion"], representations["speech"], representations["text"] = self.fusion(
                speech, text, speech_present, text_present, mask, **options
            )

        expert_logits = jnp.stack([logits[name] for name in EXPERTS], axis=2)  # B T E C
        present = self._experts_present(speech_present, text_present)  # B T E
        mixture_logits, gate = self._mix(
            expert_logits, present, contexts["speech"], contexts["text"]
        )
        if self.crf is not None:
            mixture_logits = self.crf(mixture_logits, mask)
        return MisterEOutput(
            logits=mixture_logits,
            expert_logits=expert_logits,
            gate=gate,
            expert_present=present & mask[..., None],
            speech_context=contexts["speech"],
            text_context=contexts["text"],
            speech_repr=representations["speech"],
            text_repr=representations["text"],
            speech_present=speech_present,
            text_present=text_present,
        )

    def _experts_present(self, speech_present: jax.Array, text_present: jax.Array) -> jax.Array:
        """Experts that may vote [B, T, E]; all in use where each of them misses its modality."""
        has = jnp.stack([speech_present, text_present, speech_present | text_present], axis=-1)
        in_use = jnp.array([name in self.config.experts for name in EXPERTS])
        present = has & in_use
        return jnp.where(present.any(-1, keepdims=True), present, in_use)

    def _mix(
        self,
        expert_logits: jax.Array,
        present: jax.Array,
        speech_context: jax.Array,
        text_context: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Mixture logits [B, T, C] and the weights [B, T, E] they were mixed with."""
        if self.config.mixture == "majority":
            # The fusion expert's vote counts half a vote more, so that it decides ties and no more.
            weights = present * jnp.array([1.0, 1.0, 1.5])
        else:
            weights = present.astype(jnp.float32)
        gate = weights / weights.sum(-1, keepdims=True)
        if self.config.mixture == "majority":
            choices = jax.nn.one_hot(expert_logits.argmax(-1), expert_logits.shape[-1])  # B T E C
            return jnp.log(jnp.einsum("bte,btec->btc", gate, choices) + 1e-6), gate
        if self.gate is not None:
            gate = self.gate(expert_logits, present, speech_context, text_context)
        return jnp.einsum("bte,btec->btc", gate, expert_logits), gate

    def _check(self, speech, text, mask, speech_present, text_present) -> None:
        expected = {
            "speech": (speech, (*mask.shape, self.config.speech_dim)),
            "text": (text, (*mask.shape, self.config.text_dim)),
            "speech_present": (speech_present, mask.shape),
            "text_present": (text_present, mask.shape),
        }
        if mask.ndim != 2:
            raise ValueError(f"mask has shape {mask.shape}: allowed is [B, T]")
        for name, (value, shape) in expected.items():
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"{name} has shape {value.shape}: with a mask of {mask.shape} and this config "
                    f"it must be {shape}"
                )


def drop_modalities(
    speech_present: jax.Array, text_present: jax.Array, rate: float, rngs: KeySource | None
) -> tuple[jax.Array, jax.Array]:
    """Takes each modality from some utterances, by chances of its own: some lose both.

    Args:
      speech_present: [B, T] bool.
      text_present: [B, T] bool.
      rate: probability that an utterance loses its speech, and that it loses its text.
      rngs: source of keys.

    Returns:
      The two presence flags anew.
    """
    if rngs is None:
        raise ValueError("modality dropout needs rngs (an nnx.Rngs or PerExampleRngs) in training")
    present = jnp.stack([speech_present, text_present], axis=-1)  # B T 2
    key = rngs.dropout()
    if key.shape:
        uniform = jax.vmap(lambda k: jax.random.uniform(k, present.shape[1:]))(key)
    else:
        uniform = jax.random.uniform(key, present.shape)
    kept = present & (uniform >= rate)
    return kept[..., 0], kept[..., 1]
