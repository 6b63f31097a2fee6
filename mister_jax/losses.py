"""Losses of MiSTER-E: pure functions from arrays to a scalar, masked and in float32.

Each is divided by a count of valid things over the *global* batch. Under a mapped axis (`pmap`,
`shard_map`) give its `axis_name`: counts are summed over it, the contrastive set is gathered over
it, and each device returns its share, so that the shares **sum** to the loss of the whole batch and
the gradients of the shares sum to its gradient. Without an axis the share is the whole.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mister_jax.models import EXPERTS, MisterEOutput


def _global_sum(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def _divide(total: jax.Array, count: jax.Array, axis_name: str | None) -> jax.Array:
    """total / global count, and zero where nothing was counted."""
    count = _global_sum(count.astype(jnp.float32), axis_name)
    return total / jnp.maximum(count, 1.0)


def _check_positions(values: jax.Array, labels: jax.Array, mask: jax.Array) -> None:
    """Values [..., D] belong to labels and mask [...]; broadcast, they would give a wrong loss."""
    chex.assert_equal_shape([labels, mask])
    chex.assert_equal_shape_prefix([values, mask], mask.ndim)


def focal(
    logits: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 3.0,
    axis_name: str | None = None,
) -> jax.Array:
    """Focal loss: mean over valid positions of (1 - p)^gamma times the cross-entropy.

    p is the probability of the label (arXiv 1708.02002, for a softmax).

    Args:
      logits: [..., C].
      labels: class of each position [...] int; read only where the mask is true.
      mask: positions that count [...] bool.
      gamma: not negative; 0 gives the cross-entropy.
      axis_name: see the module.

    Returns:
      A scalar, float32; zero where no position counts.

    Raises:
      ValueError: negative gamma.
      AssertionError: logits, labels and mask are not of the same positions.
    """
    return _divide(
        focal_per_position(logits, labels, mask, gamma=gamma).sum(), mask.sum(), axis_name
    )


def focal_per_position(
    logits: jax.Array, labels: jax.Array, mask: jax.Array, *, gamma: float = 3.0
) -> jax.Array:
    """The focal loss of each position [...] float32, zero where the mask is false; see `focal`."""
    if gamma < 0:
        raise ValueError(f"focal gamma {gamma}: must not be negative")
    _check_positions(logits, labels, mask)
    # Masked logits are taken out before anything is computed of them: a NaN there would reach the
    # gradient even through a loss that is multiplied by zero.
    logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(mask, labels, 0)
    )
    if gamma:
        # 1 - p = -expm1(-loss), without cancellation. The floor keeps the power's gradient finite
        # for gamma < 1.
        losses *= jnp.maximum(-jnp.expm1(-losses), 1e-12) ** gamma
    return jnp.where(mask, losses, 0)


def supervised_contrastive(
    representations: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    axis_name: str | None = None,
) -> jax.Array:
    """Supervised contrastive loss over all valid representations of the batch (arXiv 2004.11362).

    An anchor's positives are all others of its label; the denominator runs over all others; mean
    over the anchors that have a positive.

    Args:
      representations: [..., F]; normalised here to length 1.
      labels: [...] int; read only where the mask is true.
      mask: representations that count [...] bool.
      temperature: the cosines are divided by it.
      axis_name: see the module.

    Returns:
      A scalar, float32; zero where no anchor has a positive.

    Raises:
      AssertionError: representations, labels and mask are not of the same positions.
    """
    _check_positions(representations, labels, mask)
    x = jnp.where(mask[..., None], representations.astype(jnp.float32), 0)
    square = (x * x).sum(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.maximum(square, 1e-12) * temperature)  # ... F
    total, count = _over_anchors(axis_name, x, labels, mask)
    return _divide(total, count, axis_name)


class _Pairs(NamedTuple):
    """Anchors [...] beside all representations [M] of the global batch.

    The anchors keep their axes: flattened, a sharded batch axis would be lost on the compiler, and
    each device would compute the similarities of all anchors.
    """

    others: jax.Array  # M F
    gather: Callable[[jax.Array], jax.Array]  # ... -> M
    similarity: jax.Array  # ... M
    candidates: jax.Array  # ... M
    positives: jax.Array  # ... M


def _pairs(axis_name: str | None, x: jax.Array, labels: jax.Array, mask: jax.Array) -> _Pairs:
    """Of representations [..., F] whose products are the similarities."""
    first: jax.Array | int = 0
    if axis_name is not None:
        first = jax.lax.axis_index(axis_name) * mask.size

    def gather(values: jax.Array) -> jax.Array:
        values = values.reshape(-1, *values.shape[mask.ndim :])
        if axis_name is None:
            return values
        return jax.lax.all_gather(values, axis_name, tiled=True)

    others = gather(x)
    place = first + jnp.arange(mask.size).reshape(mask.shape)
    itself = place[..., None] == jnp.arange(len(others))
    candidates = gather(mask) & ~itself & mask[..., None]
    positives = candidates & (labels[..., None] == gather(labels))
    return _Pairs(others, gather, x @ others.T, candidates, positives)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_anchors(axis_name, x, labels, mask):
    """Sum of the contrastive losses of this device's anchors, and their number."""
    return _over_anchors_forward(axis_name, x, labels, mask)[0]


