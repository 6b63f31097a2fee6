"""Times functions fairly.

Each function (candidate) first runs twice, to compile and to estimate its duration. Then candidates
take turns (A B A B), so that changes in the machine's speed affect all candidates. Each run waits
for its results, and repeats calls that take less than `SHORTEST_RUN`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.config import BenchmarkConfig
from mister_jax.errors import InputError

SHORTEST_RUN = 0.05  # seconds

Run = Callable[[int], None]
"""Function that calls a candidate the given number of times and waits for the result."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the first run, which includes compilation, and of each timed run, per call."""

    first: float
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the timed runs."""
        return statistics.median(self.seconds)

    @property
    def compile_seconds(self) -> float:
        """Seconds by which the first run exceeded the median."""
        return max(0.0, self.first - self.median)


def time_runs(candidates: Mapping[str, Run], rounds: int) -> dict[str, Timing]:
    """Times candidates in turns; see the module docstring."""

    def timed(run: Run, repeats: int = 1) -> float:
        start = time.perf_counter()
        run(repeats)
        return (time.perf_counter() - start) / repeats

    first = {name: timed(run) for name, run in candidates.items()}
    repeats = {
        name: max(1, math.ceil(SHORTEST_RUN / timed(run))) for name, run in candidates.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(timed(run, repeats[name]))
    return {name: Timing(first[name], tuple(seconds[name])) for name in candidates}


def repeated(call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> Run:
    """Returns a run that calls a function and waits for the result of the last call."""

    def run(repeats: int) -> None:
        result = None
        for _ in range(repeats):
            result = call()
        wait(result)

    return run


def matmul_peak(config: BenchmarkConfig) -> float:
    """Returns the FLOP/s of all devices in a large matrix product in the config's dtype.

    The product is measured on one device, and the result is multiplied by the number of devices.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(config.dtype))
    product = jax.jit(jnp.matmul)
    timing = time_runs({"product": repeated(lambda: product(x, x))}, rounds=5)["product"]
    # The virtual devices of a CPU share its cores.
    num_devices = 1 if on_cpu else config.devices
    return num_devices * 2 * size**3 / min(timing.seconds)


def require_torch() -> None:
    """Raises `InputError` if PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise InputError("PyTorch is not installed; --torch needs it: pip install torch")


def require_onnx() -> None:
    """Raises `InputError` if a library that `--onnx` needs is not installed."""
    names = "torch", "onnx", "onnxruntime", "onnxscript"
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        missing_names = " ".join(missing)
        raise InputError(f"--onnx needs {', '.join(missing)}: pip install {missing_names}")
