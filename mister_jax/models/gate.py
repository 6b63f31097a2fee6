"""MiSTER-E's gate, which computes the weights with which `MisterE` combines the experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.models.config import EXPERTS, MisterEConfig


class Gate(nnx.Module):
    """Small float32 MLP that computes the experts' weights from their logits.

    The weights are softmax(mlp_out(relu(mlp_in(x))) / temperature) over the present experts. Here x
    holds the logits of all experts and, with `gate_reads_contexts`, the contexts of the speech and
    the text expert. Gradients flow through x into the experts.

    Args:
      config: Model config.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, config: MisterEConfig, *, rngs: nnx.Rngs):
        num_experts = len(EXPERTS)
        options: dict[str, Any] = config.types | {"dtype": jnp.float32, "rngs": rngs}
        self.temperature = config.gate_temperature
        self.reads_contexts = config.gate_reads_contexts
        in_dim = num_experts * config.num_classes
        if self.reads_contexts:
            in_dim += config.context_dim * len({"speech", "text"}.intersection(config.experts))
        self.mlp_in = nnx.Linear(in_dim, config.gate_dim, **options)
        self.mlp_out = nnx.Linear(config.gate_dim, num_experts, **options)

    def __call__(
        self,
        expert_logits: jax.Array,
        present: jax.Array,
        speech_context: jax.Array | None = None,
        text_context: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the gate weights.

        Args:
          expert_logits: Logits of all experts, [B, T, E, C].
          present: Experts that may have a nonzero weight, at least one per utterance, [B, T, E]
            bool.
          speech_context: Context of the speech expert, [B, T, H], or [B, T, 0] if the expert is
            disabled. Required with `gate_reads_contexts`, otherwise unused.
          text_context: Context of the text expert, like `speech_context`.

        Returns:
          Weights, [B, T, E]; they sum to 1 over E and are zero where `present` is False.

        Raises:
          ValueError: A required context is missing.
        """
        logits = jnp.where(present[..., None], expert_logits, 0)
        inputs = [logits.reshape(*logits.shape[:2], -1)]  # B T E*C
        if self.reads_contexts:
            if speech_context is None or text_context is None:
                raise ValueError("a gate with gate_reads_contexts needs both contexts")
            inputs += [
                jnp.where(present[..., :1], speech_context, 0),  # B T H
                jnp.where(present[..., 1:2], text_context, 0),  # B T H
            ]
        hidden = jax.nn.relu(self.mlp_in(jnp.concatenate(inputs, axis=-1)))
        scores = self.mlp_out(hidden) / self.temperature  # B T E
        return jax.nn.softmax(jnp.where(present, scores, jnp.finfo(scores.dtype).min), axis=-1)
