"""Whole steps of MiSTER-E, and an epoch of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmarks.config import BenchmarkConfig, check_divisible
from benchmarks.dialogues import make_batch, released_epoch
from benchmarks.flops import forward_flops, training_flops
from benchmarks.libraries import Ours, Torch, sides_of
from benchmarks.measure import Timing, measure
from benchmarks.report import Row
from mister_jax.data.pipeline import BatchPlan


def step_rows(config: BenchmarkConfig, peak: float, compare: bool = False) -> list[Row]:
    """Inference and a training step on one batch of full dialogues.

    Args:
      config: what is measured.
      peak: of `matmul_peak`.
      compare: with PyTorch, too.
    """
    check_divisible(config, config.devices)
    model = config.model
    batch = make_batch(model, np.full(config.batch_size, config.length), config.length)
    sides = sides_of(config, compare)
    shape = (config.batch_size, config.length)
    whats = {
        "inference": (lambda side: side.infer_on(batch), forward_flops(model, *shape)),
        "training step": (lambda side: side.train_on(batch), training_flops(model, *shape)),
    }
    rows = []
    for what, (prepare, flops) in whats.items():
        timings = measure({name: prepare(side) for name, side in sides.items()}, config.steps)
        for name, timing in timings.items():
            row = _timing_row(what, name, timing, timings, config.batch_size * config.length)
            gigaflops = {"model_gflop": flops / 1e9, "peak_share": flops / timing.median / peak}
            rows.append({**row, **gigaflops, "device_memory_mib": sides[name].memory()})
    return rows


def epoch_rows(
    config: BenchmarkConfig, lengths: np.ndarray, peak: float, compare: bool = False
) -> list[Row]:
    """A training epoch over dialogues of these lengths.

    Ours is batched by `BatchPlan`, PyTorch's as `released_epoch` does. Without a comparison the
    latter's padding alone is told.
    """
    model = config.model
    utterances = int(lengths.sum())
    plan = BatchPlan(lengths, config.batch_size, multiple_of=config.devices)
    epochs = {
        Ours.name: ("epoch, bucketed", plan.epoch(seed=0, epoch=0)),
        Torch.name: ("epoch, padded as released", released_epoch(lengths, config.batch_size)),
    }
    sides = sides_of(config, compare)
    padded = np.append(lengths, 0)  # row -1 is an empty one
    runs = {
        name: side.train([make_batch(model, padded[rows], time) for rows, time in epochs[name][1]])
        for name, side in sides.items()
    }
    timings = measure(runs, config.steps)
    rows = []
    for name, (what, planned) in epochs.items():
        shapes = [(len(batch.rows), batch.num_utterances) for batch in planned]
        padding = 1 - utterances / sum(dialogues * length for dialogues, length in shapes)
        row: Row = {"what": what, "library": name, "utterances": utterances}
        if name in timings:
            timing = timings[name]
            flops = sum(training_flops(model, *shape) for shape in shapes)
            row = _timing_row(what, name, timing, timings, utterances)
            row |= {"model_gflop": flops / 1e9, "peak_share": flops / timing.median / peak}
        rows.append(
            {**row, "batches": len(shapes), "shapes": len(set(shapes)), "padding_share": padding}
        )
    return rows


def _timing_row(
    what: str, name: str, timing: Timing, timings: Mapping[str, Timing], utterances: int
) -> Row:
    ours = timings[Ours.name].median
    return {
        "what": what,
        "library": name,
        "utterances": utterances,
        "median_ms": timing.median * 1e3,
        "min_ms": min(timing.seconds) * 1e3,
        "ms_per_utterance": timing.median * 1e3 / utterances,
        "utterances_per_second": utterances / timing.median,
        "compile_s": timing.compiling if name == Ours.name else None,
        "time_over_ours": timing.median / ours if len(timings) > 1 else None,
    }
