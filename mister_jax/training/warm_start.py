"""Warm start: initial parameters from the best parameters of another run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from mister_jax.errors import InputError
from mister_jax.predictor import Predictor
from mister_jax.pretrained import find_model


@dataclasses.dataclass(frozen=True)
class InitialParams:
    """Trained parameters of another run.

    Attributes:
      name: Work directory, bundle or name on the Hugging Face Hub.
      per_seed: Trained parameters of each seed of the model.
    """

    name: str
    per_seed: list[Any]

    @classmethod
    def load(cls, name: str, task: str, num_seeds: int) -> InitialParams:
        """Loads the parameters for a training run.

        Args:
          name: Work directory, bundle or name on the Hugging Face Hub.
          task: Name of the task to train.
          num_seeds: Number of seeds to train.

        Raises:
          InputError: The model cannot be loaded, belongs to another task, or its number of seeds is
            neither 1 nor `num_seeds`.
        """
        predictor = Predictor(find_model(name))
        if predictor.config.task != task:
            raise InputError(
                f"config.train.init_from={name}: a model of the task {predictor.config.task}; "
                f"needed: {task}"
            )
        per_seed = [params["trained"] for params in predictor.params]
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
        values = _by_name(self.per_seed[0])
        new = [name for name in shapes if not _matches(shapes[name], values.get(name))]
        if len(new) == len(shapes):
            raise InputError(
                f"config.train.init_from={self.name}: no parameter matches a parameter of the new "
                "model in name and shape; use the same config.model or config.encoder"
            )
        note = f"starting from {self.name}: {len(shapes) - len(new)} of {len(shapes)} parameters"
        return note + (f"; new: {', '.join(new)}" if new else "")


def copy_params(model: nnx.Module, params: Any, trainable: Any) -> nnx.Module:
    """Copies each parameter with a matching name and shape from `params`; returns the model."""
    state = nnx.as_pure(nnx.state(model, trainable))
    values = _by_name(params)

    def choose(path: Any, initial: jax.Array) -> jax.Array:
        value = values.get(jax.tree_util.keystr(path, simple=True, separator="/"))
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
