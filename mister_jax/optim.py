"""Optimisers from a config: an Optax chain, its schedule, a running average of parameters."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Beside them what is no more than a constant: Whisper's table of positions. It has no gradient, so
# decay alone would change it.
_NO_KERNEL = re.compile(r"bias|scale|\['positions'\]$")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser; the defaults are MiSTER-E's released ones.

    Attributes:
      name: "adam" or "adamw".
      learning_rate: its peak.
      schedule: "constant", or "cosine", which falls to zero at the last step.
      warmup_fraction: share of all steps in which the rate rises linearly from zero.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: of "adamw"; on kernels, not on biases, scales and Whisper's positions.
      clip_norm: largest global norm of the gradient; 0 does not clip.
      average_decay: of a running average of the parameters, which is then what is validated, kept
        as the best and used for prediction; 0 keeps none.
    """

    name: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    average_decay: float = 0.0

    def __post_init__(self):
        checks = {
            "name": (self.name in ("adam", "adamw"), "'adam' or 'adamw'"),
            "learning_rate": (self.learning_rate > 0, "a positive number"),
            "schedule": (self.schedule in ("constant", "cosine"), "'constant' or 'cosine'"),
            "warmup_fraction": (0 <= self.warmup_fraction < 1, "0 <= fraction < 1"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "clip_norm": (self.clip_norm >= 0, "0 or more"),
            "average_decay": (0 <= self.average_decay < 1, "0 <= decay < 1"),
        }
        for field, (good, allowed) in checks.items():
            if not good:
                value = getattr(self, field)
                raise ValueError(f"OptimizerConfig.{field}={value!r}: allowed is {allowed}")
        if self.weight_decay and self.name == "adam":
            raise ValueError("OptimizerConfig.weight_decay needs name='adamw'")


class AverageState(NamedTuple):
    """State of `average_parameters`: updates so far, and the average, a tree like the params."""

    updates: jax.Array
    average: Any


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential average of the parameters as they are after each update.

    The last of a chain. While few updates are in, the decay is at most (1 + n) / (10 + n), so that
    the initial parameters are soon forgotten.
    """

    def init(params):
        # A copy, so that a step may be given both to overwrite.
        return AverageState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("average_parameters needs the parameters in update")
        step_size = 1 - jnp.minimum(decay, (1 + state.updates) / (10 + state.updates))
        average = optax.incremental_update(
            optax.apply_updates(params, updates), state.average, step_size
        )
        return updates, AverageState(state.updates + 1, average)

    return optax.GradientTransformation(init, update)


def params_for_evaluation(params: Any, opt_state: Any) -> Any:
    """The parameters to validate and predict with: their average if one is kept."""
    average = optax.tree.get(opt_state, "average", None)
    return params if average is None else average


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of each step."""
    warmup = round(config.warmup_fraction * total_steps)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, total_steps - warmup))
    else:
        after = optax.constant_schedule(config.learning_rate)
    if not warmup:
        return after
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The whole chain: clip, Adam or AdamW with its schedule, average.

    Args:
      config: of the optimiser.
      total_steps: of the training, for the schedule.
    """

    def is_kernel(params):
        # By name, too: a bias of both directions of a GRU, and a scale in a stack, have two axes.
        return jax.tree_util.tree_map_with_path(
            lambda path, value: (
                value.ndim > 1 and not _NO_KERNEL.search(jax.tree_util.keystr(path))
            ),
            params,
        )

    rate = learning_rate(config, total_steps)
    moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    chain = []
    if config.clip_norm:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "adamw":
        chain.append(optax.adamw(rate, **moments, weight_decay=config.weight_decay, mask=is_kernel))
    else:
        chain.append(optax.adam(rate, **moments))
    if config.average_decay:
        chain.append(average_parameters(config.average_decay))
    return optax.chain(*chain)
