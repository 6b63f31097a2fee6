"""MiSTER-E's losses: pure functions from masked arrays to a float32 scalar.

The computation is float32. If `jax_enable_x64` is on and the logits or representations are float64,
the computation and the loss are float64. Masks may be bool, or integers that are converted to bool.

Each loss is a sum divided by a count. In `pmap` or `shard_map`, pass the name of the mapped axis as
`axis_name`. Each device then divides the sum over its own rows by the count over all devices, and
the contrastive loss compares these rows with the rows of all devices. To get the loss of the global
batch and its gradient, sum the losses and gradients over all devices (`jax.lax.psum`, not `pmean`).
`shard_map` already sums the gradients of parameters that the devices share.

`mister_e` is the training objective. It combines the other losses.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mister_jax.config_checks import invalid_field
from mister_jax.models import EXPERTS, MisterEOutput
from mister_jax.nn.dtypes import at_least_float32


def _divide_by_global_count(total: jax.Array, count: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns total / global count, or zero if the count is zero."""
    count = count.astype(total.dtype)
    if axis_name is not None:
        count = jax.lax.psum(count, axis_name)
    return total / jnp.maximum(count, 1.0)


def _as_float(values: jax.Array) -> jax.Array:
    """Converts an array to float32; float64 arrays are not changed."""
    values = jnp.asarray(values)
    return values.astype(at_least_float32(values.dtype))


def _check_positions(values: jax.Array, labels: jax.Array, mask: jax.Array) -> None:
    """Checks that values [..., D], labels [...] and mask [...] match without broadcasting."""
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
    """Computes the focal loss, the mean of (1 - p)^gamma * -log(p) over valid positions.

    Here p is the softmax probability of the label (arXiv 1708.02002).

    Args:
      logits: Class logits, [..., C].
      labels: Class of each position, [...] int; read only where the mask is True. Positions whose
        label is not in 0..C-1, such as -1, are unlabeled and do not count.
      mask: Positions that count, [...] bool.
      gamma: Focusing parameter, 0 or more; 0 gives the cross-entropy.
      axis_name: Mapped axis; see the module's docstring.

    Returns:
      Loss, [] float32; zero if no position counts.

    Raises:
      ValueError: `gamma` is negative.
      AssertionError: The shapes of `logits`, `labels` and `mask` do not match.
    """
    losses = focal_per_position(logits, labels, mask, gamma=gamma)
    labeled = _labeled(labels, mask, logits.shape[-1])
    return _divide_by_global_count(losses.sum(), labeled.sum(), axis_name)


def focal_per_position(
    logits: jax.Array, labels: jax.Array, mask: jax.Array, *, gamma: float = 3.0
) -> jax.Array:
    """Returns the focal loss of each position, [...] float32.

    The loss is zero outside the mask and at unlabeled positions; see `focal`.
    """
    if gamma < 0:
        raise ValueError(f"focal gamma {gamma}; allowed: 0 or more")
    _check_positions(logits, labels, mask)
    labeled = _labeled(labels, mask, logits.shape[-1])
    # Also mask the logits, because a zero gradient times a NaN logit would be NaN.
    logits = jnp.where(labeled[..., None], _as_float(logits), 0)
    return jnp.where(labeled, _focal_from_cross_entropy(cross_entropy(logits, labels), gamma), 0)


def _labeled(labels: jax.Array, mask: jax.Array, num_classes: int) -> jax.Array:
    """Returns which positions inside the mask have a label in 0..C-1."""
    return mask.astype(bool) & (labels >= 0) & (labels < num_classes)


