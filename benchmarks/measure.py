"""Takes times.

All that is compared is first run twice, which compiles it, and then in turns, A B A B, so that a
machine that slows down slows all of it alike. A run waits for its results; where one is shorter
than `SHORTEST_RUN` it is done as often as fills that.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.config import BenchmarkConfig

SHORTEST_RUN = 0.05  # seconds

Run = Callable[[int], None]
"""Does something so many times and waits until it is done."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long something took.

    Attributes:
      first: seconds of the first run, in which it was compiled.
      seconds: of a run, for each timed one.
    """

    first: float
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def compiling(self) -> float:
        return max(0.0, self.first - self.median)


def measure(candidates: Mapping[str, Run], rounds: int) -> dict[str, Timing]:
    """Times candidates in turns; see the module."""

    def timed(run: Run, times: int) -> float:
        start = time.perf_counter()
        run(times)
        return (time.perf_counter() - start) / times

    first = {name: timed(run, 1) for name, run in candidates.items()}
    times = {
        name: max(1, math.ceil(SHORTEST_RUN / timed(run, 1))) for name, run in candidates.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(timed(run, times[name]))
    return {name: Timing(first[name], tuple(seconds[name])) for name in candidates}


def repeated(call: Callable[[], Any]) -> Run:
    """A run that calls so many times, and waits for what the last call gives."""

    def run(times: int) -> None:
        result = None
        for _ in range(times):
            result = call()
        jax.block_until_ready(result)

    return run


def matmul_peak(config: BenchmarkConfig) -> float:
    """Flops a second of a large matrix product in the config's dtype, over its devices.

    Of all devices together; virtual devices of one CPU share its cores, so they count as one.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(config.dtype))
    product = jax.jit(jnp.matmul)
    timing = measure({"product": repeated(lambda: product(x, x))}, rounds=5)["product"]
    devices = 1 if on_cpu else config.devices
    return devices * 2 * size**3 / min(timing.seconds)