def _over_anchors_forward(axis_name, x, labels, mask):
    pairs = _pairs(axis_name, x, labels, mask)
    among = jnp.where(pairs.candidates, pairs.similarity, -jnp.inf)
    largest = jnp.where(pairs.candidates.any(-1), among.max(-1), 0)
    scaled = jnp.exp(among - largest[..., None]).sum(-1)
    log_sum = jnp.log(jnp.where(scaled > 0, scaled, 1.0)) + largest  # ...
    count = pairs.positives.sum(-1)
    mean_positive = jnp.where(pairs.positives, pairs.similarity, 0).sum(-1) / jnp.maximum(count, 1)
    total = jnp.where(count > 0, log_sum - mean_positive, 0).sum()
    return (total, (count > 0).sum()), (x, labels, mask, log_sum, count)


def _over_anchors_backward(axis_name, kept, cotangents):
    """A representation is an anchor, and others' candidate; each device works out both for its own.

    By transposition the second part would come from all devices, as a sum over what is [N, M]. But
    the similarities are symmetric, so with every anchor's log sum and count at hand it can be had
    at home.
    """
    x, labels, mask, log_sum, count = kept
    pairs = _pairs(axis_name, x, labels, mask)

    def pull(log_sum: jax.Array, count: jax.Array) -> jax.Array:
        softmax = jnp.exp(jnp.where(pairs.candidates, pairs.similarity - log_sum, -jnp.inf))
        pulled = softmax - jnp.where(pairs.positives, 1 / jnp.maximum(count, 1), 0)
        return jnp.where(count > 0, pulled, 0)

    pulled = pull(log_sum[..., None], count[..., None])
    pulled += pull(pairs.gather(log_sum), pairs.gather(count))
    gradient = pulled @ pairs.others * cotangents[0]
    return gradient, None, None


_over_anchors.defvjp(_over_anchors_forward, _over_anchors_backward)


