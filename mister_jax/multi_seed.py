"""Functions for training several models at once; their states are stacked along a leading axis.

The models are the S seeds of one run, or the S seeds of each of R runs. With a single model, the
axis is omitted, and the functions in this module handle that case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mister_jax.metrics import SCORE_NAMES, mean_and_deviation


def stack_seeds(trees: Sequence[Any]) -> Any:
    """Stacks the trees of S seeds into one tree on the host."""
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


def join_runs(trees: Sequence[Any], num_seeds: int) -> Any:
    """Concatenates the trees of R runs, each stacked over its seeds, along an axis of R * S models.

    The arrays are concatenated on the host. With a single run, the tree is returned unchanged.
    """
    if len(trees) == 1:
        return trees[0]
    join = np.stack if num_seeds == 1 else np.concatenate
    return jax.tree.map(lambda *leaves: join(leaves), *trees)


def split_runs(tree: Any, num_runs: int, num_seeds: int) -> list[Any]:
    """Splits the result of `join_runs` into one tree per run, with arrays on the host."""
    if num_runs == 1:
        return [tree]
    tree = jax.device_get(tree)
    if num_seeds == 1:
        return unstack_seeds(tree, num_runs)
    starts = range(0, num_runs * num_seeds, num_seeds)
    return [
        jax.tree.map(lambda leaf, start=start: leaf[start : start + num_seeds], tree)
        for start in starts
    ]


def vmap_over_models(
    function: Callable[..., Any], num_runs: int, num_seeds: int
) -> Callable[..., Any]:
    """Vectorizes a training or evaluation step over the stacked states of runs and their seeds.

    Args:
      function: Function of `(state, batch, axis_name)` for one model; see `parallel.partitioning`.
      num_runs: Number of runs R. With several runs, the batch has a run axis after its first axis.
      num_seeds: Number of seeds S of each run, which share the run's batch.

    Returns:
      Function of `(state, batch, axis_name)`. The state and the results have a leading axis of
      R * S models, unless there is only one model.
    """

    def over_seeds(state, batch, axis_name):
        if num_seeds == 1:
            return function(state, batch, axis_name)
        return jax.vmap(lambda seed_state: function(seed_state, batch, axis_name))(state)

    if num_runs == 1:
        return over_seeds

    def over_runs(state, batch, axis_name):
        leading = (num_runs,) if num_seeds == 1 else (num_runs, num_seeds)
        by_run = jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), state)
        mapped = jax.vmap(
            lambda run_state, run_batch: over_seeds(run_state, run_batch, axis_name),
            in_axes=(0, 1),
        )
        return jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[len(leading) :]), mapped(by_run, batch)
        )

    return over_runs


def select_seeds(is_new: np.ndarray, new: Any, old: Any) -> Any:
    """Takes each seed from `new` where `is_new` is true, and from `old` elsewhere.

    Args:
      is_new: Whether to take each seed from `new`, [S] bool.
      new: Tree of arrays [S, ...], either NumPy arrays or arrays on devices.
      old: Tree of arrays [S, ...].

    Returns:
      Tree of arrays of the same kind as in `new`. The kind matters with several processes, because
      a checkpoint can contain NumPy arrays, but not JAX arrays that exist in only one process.
    """
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(new)):
        return _select(np, is_new, new, jax.device_get(old))
    return _select_on_devices(is_new, new, old)


def _select(numpy: Any, is_new: Any, new: Any, old: Any) -> Any:
    def select(new_leaf, old_leaf):
        condition = numpy.reshape(is_new, (-1,) + (1,) * (new_leaf.ndim - 1))
        return numpy.where(condition, new_leaf, old_leaf)

    return jax.tree.map(select, new, old)


_select_on_devices = jax.jit(functools.partial(_select, jnp))


def ensemble(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Averages the predictions of S seeds.

    The mixture's and the experts' probabilities and the gate weights are averaged. Integer and bool
    arrays, such as the presence of experts, are the same for all seeds.

    Args:
      predictions: Predictions of the task for each seed.
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
      seeds: Random seeds of the models, of length S.
      scores: Result of `metrics.classification_scores` for each seed.

    Returns:
      A dict with "of_each" (the `SCORE_NAMES` by seed), and the "mean" and sample standard
      "deviation" of each score over the seeds. The deviation is 0 for one seed.
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