def _focal_from_cross_entropy(cross_entropy: jax.Array, gamma: float) -> jax.Array:
    """Returns the focal loss of `focal` and `mister_e`: (1 - p)^gamma * -log(p).

    The cross-entropy is -log(p).
    """
    if not gamma:
        return cross_entropy
    # 1 - p = -expm1(-cross_entropy), without cancellation. The lower bound keeps the gradient of
    # the power finite for gamma < 1.
    return cross_entropy * jnp.maximum(-jnp.expm1(-cross_entropy), 1e-12) ** gamma


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns -log p of the labels, [...]; 0 for a label that is not a class, such as -1.

    The labels are converted to one-hot vectors, because the gradient of indexing is a scatter,
    which compiles and runs slowly.

    Args:
      logits: Class logits, [..., C] float32.
      labels: Class of each position, [...] int.
    """
    logits = jnp.asarray(logits)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.losses.softmax_cross_entropy(logits, one_hot)


def supervised_contrastive(
    representations: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes the supervised contrastive loss over the global batch (arXiv 2004.11362).

    An anchor's positives are all other representations with the anchor's label. The denominator of
    the anchor's softmax sums over all other representations. The loss is the mean over anchors with
    at least one positive. Forward-mode differentiation (`jax.jvp`) is not supported.

    Args:
      representations: Representations, [..., F]; this function normalizes them to length 1.
      labels: Labels, [...] int; read only where the mask is True. Representations with negative
        labels are unlabeled and do not count.
      mask: Representations that count, [...] bool.
      temperature: Divisor of the cosine similarities, positive.
      axis_name: Mapped axis; see the module's docstring.

    Returns:
      Loss, [] float32; zero if no anchor has a positive.

    Raises:
      ValueError: `temperature` is a number that is not positive.
      AssertionError: The shapes of `representations`, `labels` and `mask` do not match.
    """
    # A traced temperature has no value yet.
    if not isinstance(temperature, jax.Array) and not temperature > 0:
        raise ValueError(f"{temperature=}; allowed: positive numbers")
    _check_positions(representations, labels, mask)
    mask = mask.astype(bool) & (labels >= 0)
    x = jnp.where(mask[..., None], _as_float(representations), 0)
    squared_norm = (x * x).sum(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.maximum(squared_norm, 1e-12) * temperature)  # ... F
    total, count = _sum_over_anchors(axis_name, x, labels, mask)
    return _divide_by_global_count(total, count, axis_name)


class _ContrastivePairs(NamedTuple):
    """Pairs of each anchor on this device with each of the M representations of the global batch.

    In the shapes below, `...` stands for the axes of the anchors. The anchors keep their axes:
    flattening would drop the batch sharding, so that each device would compute the similarities of
    all anchors.
    """

    all_x: jax.Array  # M F
    gather: Callable[[jax.Array], jax.Array]  # ... -> M
    similarity: jax.Array  # ... M
    is_candidate: jax.Array  # ... M
    is_positive: jax.Array  # ... M


def _pairs(
    axis_name: str | None, x: jax.Array, labels: jax.Array, mask: jax.Array
) -> _ContrastivePairs:
    """Returns all pairs; dot products of `x`, [..., F], are similarities divided by temperature."""
    offset: jax.Array | int = 0
    if axis_name is not None:
        offset = jax.lax.axis_index(axis_name) * mask.size

    def gather(values: jax.Array) -> jax.Array:
        # On meshes with explicit axes, JAX does not flatten a sharded array.
        if any(jax.typeof(values).sharding.spec):
            values = jax.sharding.reshard(values, jax.sharding.PartitionSpec())
        values = values.reshape(-1, *values.shape[mask.ndim :])
        if axis_name is None:
            return values
        return jax.lax.all_gather(values, axis_name, tiled=True)

    all_x = gather(x)
    index = offset + jnp.arange(mask.size).reshape(mask.shape)
    is_self = index[..., None] == jnp.arange(len(all_x))
    is_candidate = gather(mask) & ~is_self & mask[..., None]
    is_positive = is_candidate & (labels[..., None] == gather(labels))
    return _ContrastivePairs(all_x, gather, x @ all_x.T, is_candidate, is_positive)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_anchors(axis_name, x, labels, mask):
    """Returns the contrastive loss summed over this device's anchors, and the number of anchors."""
    return _sum_over_anchors_forward(axis_name, x, labels, mask)[0]


def _sum_over_anchors_forward(axis_name, x, labels, mask):
    pairs = _pairs(axis_name, x, labels, mask)
    similarity = jnp.where(pairs.is_candidate, pairs.similarity, -jnp.inf)
    maximum = jnp.where(pairs.is_candidate.any(-1), similarity.max(-1), 0)
    scaled_sum = jnp.exp(similarity - maximum[..., None]).sum(-1)
    log_sum = jnp.log(jnp.where(scaled_sum > 0, scaled_sum, 1.0)) + maximum  # ...
    count = pairs.is_positive.sum(-1)
    positive_sum = jnp.where(pairs.is_positive, pairs.similarity, 0).sum(-1)
    mean = positive_sum / jnp.maximum(count, 1).astype(x.dtype)
    total = jnp.where(count > 0, log_sum - mean, 0).sum()
    return (total, (count > 0).sum()), (x, labels, mask, log_sum, count)


