"""MiSTER-E: a gated mixture of a speech, a text and a cross-modal expert for dialogues.

This is stage 2 of arXiv 2602.23300. It takes one speech and one text vector per utterance, which
stage 1 (`mister_jax.models.utterance`) produces. It returns the logits of each expert, the gate
weights that combine them, and the combined logits.

Shape letters: B dialogues, T utterances, D feature size, H context size, F fusion size, E experts
(speech, text, fusion), C classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.models.config import EXPERTS, MisterEConfig
from mister_jax.models.experts import ContextExpert, CrossModalExpert, apply_context_experts
from mister_jax.models.gate import Gate
from mister_jax.nn import ConditionalRandomField, Dropout, PerExampleRngs, initialize_like_torch
from mister_jax.nn.dropout import KeySource, random_mask
from mister_jax.nn.initialization import create_in_one_program


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MisterEOutput:
    """Output of `MisterE`; values outside the mask are meaningless.

    The contexts and representations of disabled experts have size 0.

    Attributes:
      logits: Class logits of the mixture, after the CRF if there is one, [B, T, C] float32.
      expert_logits: Class logits of each expert, [B, T, E, C] float32; zero for disabled experts.
      gate: Expert weights, [B, T, E] float32; they sum to 1 over E and are zero for experts that
        are not present.
      expert_present: Whether an expert is enabled and its modality is present, [B, T, E] bool. If
        no enabled expert has its modality, all enabled experts count as present.
      speech_context: Context of the speech expert (the classifier's input), [B, T, H].
      text_context: Context of the text expert (the classifier's input), [B, T, H].
      speech_repr: Speech representation of the fusion expert, [B, T, F].
      text_repr: Text representation of the fusion expert, [B, T, F].
      speech_present: Utterances whose speech was used, [B, T] bool.
      text_present: Utterances whose text was used, [B, T] bool.
      experts: Names of the enabled experts, a static field without arrays.
      score: Score of the mixture, [B, T] float32; None if the model predicts no score.
      expert_scores: Score of each expert, [B, T, E] float32, or None.
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
    # JAX transformations treat static fields as part of the tree's structure.
    experts: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    score: jax.Array | None = None
    expert_scores: jax.Array | None = None


MisterEState = dict[str, Any]
"""State of a causal `MisterE` between utterances: a tree of arrays for each enabled part
("speech", "text", "fusion", "crf"). The size of the state does not depend on the number of
utterances."""


class MisterE(nnx.Module):
    """Gated mixture of a speech, a text and a cross-modal expert.

    Args:
      config: Model config.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, config: MisterEConfig, *, rngs: nnx.Rngs):
        self.config = config
        parts: Any = create_in_one_program(functools.partial(_create_parts, config), rngs)
        self.speech, self.text, self.fusion, self.gate, self.crf = (
            nnx.data(parts.get(name)) for name in ("speech", "text", "fusion", "gate", "crf")
        )
        self.input_dropout = Dropout(config.input_dropout)

    def __call__(
        self,
        speech: jax.Array | None,
        text: jax.Array | None,
        mask: jax.Array,
        *,
        speech_present: jax.Array | None = None,
        text_present: jax.Array | None = None,
        deterministic: bool = True,
        rngs: KeySource | jax.Array | None = None,
    ) -> MisterEOutput:
        """Predicts the emotions in a batch of dialogues.

        The outputs for a dialogue do not depend on its padding or on the rest of the batch.

        Args:
          speech: Speech vectors, [B, T, D]; ignored outside the mask and where speech is missing.
            None if all utterances lack speech.
          text: Text vectors, [B, T, D]; ignored outside the mask and where text is missing. None if
            all utterances lack text.
          mask: Valid utterances, [B, T] bool.
          speech_present: Utterances with speech, [B, T] bool; all by default.
          text_present: Utterances with text, [B, T] bool; all by default.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys: an `nnx.Rngs`, a `PerExampleRngs`, or one key per dialogue,
            [B].

        Returns:
          Logits of the mixture, and the experts' logits, gate weights and contexts.

        Raises:
          ValueError: The shapes do not match each other or the config, or both modalities are None.
        """
        if speech is None and text is None:
            raise ValueError("speech and text are None; needed: the vectors of at least one")
        self._check_shapes(speech, text, mask, speech_present, text_present)
        if isinstance(rngs, jax.Array):
            rngs = PerExampleRngs(rngs)
        mask = mask.astype(bool)
        speech, speech_present = _fill(speech, speech_present, mask, self.config.speech_dim)
        text, text_present = _fill(text, text_present, mask, self.config.text_dim)
        options: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}
        if not deterministic and self.config.modality_dropout:
            speech_present, text_present = drop_modalities(
                speech_present, text_present, self.config.modality_dropout, rngs
            )
        speech, text = self._present_vectors(speech, text, speech_present, text_present)
        speech, text = self.input_dropout(speech, **options), self.input_dropout(text, **options)
        output = self._combine(
            self._apply_experts(speech, text, speech_present, text_present, mask, **options),
            speech_present,
            text_present,
            mask,
        )
        if self.crf is not None:
            output = dataclasses.replace(output, logits=self.crf(output.logits, mask))
        return output

    def initial_state(self, batch_size: int) -> MisterEState:
        """Returns the state before the first utterance of a batch of dialogues.

        Raises:
          ValueError: The model is not causal.
        """
        if not self.config.causal:
            raise ValueError("MisterEConfig.causal=False; steps need a causal model")
        parts = {"speech": self.speech, "text": self.text, "fusion": self.fusion, "crf": self.crf}
        return {
            name: part.initial_state(batch_size) for name, part in parts.items() if part is not None
        }

    def step(
        self,
        state: MisterEState,
        speech: jax.Array,
        text: jax.Array,
        speech_present: jax.Array,
        text_present: jax.Array,
    ) -> tuple[MisterEState, MisterEOutput]:
        """Computes the outputs for the next utterance in each dialogue of a batch.

        Requires a causal model. `__call__` with all utterances gives the same outputs. The time per
        step does not depend on the number of earlier utterances.

        Args:
          state: State after the previous utterance.
          speech: Speech vectors, [B, D]; ignored where speech is missing.
          text: Text vectors, [B, D]; ignored where text is missing.
          speech_present: Whether the utterances have speech, [B] bool.
          text_present: Whether the utterances have text, [B] bool.

        Returns:
          The new state, and the output for these utterances, with T = 1.
        """
        speech_present, text_present = speech_present.astype(bool), text_present.astype(bool)
        speech, text = self._present_vectors(speech, text, speech_present, text_present)
        new_state, outputs = {}, {}
        for name, expert, inputs in (
            ("speech", self.speech, (speech,)),
            ("text", self.text, (text,)),
            ("fusion", self.fusion, (speech, text, speech_present, text_present)),
        ):
            if expert is not None:
                new_state[name], expert_outputs = expert.step(state[name], *inputs)
                outputs[name] = tuple(x[:, None] for x in expert_outputs)
        mask = jnp.ones((*speech_present.shape, 1), bool)
        output = self._combine(outputs, speech_present[:, None], text_present[:, None], mask)
        if self.crf is not None:
            new_state["crf"], logits = self.crf.step(state["crf"], output.logits[:, 0])
            output = dataclasses.replace(output, logits=logits[:, None])
        return new_state, output

    def _present_vectors(
        self,
        speech: jax.Array,
        text: jax.Array,
        speech_present: jax.Array,
        text_present: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the vectors in the computation dtype, with zeros for missing modalities."""
        dtype = jnp.dtype(self.config.dtype)
        return (
            jnp.where(speech_present[..., None], speech, 0).astype(dtype),
            jnp.where(text_present[..., None], text, 0).astype(dtype),
        )

    def _combine(
        self,
        outputs: Mapping[str, tuple[jax.Array, ...]],
        speech_present: jax.Array,
        text_present: jax.Array,
        mask: jax.Array,
    ) -> MisterEOutput:
        """Combines the outputs of the enabled experts; the CRF is not applied."""
        # These zeros get the sharding of the mask, also on meshes with explicit axes.
        zeros = jnp.zeros_like(mask, jnp.float32)[..., None]
        no_logits = jnp.broadcast_to(zeros, (*mask.shape, self.config.num_outputs))
        no_vectors = zeros[..., :0].astype(self.config.dtype)
        speech_logits, speech_context = outputs.get("speech", (no_logits, no_vectors))
        text_logits, text_context = outputs.get("text", (no_logits, no_vectors))
        fusion_logits, speech_repr, text_repr = outputs.get(
            "fusion", (no_logits, no_vectors, no_vectors)
        )
        outputs_of_experts = jnp.stack([speech_logits, text_logits, fusion_logits], axis=2)
        expert_logits = outputs_of_experts[..., : self.config.num_classes]  # B T E C
        present = self._present_experts(speech_present, text_present)  # B T E
        mixture_logits, gate = self._mix(expert_logits, present, speech_context, text_context)
        score = expert_scores = None
        if self.config.predict_score:
            expert_scores = outputs_of_experts[..., -1]  # B T E
            score = (gate * expert_scores).sum(-1)
        return MisterEOutput(
            logits=mixture_logits,
            expert_logits=expert_logits,
            gate=gate,
            expert_present=present & mask[..., None],
            speech_context=speech_context,
            text_context=text_context,
            speech_repr=speech_repr,
            text_repr=text_repr,
            speech_present=speech_present,
            text_present=text_present,
            experts=tuple(self.config.experts),
            score=score,
            expert_scores=expert_scores,
        )

    def _apply_experts(
        self,
        speech: jax.Array,
        text: jax.Array,
        speech_present: jax.Array,
        text_present: jax.Array,
        mask: jax.Array,
        **options: Any,
    ) -> dict[str, tuple[jax.Array, ...]]:
        """Returns the outputs of the enabled experts."""
        enabled = {
            name: (expert, x)
            for name, expert, x in (("speech", self.speech, speech), ("text", self.text, text))
            if expert is not None
        }
        context_outputs = apply_context_experts(
            tuple(expert for expert, _ in enabled.values()),
            tuple(x for _, x in enabled.values()),
            mask,
            **options,
        )
        outputs: dict[str, tuple[jax.Array, ...]] = dict(zip(enabled, context_outputs, strict=True))
        if self.fusion is not None:
            outputs["fusion"] = self.fusion(
                speech, text, speech_present, text_present, mask, **options
            )
        return outputs

    def _present_experts(self, speech_present: jax.Array, text_present: jax.Array) -> jax.Array:
        """Returns which enabled experts have their modality, [B, T, E].

        If no enabled expert has its modality, all enabled experts count as present.
        """
        present = jnp.stack([speech_present, text_present, speech_present | text_present], axis=-1)
        enabled = jnp.array([name in self.config.experts for name in EXPERTS])
        present = present & enabled
        return jnp.where(present.any(-1, keepdims=True), present, enabled)

    def _mix(
        self,
        expert_logits: jax.Array,
        present: jax.Array,
        speech_context: jax.Array,
        text_context: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the mixture's logits, [B, T, C], and the experts' weights, [B, T, E]."""
        if self.config.mixture == "majority":
            return majority_vote(expert_logits, present)
        if self.gate is not None:
            gate = self.gate(expert_logits, present, speech_context, text_context)
        else:
            weights = present.astype(expert_logits.dtype)
            gate = weights / weights.sum(-1, keepdims=True)
        return jnp.einsum("bte,btec->btc", gate, expert_logits), gate

    def _check_shapes(self, speech, text, mask, speech_present, text_present) -> None:
        if mask.ndim != 2 or 0 in mask.shape:
            raise ValueError(f"mask has shape {mask.shape}; allowed: [B, T], each at least 1")
        shapes = {
            "speech": (speech, (*mask.shape, self.config.speech_dim)),
            "text": (text, (*mask.shape, self.config.text_dim)),
            "speech_present": (speech_present, mask.shape),
            "text_present": (text_present, mask.shape),
        }
        for name, (value, shape) in shapes.items():
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"{name} has shape {value.shape}; allowed: {shape}, from the mask's shape and "
                    "the config"
                )


def _fill(
    vectors: jax.Array | None, present: jax.Array | None, mask: jax.Array, dim: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the vectors and presence flags of a modality, with defaults for None."""
    if vectors is None:
        zeros = jnp.zeros_like(mask, jnp.float32)[..., None]
        return jnp.broadcast_to(zeros, (*mask.shape, dim)), jnp.zeros_like(mask)
    return vectors, mask if present is None else mask & present.astype(bool)


def _create_parts(config: MisterEConfig, rngs: nnx.Rngs) -> nnx.Dict:
    """Creates the experts, the gate and the CRF, without those that the config disables."""
    parts: nnx.Dict[Any] = nnx.Dict()
    if "speech" in config.experts:
        parts.speech = ContextExpert(config.speech_dim, config, rngs=rngs)
    if "text" in config.experts:
        parts.text = ContextExpert(config.text_dim, config, rngs=rngs)
    if "fusion" in config.experts:
        parts.fusion = CrossModalExpert(config, rngs=rngs)
    if config.mixture == "gate" and len(config.experts) > 1:
        parts.gate = Gate(config, rngs=rngs)
    if config.crf:
        parts.crf = ConditionalRandomField(
            config.num_classes, causal=config.causal, param_dtype=jnp.dtype(config.param_dtype)
        )
    if config.initialization == "torch":
        initialize_like_torch(parts, rngs=rngs)
    return parts


def majority_vote(expert_logits: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes a weighted vote in which each expert votes for its most probable class.

    Args:
      expert_logits: Logits of the experts, [B, T, E, C].
      present: Experts that vote, [B, T, E] bool.

    Returns:
      Logarithm of each class's share of the votes, [B, T, C], and the experts' weights, [B, T, E].
    """
    # Votes in the order of EXPERTS. With 1.5 votes, fusion breaks ties but cannot outvote the other
    # two experts together.
    weights = present.astype(expert_logits.dtype) * jnp.array([1.0, 1.0, 1.5], expert_logits.dtype)
    weights /= weights.sum(-1, keepdims=True)
    num_classes = expert_logits.shape[-1]
    votes = jax.nn.one_hot(expert_logits.argmax(-1), num_classes, dtype=weights.dtype)  # B T E C
    # The small term keeps the logits of classes without votes finite.
    return jnp.log(jnp.einsum("bte,btec->btc", weights, votes) + 1e-6), weights


def drop_modalities(
    speech_present: jax.Array, text_present: jax.Array, rate: float, rngs: KeySource | None
) -> tuple[jax.Array, jax.Array]:
    """Hides the speech of random utterances and, independently, the text of random utterances.

    Args:
      speech_present: Utterances with speech, [B, T] bool.
      text_present: Utterances with text, [B, T] bool.
      rate: Probability of hiding each modality of an utterance.
      rngs: Source of dropout keys.

    Returns:
      The new `speech_present` and `text_present`.

    Raises:
      ValueError: `rngs` is missing.
    """
    if rngs is None:
        raise ValueError("modality dropout needs rngs (an nnx.Rngs or PerExampleRngs) in training")
    present = jnp.stack([speech_present, text_present], axis=-1)  # B T 2
    present = present & ~random_mask(rngs.dropout(), present.shape, rate)
    return present[..., 0], present[..., 1]
