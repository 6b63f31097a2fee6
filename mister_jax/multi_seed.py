"""Trains several seeds in one program: their states share one leading axis [S].

A training of one seed has no such axis. Only this module handles the single-seed case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mister_jax.metrics import SCORE_NAMES, mean_and_deviation


def stack_seeds(trees: Sequence[Any]) -> Any:
    """Stacks S trees into one, on the host."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def unstack_seeds(tree: Any, count: int) -> list[Any]:
    """Splits a stacked tree into those of `count` seeds."""
    if count == 1:
        return [tree]
    leaves, form = jax.tree.flatten(tree)
    return [jax.tree.unflatten(form, [leaf[index] for leaf in leaves]) for index in range(count)]


def stacked_shapes(shapes: Any, count: int) -> Any:
    """Returns the shapes of `count` stacked trees with these shapes."""
    if count == 1:
        return shapes
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), shapes)


def vmap_over_seeds(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Maps a step or an evaluation of one state over the stacked states of `count` seeds.

    Args:
      function: Function of `(state, batch, axis_name)`, see `parallel`; the seeds share the batch.
      count: Number of seeds S.
    """
    if count == 1:
        return function

    def mapped(state, batch, axis_name):
        return jax.vmap(lambda one: function(one, batch, axis_name))(state)

    return mapped


@jax.jit
def select_seeds(chosen: jax.Array, new: Any, old: Any) -> Any:
    """Selects from stacked trees `new` for the chosen seeds and `old` for the others.

    Args:
      chosen: Whether each seed is chosen [S] bool.
      new: Tree of arrays [S, ...].
      old: Tree of arrays [S, ...].
    """

    def one(ours, theirs):
        return jnp.where(jnp.reshape(chosen, (-1,) + (1,) * (ours.ndim - 1)), ours, theirs)

    return jax.tree.map(one, new, old)


def ensemble(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Averages the predictions of S seeds.

    The probabilities of the mixture and of each expert, and the gate weights, are means over the
    seeds, so that a mixture and its experts are compared under one rule. Other arrays, such as the
    presence of experts, are the same for all seeds.

    Args:
      predictions: Predictions of a task, by seed.
    """
    if len(predictions) == 1:
        return dict(predictions[0])
    stacked = {name: np.stack([each[name] for each in predictions]) for name in predictions[0]}
    return {
        name: values.mean(0, dtype=values.dtype) if values.dtype.kind == "f" else values[0]
        for name, values in stacked.items()
    }


def summarize_seeds(seeds: Sequence[int], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarizes the scores of S seeds.

    Args:
      seeds: The S seeds.
      scores: `metrics.classification_scores` of each seed.

    Returns:
      `SCORE_NAMES` under "of_each" by seed, and their "mean" and sample "deviation" (0 for one seed).
    """
    told = {name: mean_and_deviation(each[name] for each in scores) for name in SCORE_NAMES}
    return {
        "of_each": {
            str(seed): {name: each[name] for name in SCORE_NAMES}
            for seed, each in zip(seeds, scores, strict=True)
        },
        "mean": {name: mean for name, (mean, _) in told.items()},
        "deviation": {name: deviation for name, (_, deviation) in told.items()},
    }
