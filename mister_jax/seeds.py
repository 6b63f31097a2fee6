"""Several seeds in one program: their states under one leading axis, their results side by side.

The axis [S] holds the seeds in order. A training of one seed has no such axis: here alone is that
told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mister_jax.writers import mean_and_deviation

SCORES = ("weighted_f1", "macro_f1", "accuracy", "balanced_accuracy")
"""Of `metrics.scores`, those that are told of each seed."""


def join(trees: Sequence[Any]) -> Any:
    """One tree of S trees, on the host."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def split(tree: Any, count: int) -> list[Any]:
    """The tree of each of `count` seeds."""
    if count == 1:
        return [tree]
    leaves, form = jax.tree.flatten(tree)
    return [jax.tree.unflatten(form, [leaf[index] for leaf in leaves]) for index in range(count)]


def joined_shapes(shapes: Any, count: int) -> Any:
    """The shapes of `join` of `count` trees with these shapes."""
    if count == 1:
        return shapes
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), shapes)


def over_seeds(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A step or a reader of one state, made one of the joined states of `count` seeds.

    Args:
      function: of `(state, batch, axis_name)`, see `parallel`; the seeds share the batch.
      count: S.
    """
    if count == 1:
        return function

    def mapped(state, batch, axis_name):
        return jax.vmap(lambda one: function(one, batch, axis_name))(state)

    return mapped


@jax.jit
def select(chosen: jax.Array, new: Any, old: Any) -> Any:
    """Of joined trees, what `new` has of the seeds that are chosen, and `old` of the others.

    Args:
      chosen: [S] bool.
      new: arrays [S, ...].
      old: likewise.
    """

    def one(ours, theirs):
        return jnp.where(jnp.reshape(chosen, (-1,) + (1,) * (ours.ndim - 1)), ours, theirs)

    return jax.tree.map(one, new, old)


def ensemble(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Averages the predictions of S seeds.

    The probabilities of the mixture and of each expert, and the gate weights, are means over the
    seeds, so that a mixture and its experts are compared under one rule. What is no number, such as
    which expert is present, is the same for all seeds.

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


def summary(seeds: Sequence[int], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of S seeds side by side.

    Args:
      seeds: S.
      scores: of each seed, of `metrics.scores`.

    Returns:
      "of_each" seed, their "mean" and "deviation" (of a sample, so 0 for one seed): `SCORES`.
    """
    told = {name: mean_and_deviation(each[name] for each in scores) for name in SCORES}
    return {
        "of_each": {
            str(seed): {name: each[name] for name in SCORES}
            for seed, each in zip(seeds, scores, strict=True)
        },
        "mean": {name: mean for name, (mean, _) in told.items()},
        "deviation": {name: deviation for name, (_, deviation) in told.items()},
    }