def expert_agreement(
    expert_logits: jax.Array,
    mask: jax.Array,
    expert_mask: jax.Array | None = None,
    *,
    experts: tuple[int, ...] | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Symmetric KL between the experts: KL(p||q) + KL(q||p), mean over pairs of experts.

    Summed over a dialogue's utterances, mean over the dialogues with an utterance that counts, as
    in the released MiSTER-E.

    Args:
      expert_logits: [B, T, E, C].
      mask: utterances that count [B, T] bool.
      expert_mask: experts present [B, T, E] bool; a pair counts where both are. All by default.
      experts: indices of the experts in use; all by default.
      axis_name: see the module.

    Returns:
      A scalar, float32; zero with fewer than two experts.
    """
    experts = tuple(range(expert_logits.shape[2])) if experts is None else experts
    pairs = list(itertools.combinations(experts, 2))
    if not pairs:
        return jnp.zeros((), jnp.float32)
    expert_logits = jnp.where(mask[..., None, None], expert_logits.astype(jnp.float32), 0)
    log_p = jax.nn.log_softmax(expert_logits)  # B T E C
    p = jnp.exp(log_p)
    total = jnp.zeros((), jnp.float32)
    for a, b in pairs:
        # KL(a||b) + KL(b||a) in one sum.
        divergence = ((p[:, :, a] - p[:, :, b]) * (log_p[:, :, a] - log_p[:, :, b])).sum(-1)  # B T
        both = mask if expert_mask is None else mask & expert_mask[..., a] & expert_mask[..., b]
        total += jnp.where(both, divergence, 0).sum()
    return _divide(total / len(pairs), mask.any(1).sum(), axis_name)


def gate_responsibility(
    gate: jax.Array,
    expert_logits: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    expert_mask: jax.Array | None = None,
    *,
    sharpness: float = 1.0,
    axis_name: str | None = None,
) -> jax.Array:
    """Cross-entropy of the gate against the experts' responsibilities, mean over valid positions.

    An expert is responsible for a label in proportion to the probability it gave it, to the power
    of `sharpness`; to the power of 1 that is the E step of a mixture of experts (Jordan and Jacobs,
    1994), and the higher, the more the best expert has it alone. It teaches the gate only: to it
    the experts' votes are given. Where the weights are not learned ("mean", "majority") it is a
    mere number.

    Args:
      gate: weights of the experts [..., E], sum 1; zero for those that are missing.
      expert_logits: [..., E, C].
      labels: class of each position [...] int; read only where the mask is true.
      mask: positions that count [...] bool.
      expert_mask: experts present [..., E] bool; all by default.
      sharpness: not negative.
      axis_name: see the module.

    Returns:
      A scalar, float32; zero where no position counts.

    Raises:
      ValueError: negative sharpness.
      AssertionError: gate, logits, labels and mask are not of the same positions.
    """
    if sharpness < 0:
        raise ValueError(f"gate sharpness {sharpness}: must not be negative")
    _check_positions(gate, labels, mask)
    chex.assert_equal_shape_prefix([expert_logits, gate], gate.ndim)
    present = jnp.broadcast_to(mask[..., None], gate.shape)
    present = present if expert_mask is None else present & expert_mask  # ... E
    votes = jnp.where(present[..., None], expert_logits.astype(jnp.float32), 0)
    label = jnp.broadcast_to(jnp.where(mask, labels, 0)[..., None], gate.shape)
    log_p = -optax.losses.softmax_cross_entropy_with_integer_labels(votes, label)  # ... E
    responsibility = jax.nn.softmax(sharpness * log_p, where=present)
    responsibility = jax.lax.stop_gradient(responsibility)
    # The floor is far below what a gate is taught to give, and keeps the logarithm finite.
    log_gate = jnp.log(jnp.where(present, jnp.maximum(gate.astype(jnp.float32), 1e-12), 1))
    return _divide(-(responsibility * log_gate).sum(), mask.sum(), axis_name)


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of `mister_e`; the defaults are the released ones."""

    mixture: float = 1.0
    speech: float = 1.0
    text: float = 1.0
    fusion: float = 1.0
    contrastive: float = 2.0
    agreement: float = 0.1
    gate: float = 0.0


def mister_e(
    output: MisterEOutput,
    labels: jax.Array,
    mask: jax.Array,
    weights: LossWeights | None = None,
    *,
    gamma: float = 3.0,
    temperature: float = 1.0,
    sharpness: float = 1.0,
    experts: tuple[str, ...] = EXPERTS,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of MiSTER-E (arXiv 2602.23300; weights of the released code).

    Focal losses of the mixture and of each expert, the contrastive loss between the fusion
    representations of speech and text, the agreement of the experts, and the responsibility of the
    gate (of weight 0 as released). An expert is held to account for the utterances it could vote
    on.

    Args:
      output: of `MisterE`.
      labels: [B, T] int, -1 where unlabeled.
      mask: true at utterances [B, T] bool. Unlabeled ones count in no part.
      weights: of the parts.
      gamma: of the focal losses.
      temperature: of the contrastive loss.
      sharpness: of the experts' responsibilities that the gate is taught.
      experts: in use; the other experts' parts are left out.
      axis_name: see the module.

    Returns:
      The weighted total, and each part unweighted: "mixture", "speech", "text", "fusion",
      "contrastive", "agreement", "gate" (those of experts in use); scalars, float32.
    """
    weights = LossWeights() if weights is None else weights
    labeled = mask & (labels >= 0)
    parts = {
        "mixture": focal(output.logits, labels, labeled, gamma=gamma, axis_name=axis_name),
    }
    in_use = tuple(index for index, name in enumerate(EXPERTS) if name in experts)
    for index in in_use:
        parts[EXPERTS[index]] = focal(
            output.expert_logits[:, :, index],
            labels,
            labeled & output.expert_present[..., index],
            gamma=gamma,
            axis_name=axis_name,
        )
    if "fusion" in experts:
        parts["contrastive"] = supervised_contrastive(
            jnp.stack([output.speech_repr, output.text_repr]),
            jnp.stack([labels, labels]),
            labeled & jnp.stack([output.speech_present, output.text_present]),
            temperature=temperature,
            axis_name=axis_name,
        )
    if len(in_use) > 1:
        parts["agreement"] = expert_agreement(
            output.expert_logits,
            labeled,
            output.expert_present,
            experts=in_use,
            axis_name=axis_name,
        )
        parts["gate"] = gate_responsibility(
            output.gate,
            output.expert_logits,
            labels,
            labeled,
            output.expert_present,
            sharpness=sharpness,
            axis_name=axis_name,
        )
    total = sum(getattr(weights, name) * value for name, value in parts.items())
    return total, parts
