"""Compiles programs ahead of time for TPUs, without TPU hardware, and predicts performance.

Compilation needs libtpu, and a process in which JAX runs on the CPU. Programs are not run, so all
results are predictions. The number of rows in a batch is proportional to the number of chips (weak
scaling).
"""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from benchmarks.flops import program_flops
from benchmarks.hlo import analyze_schedule
from benchmarks.report import Row
from mister_jax.errors import InputError
from mister_jax.parallel.partitioning import CompiledStep, JitPartitioner
from mister_jax.parallel.sharding import shardings

Log = Callable[[str], None]

# libtpu reads these variables at start-up. Without the first three, it searches this machine for
# TPUs. Without the last variable, only one process can use libtpu at a time.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Chip(NamedTuple):
    """Peak performance of one chip.

    Attributes:
      flops: bfloat16 operations per second.
      memory: Memory in bytes.
      bandwidth: Bytes per second between chip and memory.
      interconnect: Bytes per second received in a collective. A ring uses two TPU links.
      cycles: TensorCore cycles per second; None if XLA does not estimate cycles for this chip.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    cycles: float | None = None


def _cycles(flops: float, matrix_units: int) -> float:
    return flops / (matrix_units * 128 * 128 * 2)


# Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e; NVIDIA's data sheets for A100, H100
# and H200 (SXM), without sparsity. All interconnect rates are for one direction. The rate of a TPU
# link is a chip's documented bidirectional bandwidth divided by its number of ports, which is 4 in
# a 2D torus and 6 in a 3D torus.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1200e9, 2 * 50e9, _cycles(275e12, 8)),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 2 * 50e9, _cycles(197e12, 4)),  # v5e
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 2 * 100e9, _cycles(459e12, 8)),  # v5p
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1638e9, 2 * 100e9),  # v6e
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
}
"""Chips by JAX's name for the device kind."""


def tpu_topologies(names: str) -> dict[str, list[jax.Device]]:
    """Returns abstract devices by topology, for `names` such as "v5e:2x2,4x4".

    A topology without a chip name, such as "4x4", has the chip of the previous topology.

    Raises:
      InputError: libtpu is missing, or a topology is unknown.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu is not installed; --aot needs it: pip install libtpu")
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    devices: dict[str, list[jax.Device]] = {}
    chip = ""
    for name in names.split(","):
        prefix, _, shape = name.strip().rpartition(":")
        chip = prefix or chip
        topology = f"{chip}:{shape}"
        try:
            description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"topology {topology!r}: {_first_line(error)}") from error
        devices[topology] = list(description.devices)
    return devices


def abstract_state(initialize: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Returns the template, and the shapes and dtypes of the state, that `initialize` creates."""
    template: Any = None

    def initial_state() -> Any:
        nonlocal template
        template, state = initialize()
        return state

    shapes = jax.eval_shape(initial_state)
    return template, shapes


def shard_shapes(partitioner: JitPartitioner, state: Any, batch: Any) -> tuple[Any, Any]:
    """Adds the partitioner's shardings to an abstract state and an abstract global batch."""

    def with_sharding(value: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    state_shardings = shardings(state, partitioner.mesh, partitioner.rules)
    return (
        jax.tree.map(with_sharding, state, state_shardings),
        jax.tree.map(lambda value: with_sharding(value, partitioner.rows), batch),
    )


def compile_ahead(
    partitioner: JitPartitioner, step: CompiledStep, state: Any, batch: Any, model_flops: float
) -> Row:
    """Compiles a step for abstract devices and predicts memory and time per device.

    `state` and `batch` are abstract arrays. `model_flops` is the model's FLOPs for the batch,
    without recomputation.

    Returns:
      A row with memory and work per device, and predicted times if the chip is in `CHIPS`. For
      other chips, "fits" (whether the program fits in the chip's memory) is None. If XLA rejects
      the program because it needs too much memory, "fits" is False, and "reason" replaces the
      other results.

    Raises:
      InputError: Compilation fails for a reason other than memory.
    """
    devices = partitioner.mesh.devices.ravel()
    kind = devices[0].device_kind
    chip = CHIPS.get(kind)
    row: Row = {"device_kind": kind, "devices": devices.size}
    if chip is not None:
        row["memory_mib_per_device"] = chip.memory / 2**20
    start = time.perf_counter()
    traced = step.function.trace(*shard_shapes(partitioner, state, batch))
    try:
        with warnings.catch_warnings():
            # JAX's cache stores programs for abstract devices, but cannot load them.
            warnings.filterwarnings("ignore", "Error .* persistent compilation cache", UserWarning)
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return {**row, "fits": False, "reason": _first_line(error)}
        raise InputError(f"does not compile for {kind}: {_first_line(error)}") from error
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    total_memory = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    row |= {
        "compile_s": seconds,
        "arguments_mib_per_device": memory.argument_size_in_bytes / 2**20,
        "temporaries_mib_per_device": memory.temp_size_in_bytes / 2**20,
        "total_mib_per_device": total_memory / 2**20,
        "fits": None if chip is None else total_memory <= chip.memory,
        "model_gflop_per_device": model_flops / devices.size / 1e9,
        "executed_gflop_per_device": program_flops(traced.jaxpr.jaxpr) / devices.size / 1e9,
    }
    return row if chip is None else row | _predict_time(compiled, chip, row)


def _predict_time(compiled: Any, chip: Chip, row: Row) -> Row:
    """Predicts the run time of a program from its arithmetic, memory and interconnect times.

    The program takes at least as long as the largest of these times. XLA's estimate in cycles,
    which is missing for some chips, also includes stalls within the core.
    """
    schedule = analyze_schedule(compiled.as_text())
    received = schedule.blocking_bytes + schedule.overlapped_bytes
    milliseconds = {
        "arithmetic_ms": row["executed_gflop_per_device"] * 1e9 / chip.flops * 1e3,
        "memory_ms": schedule.memory_bytes / chip.bandwidth * 1e3,
        "collectives_ms": received / chip.interconnect * 1e3,
    }
    if chip.cycles is not None:
        overlapped = max(
            schedule.cycles / chip.cycles, schedule.overlapped_bytes / chip.interconnect
        )
        blocking = schedule.blocking_bytes / chip.interconnect
        milliseconds["compiler_ms"] = (overlapped + blocking) * 1e3
    predicted = max(milliseconds.values())
    model_ms = row["model_gflop_per_device"] * 1e9 / chip.flops * 1e3
    return {
        "memory_gb_per_device": schedule.memory_bytes / 1e9,
        "collectives_gb_per_device": received / 1e9,
        **milliseconds,
        "predicted_ms": predicted,
        "predicted_utilization": model_ms / predicted,
    }


def add_scaling_efficiency(rows: Sequence[Row]) -> None:
    """Adds each row's scaling efficiency: the first row's predicted time divided by the row's.

    The rows are results of `compile_ahead` for one program with equal work per device. Rows without
    a predicted time get no efficiency.
    """
    for row in rows:
        if "predicted_ms" in rows[0] and "predicted_ms" in row:
            row["scaling_efficiency"] = rows[0]["predicted_ms"] / row["predicted_ms"]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
