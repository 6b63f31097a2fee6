"""What `launch.benchmark` calls."""

from __future__ import annotations

import dataclasses

import jax

from mister_jax.benchmark.aot import compile_for_tpu
from mister_jax.benchmark.config import BenchmarkConfig, devices_of
from mister_jax.benchmark.dialogues import LENGTHS
from mister_jax.benchmark.measure import matmul_peak
from mister_jax.benchmark.parts import part_rows
from mister_jax.benchmark.report import Report, Row, environment_of, host_memory
from mister_jax.benchmark.steps import epoch_rows, step_rows
from mister_jax.errors import InputError


def benchmark(
    config: BenchmarkConfig,
    *,
    lengths: str = "",
    parts: bool = False,
    compare: bool = False,
    topology: str = "",
) -> Report:
    """Measures what is asked for: steps, unless an epoch, the parts or a topology is.

    Args:
      config: what is measured.
      lengths: "iemocap" for an epoch over dialogues of such lengths.
      parts: of the training step, each alone.
      compare: steps or epochs with PyTorch, too.
      topology: TPUs to compile for; nothing else is done then.

    Raises:
      InputError: something asked for that is unknown, missing here, or does not go together.
    """
    if lengths and lengths not in LENGTHS:
        raise InputError(f"lengths {lengths!r}; allowed are {', '.join(LENGTHS)}")
    if topology and (lengths or parts or compare):
        raise InputError(f"topology {topology} goes with no lengths, parts or comparison")
    settings = {
        **dataclasses.asdict(config),
        "lengths": lengths or None,
        "parts": parts,
        "compare": compare,
        "topology": topology or None,
    }
    sections: dict[str, list[Row]] = {}
    precision = None if config.precision == "default" else config.precision
    with jax.default_matmul_precision(precision):
        environment = environment_of(compare)
        if topology:
            sections["ahead of time"] = [compile_for_tpu(config, topology)]
            return Report(settings, environment, sections)
        devices_of(config)  # before anything long begins
        peak = matmul_peak(config)
        if lengths:
            sections["epoch"] = epoch_rows(config, LENGTHS[lengths](), peak, compare)
        if parts:
            sections["parts"] = part_rows(config, peak)
        if not (lengths or parts):
            sections["steps"] = step_rows(config, peak, compare)
    environment["matmul_peak_gflop_per_second"] = peak / 1e9
    environment["host_memory_mib"] = host_memory()
    return Report(settings, environment, sections)