def _sum_over_anchors_backward(axis_name, residuals, cotangents):
    """Computes the gradient for this device's representations without a sum over devices.

    Each representation contributes to the loss as an anchor and as a candidate for other anchors.
    Automatic differentiation would compute the second contribution's gradient on the devices that
    hold the anchors, and then sum gradients of all M representations, [M, F], over all devices.
    Because similarities are symmetric, each device can compute the whole gradient for its own
    representations from all representations, and from each anchor's number of positives and
    `log_sum`, the log of the softmax's denominator.
    """
    x, labels, mask, log_sum, count = residuals
    pairs = _pairs(axis_name, x, labels, mask)

    def d_similarity(log_sum: jax.Array, count: jax.Array) -> jax.Array:
        softmax = jnp.exp(jnp.where(pairs.is_candidate, pairs.similarity - log_sum, -jnp.inf))
        share = 1 / jnp.maximum(count, 1).astype(x.dtype)
        gradient = softmax - jnp.where(pairs.is_positive, share, 0)
        return jnp.where(count > 0, gradient, 0)

    gradient = d_similarity(log_sum[..., None], count[..., None])  # as an anchor
    gradient += d_similarity(pairs.gather(log_sum), pairs.gather(count))  # as a candidate
    return gradient @ pairs.all_x * cotangents[0], None, None


_sum_over_anchors.defvjp(_sum_over_anchors_forward, _sum_over_anchors_backward)


