"""Programs compiled for TPUs that are not there, and what the compiler says of them.

Needs libtpu, and a process in which JAX runs on the CPU. Nothing is allocated and nothing run; all
figures are predictions. Over several topologies the rows of a batch grow with the chips (weak
scaling), so that the first topology's time over another's is the efficiency of the other.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from benchmarks.chips import CHIPS, Chip
from benchmarks.config import BenchmarkConfig, check_divisible
from benchmarks.dialogues import make_batch
from benchmarks.flops import program_flops, training_flops
from benchmarks.hlo import execution
from benchmarks.libraries import Training
from benchmarks.report import Row
from mister_jax.errors import InputError
from mister_jax.optim import OptimizerConfig, make_optimizer
from mister_jax.parallel.partitioning import JitPartitioner
from mister_jax.parallel.sharding import data_mesh, shardings
from mister_jax.training.steps import initial_state, make_train_step

Tell = Callable[[str], None]


def tpu_topologies(named: str) -> dict[str, list[jax.Device]]:
    """Devices to compile for, by topology.

    Args:
      named: such as "v5e:2x2", or "v5e:2x2,4x4" for two of one kind of chip.

    Raises:
      InputError: no libtpu, or an unknown topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu is not installed; compiling for TPUs needs it: pip install libtpu")
    # Or libtpu would look for TPUs of the machine's own, and complain.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # As many processes may compile at once as like; a TPU would serve one alone.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    found: dict[str, list[jax.Device]] = {}
    kind = ""
    for name in named.split(","):
        given, _, shape = name.strip().rpartition(":")
        kind = given or kind
        topology = f"{kind}:{shape}"
        try:
            described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"topology {topology!r}: {first_line(error)}") from error
        found[topology] = list(described.devices)
    return found


def placed_state(spread: JitPartitioner, state: Any) -> Any:
    """Shapes of a state, each with the sharding that `put_state` would give it."""
    return jax.tree.map(_placed, state, shardings(state, spread.mesh, spread.rules))


def placed_batch(spread: JitPartitioner, batch: Any) -> Any:
    """Shapes of a global batch, its rows spread over the devices."""
    return jax.tree.map(lambda value: _placed(value, spread.rows), batch)


