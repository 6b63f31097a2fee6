"""A conditional random field over a dialogue: emotions last, and change in their own ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class ConditionalRandomField(nnx.Module):
    """Marginals of a linear-chain conditional random field, by the forward-backward algorithm.

    The score of a course of emotions y is the sum over utterances of logits[t, y_t] and of
    log A[y_t-1, y_t], where A is a learned transition matrix, whose rows sum to 1. It begins with
    even rows, and then the marginals are the softmax of the logits.

    Both directions are scans over products of matrices, so they take log T steps.

    Args:
      num_classes: C.
      param_dtype: of the parameters; the computation is float32.
    """

    def __init__(self, num_classes: int, *, param_dtype: DTypeLike = jnp.float32):
        self.transition = nnx.Param(jnp.zeros((num_classes, num_classes), param_dtype))

    def __call__(self, logits: jax.Array, mask: jax.Array) -> jax.Array:
        """Log-probabilities of each utterance's emotion, given the logits of the whole dialogue.

        Args:
          logits: [B, T, C].
          mask: utterances that tell something [B, T] bool. One between others that tells nothing
            still takes its step.

        Returns:
          [B, T, C] float32, finite where the logits are.
        """
        unary = jnp.where(mask[..., None], logits.astype(jnp.float32), 0)  # B T C
        transition = jax.nn.log_softmax(self.transition[...].astype(jnp.float32))  # C C
        # Into t from t - 1. The first comes from anywhere alike.
        steps = transition + unary[:, :, None, :]  # B T C C
        first = jnp.broadcast_to(unary[:, :1, None, :], steps[:, :1].shape)
        into = jnp.concatenate([first, steps[:, 1:]], axis=1)
        forward = jax.lax.associative_scan(_product, into, axis=1)[:, :, 0]  # B T C
        # Backward: the product of all steps behind t, summed over where it ends.
        behind = jax.lax.associative_scan(
            lambda later, earlier: _product(earlier, later), steps[:, 1:], axis=1, reverse=True
        )
        backward = jnp.pad(jax.nn.logsumexp(behind, axis=-1), ((0, 0), (0, 1), (0, 0)))
        return jax.nn.log_softmax(forward + backward)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product of matrices of logarithms [..., C, C]."""
    return jax.nn.logsumexp(a[..., :, :, None] + b[..., None, :, :], axis=-2)
