"""Functions for training several seeds at once; their states are stacked along a leading axis S.

With a single seed, this axis is omitted. Only this module handles that case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mister_jax.metrics import SCORE_NAMES, mean_and_deviation


def stack_seeds(trees: Sequence[Any]) -> Any:
    """Stacks S trees into one on the host."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def unstack_seeds(tree: Any, count: int) -> list[Any]:
    """Splits a stacked tree into one tree for each of `count` seeds."""
    if count == 1:
        return [tree]
    leaves, treedef = jax.tree.flatten(tree)
    return [jax.tree.unflatten(treedef, [leaf[index] for leaf in leaves]) for index in range(count)]


def stacked_shapes(shapes: Any, count: int) -> Any:
    """Adds the axis of `count` seeds to the shapes of a single seed."""
    if count == 1:
        return shapes
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), shapes)


def vmap_over_seeds(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Vectorizes a training or evaluation step over the stacked states of `count` seeds.

    Args:
      function: Function of `(state, batch, axis_name)`; see `parallel.partitioning`. All seeds
        share the batch.
      count: Number of seeds S.
    """
    if count == 1:
        return function

    def mapped(state, batch, axis_name):
        return jax.vmap(lambda seed_state: function(seed_state, batch, axis_name))(state)

    return mapped


@jax.jit
def select_seeds(is_new: jax.Array, new: Any, old: Any) -> Any:
    """Takes each seed from `new` where `is_new` is true, and from `old` elsewhere.

    Args:
      is_new: Whether to take each seed from `new`, [S] bool.
      new: Tree of arrays [S, ...].
      old: Tree of arrays [S, ...].
    """

    def select(new_leaf, old_leaf):
        condition = jnp.reshape(is_new, (-1,) + (1,) * (new_leaf.ndim - 1))
        return jnp.where(condition, new_leaf, old_leaf)

    return jax.tree.map(select, new, old)


def ensemble(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Averages the predictions of S seeds.

    The mixture's and the experts' probabilities and the gate weights are averaged. Integer and bool
    arrays, such as the presence of experts, are the same for all seeds.

    Args:
      predictions: Predictions of a task, by seed.
    """
    if len(predictions) == 1:
        return dict(predictions[0])
    stacked = {
        name: np.stack([seed_predictions[name] for seed_predictions in predictions])
        for name in predictions[0]
    }
    return {
        name: values.mean(0, dtype=values.dtype) if values.dtype.kind == "f" else values[0]
        for name, values in stacked.items()
    }


def summarize_seeds(seeds: Sequence[int], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarizes the scores of S seeds.

    Args:
      seeds: S seeds.
      scores: Result of `metrics.classification_scores` for each seed.

    Returns:
      "of_each" (the `SCORE_NAMES` by seed), and their "mean" and sample standard "deviation" (0 for
      one seed).
    """
    summaries = {
        name: mean_and_deviation(seed_scores[name] for seed_scores in scores)
        for name in SCORE_NAMES
    }
    return {
        "of_each": {
            str(seed): {name: seed_scores[name] for name in SCORE_NAMES}
            for seed, seed_scores in zip(seeds, scores, strict=True)
        },
        "mean": {name: mean for name, (mean, _) in summaries.items()},
        "deviation": {name: deviation for name, (_, deviation) in summaries.items()},
    }