def _placed(value: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


def abstract_state(make: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Graph and shapes of the state that `make`, such as `initial_state`, would give."""
    graph: Any = None

    def state() -> Any:
        nonlocal graph
        graph, made = make()
        return made

    shapes = jax.eval_shape(state)
    return graph, shapes


def compile_ahead(
    function: Any, state: Any, batch: Any, devices: Sequence[jax.Device], model_flops: float
) -> Row:
    """Compiles a function under `jit` for devices that are not there.

    Args:
      function: of a state and a batch.
      state: shapes, placed on the devices.
      batch: likewise.
      devices: to compile for.
      model_flops: of the model on the batch, what is computed anew not counted.

    Returns:
      What one device needs and does; "fits" is false where it has too little memory, None where its
      memory is not known. Of a program that the compiler refuses for its memory there is no more.

    Raises:
      InputError: it does not compile for another reason.
    """
    kind = devices[0].device_kind
    chip = CHIPS.get(kind)
    about: Row = {"device_kind": kind, "devices": len(devices)}
    if chip is not None:
        about["memory_mib_per_device"] = chip.memory / 2**20
    start = time.perf_counter()
    traced = function.trace(state, batch)
    try:
        with warnings.catch_warnings():
            # A program for devices that are not there goes into JAX's cache, but not out of it.
            warnings.filterwarnings("ignore", "Error .* persistent compilation cache", UserWarning)
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return {**about, "fits": False, "reason": first_line(error)}
        raise InputError(f"does not compile for {kind}: {first_line(error)}") from error
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    row = {
        **about,
        "compile_s": seconds,
        "arguments_mib_per_device": memory.argument_size_in_bytes / 2**20,
        "temporaries_mib_per_device": memory.temp_size_in_bytes / 2**20,
        "total_mib_per_device": needed / 2**20,
        "fits": None if chip is None else needed <= chip.memory,
        "model_gflop_per_device": model_flops / len(devices) / 1e9,
        "executed_gflop_per_device": program_flops(traced.jaxpr.jaxpr) / len(devices) / 1e9,
    }
    return row if chip is None else row | _predicted(compiled, chip, row)


def _predicted(compiled: Any, chip: Chip, row: Row) -> Row:
    """Times of a run: that of each resource, of the compiler's estimates, and what follows.

    No program is faster than any of its resources allows. The compiler's estimate adds what they
    have to wait for; where it gives none, the slowest resource is all that is known.
    """
    done = execution(compiled.as_text())
    cost = compiled.cost_analysis() or {}
    transferred = cost.get("bytes accessed", 0.0) * done.repetition
    received = done.blocking + done.overlapped
    milliseconds = {
        "arithmetic_ms": row["executed_gflop_per_device"] * 1e9 / chip.flops * 1e3,
        "memory_ms": transferred / chip.bandwidth * 1e3,
        "collectives_ms": received / chip.interconnect * 1e3,
    }
    if chip.cycles is not None:
        beside = max(done.cycles / chip.cycles, done.overlapped / chip.interconnect)
        milliseconds["compiler_ms"] = (beside + done.blocking / chip.interconnect) * 1e3
    predicted = max(milliseconds.values())
    model = row["model_gflop_per_device"] * 1e9 / chip.flops * 1e3
    return {
        "memory_gb_per_device": transferred / 1e9,
        "collectives_gb_per_device": received / 1e9,
        **milliseconds,
        "predicted_ms": predicted,
        "predicted_utilisation": model / predicted,
    }


def add_efficiency(rows: Sequence[Row]) -> None:
    """Adds to rows of one program, with equal work a device, how well it scales.

    The first row's time over a row's own; none where either was not predicted.
    """
    for row in rows:
        if "predicted_ms" in rows[0] and "predicted_ms" in row:
            row["scaling_efficiency"] = rows[0]["predicted_ms"] / row["predicted_ms"]


def compile_for_tpus(
    config: BenchmarkConfig, named: str, tell: Tell = lambda line: None
) -> list[Row]:
    """Compiles MiSTER-E's training step for TPUs that are not there, the batch spread over all.

    Args:
      config: what is compiled; its devices and steps are not used, and its batch is that of the
        first topology.
      named: topologies, see `tpu_topologies`.
      tell: is given a line when something long begins.

    Returns:
      A row for each topology, as `compile_ahead` and `add_efficiency` describe it.

    Raises:
      InputError: no libtpu, an unknown topology, or a step that does not compile.
    """
    found = tpu_topologies(named)
    smallest = len(next(iter(found.values())))
    check_divisible(config, smallest)
    rows = []
    for topology, devices in found.items():
        dialogues = config.batch_size // smallest * len(devices)
        tell(f"compiling for {topology}: a training step on {dialogues} dialogues")
        rows.append(
            {
                "topology": topology,
                "dialogues": dialogues,
                "length": config.length,
                **_compile_step(dataclasses.replace(config, batch_size=dialogues), devices),
            }
        )
    add_efficiency(rows)
    return rows


def _compile_step(config: BenchmarkConfig, devices: Sequence[jax.Device]) -> Row:
    spread = JitPartitioner(data_mesh(1, devices))
    task = Training(config)
    transformation = make_optimizer(OptimizerConfig(), total_steps=1)
    graph, state = abstract_state(lambda: initial_state(task, transformation, seed=0))
    one = make_batch(config.model, np.array([config.length]), config.length)
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *value.shape[1:]), value.dtype)
        for name, value in one.items()
    }
    return compile_ahead(
        spread.compile_step(make_train_step(task, graph, transformation)).function,
        placed_state(spread, state),
        placed_batch(spread, batch),
        devices,
        training_flops(config.model, config.batch_size, config.length),
    )


def first_line(error: Exception) -> str:
    """Of an error's text."""
    return str(error).strip().split("\n")[0]
