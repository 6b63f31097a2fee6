"""Learning-rate schedules."""

from __future__ import annotations

from typing import Literal, get_args

import optax

ScheduleName = Literal["constant", "cosine"]


def learning_rate_schedule(
    peak: float, total_steps: int, *, name: ScheduleName = "constant", warmup_fraction: float = 0.0
) -> optax.Schedule:
    """Returns a learning-rate schedule with a linear warmup from zero.

    Args:
      peak: Learning rate after the warmup.
      total_steps: Number of training steps, including the warmup.
      name: Schedule after the warmup: "constant", or "cosine", which decays and would
        reach zero at step `total_steps`, counted from 0.
      warmup_fraction: Fraction of the steps used for the warmup, 0 <= fraction < 1.

    Raises:
      ValueError: `name` or `warmup_fraction` has a value that is not allowed.
    """
    if name not in get_args(ScheduleName):
        raise ValueError(f"schedule {name=}; allowed: {', '.join(get_args(ScheduleName))}")
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"{warmup_fraction=}; allowed: 0 <= fraction < 1")
    warmup_steps = round(warmup_fraction * total_steps)
    if name == "cosine":
        schedule = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup_steps))
    else:
        schedule = optax.constant_schedule(peak)
    if not warmup_steps:
        return schedule
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, schedule], [warmup_steps])
