"""Adam or AdamW with gradient clipping, a learning-rate schedule and parameter averaging."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from mister_jax.config_checks import (
    check_at_least,
    check_choice,
    check_rates,
    invalid_field,
)
from mister_jax.nn.dtypes import at_least_float32
from mister_jax.schedules import ScheduleName, learning_rate_schedule

# Parameters without weight decay. Whisper's position table is constant and has no gradient, but
# weight decay would still change it.
_NO_WEIGHT_DECAY = re.compile(r"bias|scale|\['positions'\]$")

# Names of the two vectors in `ParamVectors`.
_DECAYED, _NOT_DECAYED = "decayed", "not_decayed"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer options; the defaults match the released MiSTER-E.

    Attributes:
      name: "adam" or "adamw".
      learning_rate: Learning rate after the warmup.
      schedule: "constant", or "cosine", which decays and would reach zero one step after the last.
      warmup_fraction: Fraction of the steps during which the learning rate rises linearly from
        zero.
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Constant added to the square root of the second moment.
      weight_decay: Weight decay of "adamw", applied to kernels, embeddings and LoRA matrices, but
        not to biases, scales or Whisper's position table.
      clip_norm: Global norm to which gradients are clipped; 0 disables clipping.
      average_decay: Decay rate of an exponential moving average of the parameters. The average is
        used in validation, in the best checkpoint and in prediction. 0 disables averaging.
    """

    name: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-5
    schedule: ScheduleName = "constant"
    warmup_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    average_decay: float = 0.0

    def __post_init__(self):
        check_choice(self, "name", ("adam", "adamw"))
        check_choice(self, "schedule", get_args(ScheduleName))
        check_at_least(self, 0, "eps", "weight_decay", "clip_norm")
        check_rates(self, "warmup_fraction", "average_decay", "b1", "b2")
        if not self.learning_rate > 0:  # also rejects NaN
            raise invalid_field(self, "learning_rate", "positive numbers")
        if self.weight_decay and self.name == "adam":
            raise ValueError("OptimizerConfig.weight_decay needs name='adamw'")

    def make_schedule(self, total_steps: int) -> optax.Schedule:
        """Returns the learning-rate schedule for a training run with `total_steps` steps."""
        return learning_rate_schedule(
            self.learning_rate,
            total_steps,
            name=self.schedule,
            warmup_fraction=self.warmup_fraction,
        )


class AverageState(NamedTuple):
    """State of `average_parameters`.

    Attributes:
      updates: Number of updates so far, [] int32.
      average: Moving average, a tree like the parameters, at least float32.
    """

    updates: jax.Array
    average: Any


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Returns a transformation that keeps an exponential moving average of the parameters.

    This transformation must be the last one in a chain. After n updates, the decay rate is at most
    (1 + n) / (10 + n), so that the average quickly forgets the initial parameters. The average is
    at least float32, because a bfloat16 average would round small steps to zero.

    Args:
      decay: Decay rate of the average, 0 < decay < 1.
    """

    def init(params):
        # Copy the parameters, because a step may donate both the parameters and their average.
        average = jax.tree.map(
            lambda param: jnp.copy(param).astype(at_least_float32(param.dtype)), params
        )
        return AverageState(jnp.zeros([], jnp.int32), average)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("average_parameters: update needs params")
        step_size = 1 - jnp.minimum(decay, (1 + state.updates) / (10 + state.updates))
        average = optax.incremental_update(
            optax.apply_updates(params, updates), state.average, step_size
        )
        return updates, AverageState(state.updates + 1, average)

    return optax.GradientTransformation(init, update)


def params_for_evaluation(params: Any, opt_state: Any) -> Any:
    """Returns the moving average of the parameters if `opt_state` has one, else `params`.

    The average has the dtypes of `params`.
    """
    average = optax.tree.get(opt_state, "average", None)
    if average is None:
        return params
    return jax.tree.map(lambda param, value: value.astype(param.dtype), params, average)


def _weight_decay_mask(params: Any) -> Any:
    """Returns whether each parameter, or each vector of `ParamVectors`, has weight decay."""
    if isinstance(params, dict) and params.keys() <= {_DECAYED, _NOT_DECAYED}:
        return {name: name == _DECAYED for name in params}
    # The number of axes does not identify kernels, because a GRU's biases and the scales of stacked
    # layers also have two axes.
    return jax.tree_util.tree_map_with_path(
        lambda path, value: (
            value.ndim > 1 and not _NO_WEIGHT_DECAY.search(jax.tree_util.keystr(path))
        ),
        params,
    )


class ParamVectors:
    """Converts a tree of parameters to two vectors, with and without weight decay, and back.

    With vectors, the optimizer updates two long arrays instead of one array per parameter. The
    results are the same, but the compiled training step is much smaller.

    Args:
      params: Tree of parameters or of their shapes.

    Raises:
      ValueError: The parameters have different dtypes.
    """

    def __init__(self, params: Any):
        leaves, self._treedef = jax.tree.flatten(params)
        if len({leaf.dtype for leaf in leaves}) > 1:
            raise ValueError("ParamVectors needs parameters with the same dtype")
        self._shapes = [leaf.shape for leaf in leaves]
        self._names = [
            _DECAYED if has_decay else _NOT_DECAYED
            for has_decay in jax.tree.leaves(_weight_decay_mask(params))
        ]

    def flatten(self, params: Any) -> dict[str, jax.Array]:
        """Returns the vectors for a tree of parameters or gradients."""
        leaves = jax.tree.leaves(params)
        return {
            name: jnp.concatenate(
                [leaf.ravel() for leaf, of in zip(leaves, self._names, strict=True) if of == name]
            )
            for name in sorted(set(self._names))
        }

    def unflatten(self, vectors: dict[str, jax.Array]) -> Any:
        """Converts vectors back to the tree of parameters; the vectors may have leading axes."""
        offsets = dict.fromkeys(vectors, 0)
        leaves = []
        for name, shape in zip(self._names, self._shapes, strict=True):
            vector, start = vectors[name], offsets[name]
            offsets[name] = start + math.prod(shape)
            values = vector[..., start : offsets[name]]
            leaves.append(values.reshape(*vector.shape[:-1], *shape))
        return jax.tree.unflatten(self._treedef, leaves)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns a chain of optional gradient clipping, Adam or AdamW, and optional averaging.

    Args:
      config: Optimizer options.
      total_steps: Number of training steps, which determines the schedule.
    """
    return optimizer_with_schedule(config, config.make_schedule(total_steps))


def optimizer_with_schedule(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the optimizer of `make_optimizer` with the given learning-rate schedule."""
    adam: dict[str, Any] = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    chain = []
    if config.clip_norm:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "adamw":
        adam |= {"weight_decay": config.weight_decay, "mask": _weight_decay_mask}
        chain.append(optax.adamw(schedule, **adam))
    else:
        chain.append(optax.adam(schedule, **adam))
    if config.average_decay:
        chain.append(average_parameters(config.average_decay))
    return optax.chain(*chain)
