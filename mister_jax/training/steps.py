"""What runs on the devices: an update, the sums of a validation, MiSTER-E's loss of a batch.

Pure functions of arrays, free of configs, files and datasets, so that a training, a benchmark and a
compilation for a TPU that is not there run the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mister_jax import losses
from mister_jax.models import MisterE, MisterEOutput
from mister_jax.nn import PerExampleRngs
from mister_jax.optim import params_for_evaluation
from mister_jax.parallel.partitioning import EvalFn, Step, first_row_index, psum_if_mapped

Batch = Mapping[str, Any]


class Trainable(Protocol):
    """What a training needs of a task."""

    def init(self, key: jax.Array) -> nnx.Module:
        """The model with initial parameters."""

    def loss(
        self, model: Any, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """This device's share of the loss of a batch, and the shares of its parts."""


class SupportsEval(Protocol):
    """What a validation needs of a task."""

    def evaluate(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """This device's share of sums over a batch."""


def split_model(model: nnx.Module, trainable: Any) -> tuple[Any, Any, Any]:
    """A model's graph, the trees of its trained and of its other arrays; `nnx.merge` undoes it.

    Args:
      model: to split; may hold shapes in place of arrays.
      trainable: the `nnx` filter of what is trained.
    """
    graph, state = nnx.split(model)
    params, frozen = nnx.split_state(state, trainable, ...)
    return graph, nnx.as_pure(params), nnx.as_pure(frozen)


def initial_state(
    task: Trainable,
    transformation: optax.GradientTransformation,
    seed: int,
    *,
    trainable: Any = nnx.Param,
    make: Callable[[jax.Array], nnx.Module] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The model's graph, and the state of a training before its first step.

    Args:
      task: its `init` makes the model.
      transformation: the optimiser.
      seed: of all randomness of the training.
      trainable: the `nnx` filter of the parameters that are trained.
      make: makes the model in place of the task's `init`.
    """
    init_key, train_key = jax.random.split(jax.random.key(seed))
    model = (make or task.init)(init_key)
    graph, params, frozen = split_model(model, trainable)
    state = {
        "step": jnp.zeros([], jnp.int32),
        "params": params,
        "frozen": frozen,
        "opt_state": transformation.init(params),
        "key": jax.random.key_data(train_key),
    }
    return graph, state


def make_train_step(
    task: Trainable, graph: Any, transformation: optax.GradientTransformation, accumulation: int = 1
) -> Step:
    """One update as a pure function of `(state, batch, axis_name)`.

    The state is `{step, params, frozen, opt_state, key}`; the key and what is frozen never change,
    a step folds its number into the key. The metrics that come out are global: the loss, its parts,
    and the norm of the gradient.

    Args:
      task: its loss; with accumulation a sum over rows, weighed by what is in the batch.
      graph: of the model.
      transformation: the optimiser.
      accumulation: parts a device's rows are cut into, one after the other through the model, so
        that the activations of one part alone are in memory; divides the rows.
    """

    def step(state, batch, axis_name):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])

        def loss(params, batch):
            model = nnx.merge(graph, params, state["frozen"])
            return task.loss(model, batch, key, axis_name)

        differentiate = jax.value_and_grad(loss, has_aux=True)

        def add(total, part):
            return jax.tree.map(jnp.add, total, differentiate(state["params"], part)), None

        if accumulation == 1:
            found = differentiate(state["params"], batch)
        else:
            # Each part has rows of every device, so none has to move.
            parts = jax.tree.map(
                lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
            )
            shapes = jax.eval_shape(
                differentiate, state["params"], jax.tree.map(lambda x: x[0], parts)
            )
            zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
            found = jax.lax.scan(add, zeros, parts)[0]
        ((total, parts), gradient) = psum_if_mapped(found, axis_name)
        updates, opt_state = transformation.update(gradient, state["opt_state"], state["params"])
        following = {
            **state,
            "step": state["step"] + 1,
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
        }
        return following, {"loss": total, **parts, "gradient_norm": optax.tree.norm(gradient)}

    return step


def make_eval_step(task: SupportsEval, graph: Any) -> EvalFn:
    """The task's sums over a batch, of the parameters that are to be judged."""

    def read(state, batch, axis_name):
        params = params_for_evaluation(state["params"], state["opt_state"])
        model = nnx.merge(graph, params, state["frozen"])
        return psum_if_mapped(task.evaluate(model, batch), axis_name)

    return read


def read_dialogues(model: MisterE, batch: Batch, **options: Any) -> MisterEOutput:
    """What the model gives for a batch of `data.batches`; `options` are those of `MisterE`."""
    return model(
        batch["speech"],
        batch["text"],
        batch["mask"],
        speech_present=batch["speech_present"],
        text_present=batch["text_present"],
        **options,
    )


def mister_e_loss(
    model: MisterE,
    batch: Batch,
    key: jax.Array,
    axis_name: str | None = None,
    *,
    weights: losses.LossWeights | None = None,
    gamma: float = 3.0,
    temperature: float = 1.0,
    sharpness: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """MiSTER-E's loss of a batch in training, with dropout.

    Args:
      model: to train.
      batch: of `data.batches`; under a mapped axis this device's rows.
      key: of the whole batch's dropout, the same on all devices.
      axis_name: see `losses`.
      weights: see `losses.mister_e`.
      gamma: likewise.
      temperature: likewise.
      sharpness: likewise.

    Returns:
      This device's share of the total, and of each part unweighted.
    """
    rows = batch["mask"].shape[0]
    keys = PerExampleRngs.from_batch_key(key, rows, first_row_index(rows, axis_name))
    output = read_dialogues(model, batch, deterministic=False, rngs=keys)
    return losses.mister_e(
        output,
        batch["label"],
        batch["mask"],
        weights,
        gamma=gamma,
        temperature=temperature,
        sharpness=sharpness,
        experts=model.config.experts,
        axis_name=axis_name,
    )
