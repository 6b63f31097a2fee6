"""What `launch.benchmark` calls for MiSTER-E."""

from __future__ import annotations

import dataclasses

import jax

from benchmarks.aot import Tell, compile_for_tpus
from benchmarks.config import BenchmarkConfig, devices_of
from benchmarks.dialogues import LENGTHS
from benchmarks.measure import matmul_peak
from benchmarks.parts import part_rows
from benchmarks.report import PREDICTED, Report, Row, report_of
from benchmarks.steps import epoch_rows, step_rows
from mister_jax.errors import InputError


def benchmark(
    config: BenchmarkConfig,
    *,
    lengths: str = "",
    parts: bool = False,
    compare: bool = False,
    topologies: str = "",
    tell: Tell = lambda line: None,
) -> Report:
    """Measures what is asked for: steps, unless an epoch, the parts or topologies are.

    Args:
      config: what is measured.
      lengths: "iemocap" for an epoch over dialogues of such lengths.
      parts: of the training step, each alone.
      compare: steps or epochs with PyTorch, too.
      topologies: TPUs to compile for, see `aot.tpu_topologies`; nothing else is done then.
      tell: is given a line when something long begins.

    Raises:
      InputError: something asked for that is unknown, missing here, or does not go together.
    """
    if lengths and lengths not in LENGTHS:
        raise InputError(f"lengths {lengths!r}; allowed are {', '.join(LENGTHS)}")
    if topologies and (lengths or parts or compare):
        raise InputError(f"topology {topologies} goes with no lengths, parts or comparison")
    settings = {
        **dataclasses.asdict(config),
        "lengths": lengths or None,
        "parts": parts,
        "compare": compare,
        "topologies": topologies or None,
    }
    sections: dict[str, list[Row]] = {}
    peak = None
    precision = None if config.precision == "default" else config.precision
    with jax.default_matmul_precision(precision):
        if topologies:
            rows = compile_for_tpus(config, topologies, tell)
            sections[f"training step, {PREDICTED}"] = rows
        else:
            devices_of(config)  # before anything long begins
            peak = matmul_peak(config)
            if lengths:
                sections["epoch"] = epoch_rows(config, LENGTHS[lengths](), peak, compare)
            if parts:
                sections["parts"] = part_rows(config, peak)
            if not (lengths or parts):
                sections["steps"] = step_rows(config, peak, compare)
    report = report_of(settings, sections, compare)
    if peak is not None:
        report.environment["matmul_peak_gflop_per_second"] = peak / 1e9
    return report