def expert_agreement(
    expert_logits: jax.Array,
    mask: jax.Array,
    expert_mask: jax.Array | None = None,
    *,
    experts: tuple[int, ...] | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes the symmetric KL divergence KL(p||q) + KL(q||p) between the experts.

    As in the released MiSTER-E, the divergence is summed over pairs of experts, divided by the
    number of pairs of enabled experts, summed over the utterances in a dialogue, and averaged over
    dialogues with at least one utterance that counts.

    Args:
      expert_logits: Logits of the experts, [B, T, E, C].
      mask: Utterances that count, [B, T] bool.
      expert_mask: Present experts, [B, T, E] bool; all by default. A pair of experts counts only at
        utterances where both experts are present.
      experts: Indices of the enabled experts; all by default.
      axis_name: Mapped axis; see the module's docstring.

    Returns:
      Loss, [] float32; zero with fewer than two experts.
    """
    mask = mask.astype(bool)
    log_p = jax.nn.log_softmax(jnp.where(mask[..., None, None], _as_float(expert_logits), 0))
    experts = tuple(range(log_p.shape[2])) if experts is None else experts
    present = jnp.broadcast_to(mask[..., None], log_p.shape[:-1])  # B T E
    present = present if expert_mask is None else present & expert_mask.astype(bool)
    return _agreement(log_p, mask, present, experts, axis_name)


def _agreement(
    log_p: jax.Array,
    mask: jax.Array,
    present: jax.Array,
    experts: Sequence[int],
    axis_name: str | None,
) -> jax.Array:
    """Computes `expert_agreement` from log-probabilities, [B, T, E, C].

    The divergences of all pairs of n present experts add up to a covariance:
    sum_{a<b} (p_a - p_b)(log p_a - log p_b) = n sum_a (p_a - mean p)(log p_a - mean log p).
    """
    if len(experts) < 2:
        return jnp.zeros((), log_p.dtype)
    is_enabled = np.isin(np.arange(log_p.shape[2]), experts)
    weight = (present & is_enabled)[..., None].astype(log_p.dtype)  # B T E 1
    count = weight.sum(2, keepdims=True)  # B T 1 1

    def center(values: jax.Array) -> jax.Array:
        mean = (weight * values).sum(2, keepdims=True) / jnp.maximum(count, 1)
        return weight * (values - mean)

    total = (count * center(jnp.exp(log_p)) * center(log_p)).sum()
    num_pairs = len(experts) * (len(experts) - 1) / 2
    return _divide_by_global_count(total / num_pairs, mask.any(1).sum(), axis_name)


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
    """Computes the cross-entropy of the gate weights with the experts' responsibilities as targets.

    An expert's responsibility is proportional to the probability that the expert gives to the
    label, raised to the power of `sharpness`. With sharpness 1, this is the E step of a mixture of
    experts (Jordan and Jacobs, 1994) in which all experts have the same prior weight. Higher values
    favor the best expert.

    The loss has a gradient with respect to `gate` but not to `expert_logits`, because the targets
    are constants. In `MisterE`, the loss still trains the experts, through the gate's input. With
    the mixtures "mean" and "majority", the gate weights are constants, so the loss trains nothing.

    Args:
      gate: Expert weights, [..., E]; they sum to 1 over E and are zero for missing experts.
      expert_logits: Logits of the experts, [..., E, C].
      labels: Class of each position, [...] int; read only where the mask is True. Positions whose
        label is not in 0..C-1, such as -1, are unlabeled and do not count.
      mask: Positions that count, [...] bool.
      expert_mask: Present experts, [..., E] bool; all by default.
      sharpness: Exponent of the probabilities, 0 or more.
      axis_name: Mapped axis; see the module's docstring.

    Returns:
      Mean over the positions that count, [] float32; zero if no position counts.

    Raises:
      ValueError: `sharpness` is negative.
      AssertionError: The shapes of the arguments do not match.
    """
    if sharpness < 0:
        raise ValueError(f"gate sharpness {sharpness}; allowed: 0 or more")
    _check_positions(gate, labels, mask)
    chex.assert_equal_shape_prefix([expert_logits, gate], gate.ndim)
    mask = _labeled(labels, mask, expert_logits.shape[-1])
    present = jnp.broadcast_to(mask[..., None], gate.shape)
    present = present if expert_mask is None else present & expert_mask.astype(bool)  # ... E
    expert_logits = jnp.where(present[..., None], _as_float(expert_logits), 0)
    log_p = -cross_entropy(expert_logits, jnp.broadcast_to(labels[..., None], gate.shape))
    return _gate_responsibility(gate, sharpness * log_p, mask, present, axis_name)


def _gate_responsibility(
    gate: jax.Array,
    scaled_log_p: jax.Array,
    mask: jax.Array,
    present: jax.Array,
    axis_name: str | None,
) -> jax.Array:
    """Computes `gate_responsibility` from sharpness * log p(label), [..., E]."""
    responsibility = jax.nn.softmax(scaled_log_p, where=present)  # ... E
    responsibility = jax.lax.stop_gradient(responsibility)
    # The lower bound keeps the logarithm finite. Learned gate weights are usually far above it.
    log_gate = jnp.log(jnp.where(present, jnp.maximum(_as_float(gate), 1e-12), 1))
    return _divide_by_global_count(-(responsibility * log_gate).sum(), mask.sum(), axis_name)


def rating_targets(labels: jax.Array, ratings: jax.Array) -> jax.Array:
    """Returns target distributions, [..., C]; zeros if an utterance has no rating and no label.

    Args:
      labels: Labels, [...] int, -1 if unlabeled; used where there are no ratings.
      ratings: Number of raters who chose each class, [..., C]; all zeros without ratings.
    """
    ratings = _as_float(ratings)
    count = ratings.sum(-1, keepdims=True)
    one_hot = jax.nn.one_hot(labels, ratings.shape[-1], dtype=ratings.dtype)
    return jnp.where(count > 0, ratings / jnp.maximum(count, 1e-6), one_hot)


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the losses in `mister_e`; the defaults match the released code.

    Attributes:
      mixture: Weight of the mixture's focal loss, which is the cross-entropy if `gamma` is 0.
      speech: Weight of the speech expert's focal loss.
      text: Weight of the text expert's focal loss.
      fusion: Weight of the cross-modal expert's focal loss.
      contrastive: Weight of `supervised_contrastive`.
      agreement: Weight of `expert_agreement`.
      gate: Weight of `gate_responsibility`.
      score: Weight of `score_error`; needs a model that predicts scores.

    Raises:
      ValueError: A weight is negative or not finite.
    """

    mixture: float = 1.0
    speech: float = 1.0
    text: float = 1.0
    fusion: float = 1.0
    contrastive: float = 2.0
    agreement: float = 0.1
    gate: float = 0.0
    score: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < math.inf:  # also rejects NaN
                raise invalid_field(self, field.name, "finite numbers of at least 0")


def score_error(
    output: MisterEOutput,
    scores: jax.Array,
    mask: jax.Array,
    *,
    axis_name: str | None = None,
) -> jax.Array:
    """Returns the sum of the mean absolute errors of the mixture's and each expert's score.

    Args:
      output: Output of a `MisterE` that predicts scores.
      scores: Annotated scores, [B, T]; utterances with NaN are ignored.
      mask: Valid utterances, [B, T] bool.
      axis_name: Mapped axis; see the module's docstring.

    Returns:
      Loss, [] float32. An expert's error counts only where the expert is present.

    Raises:
      ValueError: The model predicts no scores.
    """
    if output.score is None or output.expert_scores is None:
        raise ValueError("score_error needs MisterEConfig.predict_score=True")
    predicted = jnp.concatenate([output.score[..., None], output.expert_scores], axis=-1)
    predicted = _as_float(predicted)  # B T 1+E
    scores = jnp.asarray(scores, predicted.dtype)
    scored = mask.astype(bool) & ~jnp.isnan(scores)
    present = scored[..., None] & output.expert_present  # B T E
    counted = jnp.concatenate([scored[..., None], present], axis=-1)  # B T 1+E
    # Mask the values before the difference, because a zero gradient times NaN would be NaN.
    error = jnp.where(counted, predicted, 0) - jnp.where(counted, scores[..., None], 0)
    sums, counts = jnp.abs(error).sum((0, 1)), counted.sum((0, 1))
    return _divide_by_global_count(sums, counts, axis_name).sum()


def _check_shape(name: str, values: jax.Array | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError if an array does not have the shape; None passes."""
    if values is not None and values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape}; allowed: {shape}, as in the output")


def mister_e(
    output: MisterEOutput,
    labels: jax.Array,
    mask: jax.Array,
    weights: LossWeights | None = None,
    *,
    gamma: float = 3.0,
    temperature: float = 1.0,
    sharpness: float = 1.0,
    class_weights: jax.typing.ArrayLike | None = None,
    logit_adjustment: jax.typing.ArrayLike | None = None,
    scores: jax.Array | None = None,
    ratings: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the training loss of MiSTER-E (arXiv 2602.23300).

    The loss is the weighted sum of:

    - the focal losses of the mixture and of each expert, where the expert is present,
    - the contrastive loss between the fusion expert's speech and text representations, if the model
      has this expert,
    - `expert_agreement`, the divergence between the enabled experts,
    - the gate loss `gate_responsibility`, whose weight is 0 in the released code,
    - `score_error`, if the model predicts scores and `scores` is given.

    Losses with weight 0 are not computed.

    Args:
      output: Output of `MisterE`; its `experts` are the enabled experts.
      labels: Class of each utterance, [B, T] int. Utterances whose label is not in 0..C-1, such as
        -1, are unlabeled.
      mask: Valid utterances, [B, T] bool. Utterances with neither a label nor ratings count only in
        `score_error`.
      weights: Weights of the losses, as Python numbers; by default, those of the released code.
      gamma: Focusing parameter of the focal losses.
      temperature: Temperature of the contrastive loss.
      sharpness: Sharpness of the gate loss.
      class_weights: Weight of each class in the focal losses, [C]; see `imbalance.class_weights`.
      logit_adjustment: Values added to the logits in the focal losses and in the gate loss, [C];
        see `imbalance.logit_adjustment`.
      scores: Annotated scores, [B, T], NaN if missing; by default, the loss has no `score_error`.
      ratings: Number of raters who chose each class, [B, T, C]. If given, the raters'
        distributions are the targets. The focal losses are then sums over the classes, weighted by
        each class's share of the raters. In the gate loss, the mean of an expert's
        log-probabilities with the same weights replaces the log-probability of the label. For an
        utterance without ratings, the label is the target. The contrastive loss always uses labels.
      axis_name: Mapped axis; see the module's docstring.

    Returns:
      Weighted sum, [] float32, and the unweighted losses by their names in `LossWeights`, each []
      float32. Losses with weight 0 and losses without the experts or scores they need are left out.

    Raises:
      ValueError: An array has the wrong shape, or another argument has a value that is not allowed.
    """
    if min(gamma, sharpness) < 0:
        raise ValueError(f"{gamma=}, {sharpness=}; allowed: 0 or more")
    if not temperature > 0:
        raise ValueError(f"{temperature=}; allowed: positive numbers")
    experts = output.experts
    if not isinstance(experts, tuple) or not set(experts) <= set(EXPERTS):
        raise ValueError(f"output.experts={experts!r}; allowed: a tuple of {', '.join(EXPERTS)}")
    weights = LossWeights() if weights is None else weights
    if not isinstance(weights, LossWeights):
        raise ValueError(f"weights={weights!r}; allowed: LossWeights")
    shape, num_classes = output.logits.shape[:2], output.logits.shape[-1]
    _check_shape("labels", labels, shape)
    _check_shape("mask", mask, shape)
    _check_shape("scores", scores, shape)
    _check_shape("ratings", ratings, (*shape, num_classes))
    has_label = _labeled(labels, mask, num_classes)
    target = None if ratings is None else rating_targets(labels, ratings)  # B T C
    labeled = has_label if target is None else mask.astype(bool) & (target.sum(-1) > 0)
    # The losses share the log-probabilities of the mixture and the experts, [B, T, 1 + E, C].
    logits = jnp.concatenate([output.logits[:, :, None], output.expert_logits], axis=2)
    logits = jnp.where(labeled[..., None, None], _as_float(logits), 0)
    log_p = jax.nn.log_softmax(logits)
    adjusted = log_p
    if logit_adjustment is not None:
        adjusted = jax.nn.log_softmax(logits + jnp.asarray(logit_adjustment, logits.dtype))
    if target is None:
        target = jax.nn.one_hot(labels, num_classes)
    target = target.astype(log_p.dtype)
    if class_weights is not None:
        class_weights = jnp.asarray(class_weights, log_p.dtype)
    label_log_p = (adjusted * target[:, :, None]).sum(-1)  # B T 1+E
    present = labeled[..., None] & output.expert_present  # B T E
    counted = jnp.concatenate([labeled[..., None], present], axis=-1)  # B T 1+E
    if ratings is not None:
        weighted = target if class_weights is None else target * class_weights
        per_utterance = (weighted[:, :, None] * _focal_from_cross_entropy(-adjusted, gamma)).sum(-1)
    else:
        per_utterance = _focal_from_cross_entropy(-label_log_p, gamma)
        if class_weights is not None:
            per_utterance *= (target @ class_weights)[..., None]
    focal_losses = _divide_by_global_count(
        jnp.where(counted, per_utterance, 0).sum((0, 1)),
        counted.sum((0, 1)),
        axis_name,
    )
    parts = {
        name: focal_losses[index]
        for index, name in enumerate(("mixture", *EXPERTS))
        if getattr(weights, name) and name in ("mixture", *experts)
    }
    if "fusion" in experts and weights.contrastive:
        parts["contrastive"] = supervised_contrastive(
            jnp.stack([output.speech_repr, output.text_repr]),
            jnp.stack([labels, labels]),
            has_label & jnp.stack([output.speech_present, output.text_present]),
            temperature=temperature,
            axis_name=axis_name,
        )
    if len(experts) > 1 and weights.agreement:
        indices = [EXPERTS.index(name) for name in experts]
        parts["agreement"] = _agreement(log_p[:, :, 1:], labeled, present, indices, axis_name)
    if len(experts) > 1 and weights.gate:
        parts["gate"] = _gate_responsibility(
            output.gate, sharpness * label_log_p[..., 1:], labeled, present, axis_name
        )
    if output.score is not None and scores is not None and weights.score:
        parts["score"] = score_error(output, scores, mask, axis_name=axis_name)
    weighted_parts = (getattr(weights, name) * value for name, value in parts.items())
    return sum(weighted_parts, start=jnp.zeros((), log_p.dtype)), parts
