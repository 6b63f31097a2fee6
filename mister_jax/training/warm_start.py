"""Warm start: initial parameters from the best parameters of another run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from mister_jax.errors import InputError
from mister_jax.predictor import Predictor
from mister_jax.pretrained import find_model
from mister_jax.tasks.base import Task
from mister_jax.tasks.registry import task_class


@dataclasses.dataclass(frozen=True)
class InitialParams:
    """Trained parameters of another run.

    Attributes:
      name: Work directory, bundle or name on the Hugging Face Hub.
      per_seed: Trained parameters of each seed of the model by name. If the classes differ, they do
        not contain the parameters that depend on the classes, such as classifiers.
    """

    name: str
    per_seed: list[dict[str, Any]]

    @classmethod
    def load(cls, name: str, task: Task, config: ConfigDict, num_seeds: int) -> InitialParams:
        """Loads the parameters for a training run.

        Args:
          name: Work directory, bundle or name on the Hugging Face Hub.
          task: Task to train.
          config: Config of the task.
          num_seeds: Number of seeds to train.

        Raises:
          InputError: The model cannot be loaded, belongs to another task, or its number of seeds is
            neither 1 nor `num_seeds`.
        """
        predictor = Predictor(find_model(name))
        if predictor.config.task != config.task:
            raise InputError(
                f"config.train.init_from={name}: a model of the task {predictor.config.task}; "
                f"needed: {config.task}"
            )
        per_seed = [_by_name(params["trained"]) for params in predictor.params]
        if predictor.task.class_names != task.class_names:
            for name_of_param in _class_params(task, config):
                for params in per_seed:
                    params.pop(name_of_param, None)
        if len(per_seed) not in (1, num_seeds):
            raise InputError(
                f"config.train.init_from={name}: a model with {len(per_seed)} seeds; needed: 1 or "
                f"config.num_seeds={num_seeds}"
            )
        return cls(name, jax.device_get(per_seed))

    def for_seed(self, index: int) -> Any:
        """Returns the parameters for the seed with the given index."""
        return self.per_seed[index % len(self.per_seed)]

    def check(self, model: nnx.Module, trainable: Any) -> str:
        """Returns a note on the parameters that `copy_params` will copy.

        Args:
          model: Concrete or abstract model.
          trainable: NNX filter for the trained parameters of the model.

        Raises:
          InputError: No parameter matches in name and shape.
        """
        shapes = _by_name(nnx.as_pure(nnx.state(model, trainable)))
        values = self.per_seed[0]
        new = [name for name in shapes if not _matches(shapes[name], values.get(name))]
        if len(new) == len(shapes):
            raise InputError(
                f"config.train.init_from={self.name}: no parameter matches a parameter of the new "
                "model in name and shape; use the same config.model or config.encoder"
            )
        note = f"starting from {self.name}: {len(shapes) - len(new)} of {len(shapes)} parameters"
        return note + (f"; new: {', '.join(new)}" if new else "")


def _class_params(task: Task, config: ConfigDict) -> set[str]:
    """Returns the names of the trained parameters whose shapes depend on the number of classes."""
    description = task.description()
    description["class_names"] = [*description["class_names"], "another class"]
    if "model" in description:
        num_classes = len(description["class_names"])
        description["model"] = {**description["model"], "num_classes": num_classes}
    larger = task_class(config).restore(config, description)
    shapes, larger_shapes = (
        _by_name(nnx.as_pure(nnx.state(_abstract_model(it), it.trainable))) for it in (task, larger)
    )
    return {name for name, leaf in shapes.items() if leaf.shape != larger_shapes[name].shape}


def _abstract_model(task: Task) -> nnx.Module:
    return nnx.eval_shape(lambda: task.init(jax.random.key(0)))


def copy_params(model: nnx.Module, params: dict[str, Any], trainable: Any) -> nnx.Module:
    """Copies each parameter with a matching name and shape from `params`; returns the model."""
    state = nnx.as_pure(nnx.state(model, trainable))

    def choose(path: Any, initial: jax.Array) -> jax.Array:
        value = params.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        if not _matches(initial, value):
            return initial
        return jax.numpy.asarray(value, initial.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(choose, state))
    return model


def _matches(initial: Any, value: Any) -> bool:
    return value is not None and value.shape == initial.shape


def _by_name(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in leaves}
