"""The training step and the validation step.

Both are pure functions of arrays, independent of configs, files and datasets, so that training,
benchmarks and ahead-of-time compilation for TPUs run the same program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mister_jax.optim import ParamVectors, params_for_evaluation
from mister_jax.parallel.partitioning import EvalFn, Step, psum_if_mapped
from mister_jax.tasks.base import split_params

Batch = Mapping[str, Any]


class SupportsTraining(Protocol):
    """What the training step needs from a task."""

    def init(self, key: jax.Array) -> nnx.Module:
        """Returns the model with initial parameters."""

    def loss(
        self, model: Any, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns this device's share of the batch's loss, and of each part of the loss."""


class SupportsEval(Protocol):
    """What the validation step needs from a task."""

    def eval_sums(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns this device's share of sums over a batch."""


@dataclasses.dataclass(frozen=True)
class ModelTemplate:
    """Creates the model, or the tree of its trained parameters, from a training state.

    Attributes:
      graph: Graph definition of the model.
      vectors: Layout of the trained parameters, if the state stores them as vectors.
    """

    graph: Any
    vectors: ParamVectors | None = None

    def to_tree(self, params: Any) -> Any:
        """Returns the tree of a state's "params", or of an average of them."""
        return params if self.vectors is None else self.vectors.unflatten(params)

    def from_tree(self, tree: Any) -> Any:
        """Returns a tree of parameters or gradients in the form of a state's "params"."""
        return tree if self.vectors is None else self.vectors.flatten(tree)

    def merge(self, params: Any, frozen: Any) -> Any:
        """Returns the model of a state's "params" and "frozen"."""
        return nnx.merge(self.graph, self.to_tree(params), frozen)


def initial_state(
    task: SupportsTraining,
    optimizer: optax.GradientTransformation,
    seed: int | jax.Array,
    *,
    trainable: Any = nnx.Param,
    make_model: Callable[[jax.Array], nnx.Module] | None = None,
    as_vectors: bool = False,
) -> tuple[ModelTemplate, dict[str, Any]]:
    """Creates the model's template and the training state before the first step.

    Args:
      task: Task whose `init` creates the model.
      optimizer: Optimizer.
      seed: Seed of all randomness in training, or a key made from it.
      trainable: NNX filter of the trained parameters.
      make_model: Creates the model from a key, instead of the task's `init`.
      as_vectors: Whether to store the trained parameters as `ParamVectors`. Steps of small models
        compile faster with it, but sharding rules, which name parameters, do not apply.
    """
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    init_key, train_key = jax.random.split(key)
    model = (make_model or task.init)(init_key)
    graph, params, frozen = split_params(model, trainable)
    template = ModelTemplate(graph, ParamVectors(params) if as_vectors else None)
    params = template.from_tree(params)
    state = {
        "step": jnp.zeros([], jnp.int32),
        "params": params,
        "frozen": frozen,
        "opt_state": optimizer.init(params),
        "key": jax.random.key_data(train_key),
    }
    return template, state


def make_train_step(
    task: SupportsTraining,
    template: ModelTemplate,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> Step:
    """Creates the training step, a pure function of `(state, batch, axis_name)`.

    The state is `{step, params, frozen, opt_state, key}`. The key and the frozen parameters never
    change; each step folds its number into the key. The step returns the new state and global
    metrics: the loss, its parts, and the norm of the gradient.

    Args:
      task: Task that defines the loss. With accumulation, the loss must be a weighted sum over
        rows, and the batch must contain the row weights.
      template: Template of the model.
      optimizer: Optimizer.
      accumulation: Number of parts that a device's rows are divided into. The model processes the
        parts one after another, so only one part's activations are in memory at a time.
    """

    def step(state, batch, axis_name):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])

        params = template.to_tree(state["params"])

        def loss(params, batch):
            model = nnx.merge(template.graph, params, state["frozen"])
            return task.loss(model, batch, key, axis_name)

        loss_and_gradient = jax.value_and_grad(loss, has_aux=True)
        if accumulation == 1:
            sums = loss_and_gradient(params, batch)
        else:
            # Each part takes rows from every device, so no row moves between devices.
            parts = jax.tree.map(
                lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
            )
            shapes = jax.eval_shape(loss_and_gradient, params, jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

            def add(sums, part):
                return jax.tree.map(jnp.add, sums, loss_and_gradient(params, part)), None

            sums = jax.lax.scan(add, zeros, parts)[0]
        losses, gradient = sums
        (total, loss_parts), gradient = psum_if_mapped(
            (losses, template.from_tree(gradient)), axis_name
        )
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        new_state = {
            **state,
            "step": state["step"] + 1,
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
        }
        return new_state, {"loss": total, **loss_parts, "gradient_norm": optax.tree.norm(gradient)}

    return step


def make_eval_step(task: SupportsEval, template: ModelTemplate) -> EvalFn:
    """Creates the function that returns the task's sums over a batch of the validation split."""

    def eval_step(state, batch, axis_name):
        params = params_for_evaluation(state["params"], state["opt_state"])
        model = template.merge(params, state["frozen"])
        return psum_if_mapped(task.eval_sums(model, batch), axis_name)

    return eval_step
