"""Training step and evaluation step.

The two steps are pure functions of arrays and do not depend on configs, files or datasets.
Training, benchmarks and ahead-of-time compilation for TPUs therefore use the same steps.
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
    """Part of the task interface that the training step needs."""

    def init(self, key: jax.Array) -> nnx.Module:
        """Returns the model with initial parameters."""

    def loss(
        self, model: Any, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns this device's share of the batch's loss and of each loss term."""


class SupportsEval(Protocol):
    """Part of the task interface that the evaluation step needs."""

    def eval_sums(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns sums over this device's rows of a batch, from which scores are computed."""


@dataclasses.dataclass(frozen=True)
class ModelTemplate:
    """Rebuilds the model, or the tree of its trained parameters, from a training state.

    Attributes:
      graph: Graph definition of the model.
      vectors: Converter for the trained parameters, if the state stores them as vectors.
    """

    graph: Any
    vectors: ParamVectors | None = None

    def to_tree(self, params: Any) -> Any:
        """Returns the parameter tree for a state's "params" or for their moving average."""
        return params if self.vectors is None else self.vectors.unflatten(params)

    def from_tree(self, tree: Any) -> Any:
        """Converts a tree of parameters or gradients to the form of a state's "params"."""
        return tree if self.vectors is None else self.vectors.flatten(tree)

    def merge(self, params: Any, frozen: Any) -> Any:
        """Builds the model from a state's "params" and "frozen"."""
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
    """Creates the model template and the initial training state.

    Args:
      task: Task whose `init` creates the model.
      optimizer: Optimizer.
      seed: Seed or key for all randomness in training.
      trainable: NNX filter for the trained parameters.
      make_model: Function that creates the model from a key; by default the task's `init`.
      as_vectors: Whether to store the trained parameters as vectors; see `ParamVectors`. Steps of
        small models then compile faster, but sharding rules cannot apply, because rules match
        parameter names.
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

    The state is `{step, params, frozen, opt_state, key}`. The key and the frozen parameters in the
    state never change; each step derives its own key from the state's key and the step number. The
    training step returns the new state and metrics of the global batch: the loss, its terms, and
    the gradient norm.

    Args:
      task: Task that defines the loss. With accumulation, the loss must be a weighted sum over
        rows, and the batch must contain the row weights.
      template: Model template.
      optimizer: Optimizer.
      accumulation: Number of parts into which each device splits its rows. The parts run one after
        another, so that only one part's activations are in memory at a time.
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
    """Creates the evaluation step, which returns the task's `eval_sums` for the global batch."""

    def eval_step(state, batch, axis_name):
        params = params_for_evaluation(state["params"], state["opt_state"])
        model = template.merge(params, state["frozen"])
        return psum_if_mapped(task.eval_sums(model, batch), axis_name)

    return eval_step
