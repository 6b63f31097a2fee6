"""Linear-chain conditional random field (CRF), which learns transitions between emotions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class ConditionalRandomField(nnx.Module):
    """Linear-chain CRF that computes marginals, by default with the forward-backward algorithm.

    The score of a label sequence y is the sum over utterances t of logits[t, y_t] and
    log A[y_{t-1}, y_t], where the rows of the learned transition matrix A sum to 1. Initially, all
    transitions are equally likely, and the marginals are the softmax of the logits.

    For a constant T, the forward and the backward pass are associative scans over matrix products,
    which take log T steps. A causal CRF has only the forward pass, which takes T steps. All passes
    normalize each product, so the results are as precise after thousands of utterances as after
    one.

    Args:
      num_classes: Number of classes C.
      causal: Whether each marginal depends only on the utterances so far, instead of on all
        utterances.
      param_dtype: Parameter dtype; the computation is float32.
    """

    def __init__(
        self, num_classes: int, *, causal: bool = False, param_dtype: DTypeLike = jnp.float32
    ):
        self.causal = causal
        self.transition = nnx.Param(jnp.zeros((num_classes, num_classes), param_dtype))

    def __call__(self, logits: jax.Array, mask: jax.Array) -> jax.Array:
        """Computes the log-probability of each utterance's class given the whole dialogue.

        A causal CRF conditions only on the dialogue up to this utterance.

        Args:
          logits: Class logits, [B, T, C].
          mask: Utterances whose logits are used, [B, T] bool. A masked utterance between two others
            still counts as a transition step.

        Returns:
          Log-probabilities, [B, T, C] float32; finite if the logits are finite.
        """
        unary = jnp.where(mask[..., None], logits.astype(jnp.float32), 0)  # B T C
        if self.causal:
            # Under `shard_map`, the scan's state must be marked as different on each device, like
            # the logits. The sum has this mark because the zeros are computed from the logits.
            state = self.initial_state(mask.shape[0]) + jnp.zeros_like(unary[:, 0])
            return jax.lax.scan(self.step, state, unary.swapaxes(0, 1))[1].swapaxes(0, 1)
        transition = jax.nn.log_softmax(self.transition[...].astype(jnp.float32))  # C C
        # Element t scores the transition from utterance t - 1 to t and the logits of t.
        steps = transition + unary[:, :, None, :]  # B T C C
        first = jnp.broadcast_to(unary[:, :1, None, :], steps[:, :1].shape)
        forward_steps = jnp.concatenate([first, steps[:, 1:]], axis=1)
        if not isinstance(steps.shape[1], int):
            return jax.nn.log_softmax(sum(_scan_messages(forward_steps)))
        forward = jax.lax.associative_scan(_log_matmul, forward_steps, axis=1)[:, :, 0]  # B T C
        # Product of all steps after t, summed over the class of the last utterance.
        suffix = jax.lax.associative_scan(
            lambda later, earlier: _log_matmul(earlier, later), steps[:, 1:], axis=1, reverse=True
        )
        backward = jnp.pad(jax.nn.logsumexp(suffix, axis=-1), ((0, 0), (0, 1), (0, 0)))
        return jax.nn.log_softmax(forward + backward)

    def initial_state(self, batch_size: int) -> jax.Array:
        """Returns the state before the first `step`: log-probabilities of the next class, [B, C].

        Raises:
          ValueError: The CRF is not causal.
        """
        if not self.causal:
            raise ValueError("causal=False; steps need a causal CRF")
        num_classes = self.transition.shape[0]
        return jnp.full((batch_size, num_classes), -jnp.log(num_classes), jnp.float32)

    def step(self, state: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes the log-probability of the next utterance's class.

        Args:
          state: State after the previous step.
          logits: Class logits, [B, C].

        Returns:
          The new state, and the log-probabilities, [B, C] float32.
        """
        transition = jax.nn.log_softmax(self.transition[...].astype(jnp.float32))  # C C
        filtered = jax.nn.log_softmax(state + logits.astype(jnp.float32))
        return jax.nn.logsumexp(filtered[:, :, None] + transition, axis=1), filtered


def _scan_messages(steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the messages in both directions, one utterance at a time.

    Associative scans need a constant T, but programs are also exported for any T.

    Args:
      steps: Score of the step to each utterance, [B, T, C, C]. All rows of the first utterance's
        matrix are equal.

    Returns:
      Forward and backward messages, [B, T, C].
    """
    num_classes = steps.shape[-1]

    def move_forward(message: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        message = _normalize(jax.nn.logsumexp(message[:, :, None] + step, axis=1), -1)
        return message, message

    def move_backward(message: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _normalize(jax.nn.logsumexp(step + message[:, None, :], axis=2), -1), message

    steps = steps.swapaxes(0, 1)  # T B C C
    start = jnp.full(steps.shape[1:3], -jnp.log(num_classes))
    _, forward = jax.lax.scan(move_forward, start, steps)
    _, backward = jax.lax.scan(move_backward, jnp.zeros_like(start), steps, reverse=True)
    return forward.swapaxes(0, 1), backward.swapaxes(0, 1)


def _log_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies matrices [..., C, C] given as logarithms; normalizes the product."""
    product = jax.nn.logsumexp(a[..., :, :, None] + b[..., None, :, :], axis=-2)
    return _normalize(product, (-2, -1))


def _normalize(log_scores: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Subtracts the maximum, which changes no marginal.

    Without this, scores would grow with the number of utterances, and float32 rounds large scores
    to fewer decimals. The marginals do not depend on the maximum, so it needs no gradient.
    """
    return log_scores - jax.lax.stop_gradient(log_scores.max(axis, keepdims=True))
