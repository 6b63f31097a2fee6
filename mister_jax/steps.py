"""What runs on the devices: an update, the sums of a validation, MiSTER-E's loss of a batch.

Pure functions of arrays, free of configs, files and datasets, so that a training, a benchmark and a
compilation for a TPU that is not there run the same program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mister_jax import losses
from mister_jax.models import MisterE, MisterEOutput
from mister_jax.nn import DialogueKeys
from mister_jax.optim import evaluated_params
from mister_jax.parallel import Reader, Step, first_row, sum_over

Batch = Mapping[str, Any]


class Trainable(Protocol):
    """What a training step needs of a task."""

    def init(self, key: jax.Array) -> nnx.Module:
        """The model with initial parameters."""

    def loss(
        self, model: Any, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """This device's share of the loss of a batch, and the shares of its parts."""


class Judgeable(Protocol):
    """What a validation needs of a task."""

    def evaluate(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """This device's share of sums over a batch."""


def initial_state(
    task: Trainable, transformation: optax.GradientTransformation, seed: int
) -> tuple[Any, dict[str, Any]]:
    """The model's graph, and the state of a training before its first step."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    graph, params = nnx.split(task.init(init_key))
    params = nnx.as_pure(params)
    state = {
        "step": jnp.zeros([], jnp.int32),
        "params": params,
        "opt_state": transformation.init(params),
        "key": jax.random.key_data(train_key),
    }
    return graph, state


def train_step(task: Trainable, graph: Any, transformation: optax.GradientTransformation) -> Step:
    """One update as a pure function of `(state, batch, axis_name)`.

    The state is `{step, params, opt_state, key}`; the key never changes, a step folds its number
    in. The metrics that come out are global: the loss, its parts, and the norm of the gradient.
    """

    def step(state, batch, axis_name):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])

        def loss(params):
            return task.loss(nnx.merge(graph, params), batch, key, axis_name)

        (total, parts), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        total, parts, gradient = sum_over((total, parts, gradient), axis_name)
        updates, opt_state = transformation.update(gradient, state["opt_state"], state["params"])
        following = {
            "step": state["step"] + 1,
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
            "key": state["key"],
        }
        return following, {"loss": total, **parts, "gradient_norm": optax.tree.norm(gradient)}

    return step


def validation_sums(task: Judgeable, graph: Any) -> Reader:
    """The task's sums over a batch, of the parameters that are to be judged."""

    def read(state, batch, axis_name):
        model = nnx.merge(graph, evaluated_params(state["params"], state["opt_state"]))
        return sum_over(task.evaluate(model, batch), axis_name)

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

    Returns:
      This device's share of the total, and of each part unweighted.
    """
    rows = batch["mask"].shape[0]
    keys = DialogueKeys.of_batch(key, rows, first_row(rows, axis_name))
    output = read_dialogues(model, batch, deterministic=False, rngs=keys)
    return losses.mister_e(
        output,
        batch["label"],
        batch["mask"],
        weights,
        gamma=gamma,
        temperature=temperature,
        experts=model.config.experts,
        axis_name=axis_name,
    )
