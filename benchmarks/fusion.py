"""Benchmarks MiSTER-E: inference and training steps, epochs, and steps compiled for TPUs.

The comparison with PyTorch uses the tests' reference model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import aot
from benchmarks.config import BenchmarkConfig, check_divisible, select_devices
from benchmarks.dialogues import Batch, make_batch, released_epoch
from benchmarks.flops import program_flops
from benchmarks.measure import Run, Timing, repeated, require_torch, time_runs
from benchmarks.report import Row
from mister_jax.data.batching import BatchPlan
from mister_jax.data.pipeline import prefetch_to_device
from mister_jax.errors import InputError
from mister_jax.models import MisterE, MisterEConfig
from mister_jax.optim import OptimizerConfig, make_optimizer
from mister_jax.parallel.partitioning import EvalFn, JitPartitioner, PmapPartitioner, Step
from mister_jax.parallel.sharding import data_mesh
from mister_jax.tasks.fusion import apply_to_batch, mister_e_loss
from mister_jax.training.steps import ModelTemplate, initial_state, make_train_step


class BenchmarkTask:
    """MiSTER-E with the released loss, as a task for `make_train_step`.

    Args:
      config: Config of the model.
    """

    def __init__(self, config: MisterEConfig):
        self.config = config

    def init(self, key: jax.Array) -> MisterE:
        """Creates the model with random parameters."""
        return MisterE(self.config, rngs=nnx.Rngs(key))

    def loss(self, model, batch, key, axis_name):
        """Computes the loss and its terms, with dropout."""
        return mister_e_loss(model, batch, key, axis_name)


def initialize(config: MisterEConfig) -> tuple[ModelTemplate, Any]:
    """Returns the model's template and the initial training state."""
    optimizer = make_optimizer(OptimizerConfig(), total_steps=1)
    return initial_state(BenchmarkTask(config), optimizer, seed=0, as_vectors=True)


def step_functions(config: MisterEConfig, template: ModelTemplate) -> tuple[Step, EvalFn]:
    """Returns the training step and inference, both functions of state, batch and axis name."""

    def infer(state: Any, batch: Any, axis_name: str | None) -> Any:
        output = apply_to_batch(template.merge(state["params"], state["frozen"]), batch)
        return output.logits, output.gate

    optimizer = make_optimizer(OptimizerConfig(), total_steps=1)
    return make_train_step(BenchmarkTask(config), template, optimizer), infer


def step_flops(config: MisterEConfig, num_dialogues: int, length: int) -> tuple[float, float]:
    """Returns the FLOPs of a training step and of inference, including padding."""
    template, state = aot.abstract_state(lambda: initialize(config))
    batch = abstract_batch(config, num_dialogues, length)
    train, infer = (
        program_flops(jax.make_jaxpr(function, static_argnums=2)(state, batch, None).jaxpr)
        for function in step_functions(config, template)
    )
    return train, infer


def abstract_batch(config: MisterEConfig, num_dialogues: int, length: int) -> Any:
    """Returns the shape and dtype of each array in a batch."""
    return {
        name: jax.ShapeDtypeStruct((num_dialogues, *value.shape[1:]), value.dtype)
        for name, value in make_batch(config, np.array([length]), length).items()
    }


class JaxMisterE:
    """MiSTER-E from this library on the configured devices."""

    name = "mister_jax"

    def __init__(self, config: BenchmarkConfig):
        devices = select_devices(config)
        self._partitioner = (
            PmapPartitioner(devices)
            if config.backend == "pmap"
            else JitPartitioner(data_mesh(1, devices))
        )
        template, state = initialize(config.model)
        train, infer = step_functions(config.model, template)
        self._state = self._partitioner.put_state(state)
        self._train = self._partitioner.compile_step(train)
        self._infer = self._partitioner.compile_eval(infer)
        self.wait = jax.block_until_ready

    def put(self, batches: Iterable[Batch]) -> Iterator[Any]:
        """Transfers batches to the devices."""
        return prefetch_to_device(batches, self._partitioner.put_batch)

    def train(self, batch: Any) -> Any:
        """Trains on a batch from `put`, and returns arrays to wait for."""
        self._state, metrics = self._train(self._state, batch)
        return metrics, self._state["step"]

    def infer(self, batch: Any) -> Any:
        """Runs the model on a batch from `put`, and returns arrays to wait for."""
        return self._infer(self._state, batch)

    def peak_memory(self) -> float | None:
        """Returns the peak memory use of the first device so far, in MiB.

        The result is None if the device does not report memory statistics.
        """
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return None if peak is None else peak / 2**20


class TorchMisterE:
    """MiSTER-E from the PyTorch reference, with the methods of `JaxMisterE`.

    Raises:
      InputError: PyTorch is missing, or the reference does not support the config.
    """

    name = "torch"

    def __init__(self, config: BenchmarkConfig):
        require_torch()
        if config.dtype != "float32" or config.devices != 1:
            raise InputError(
                f"--torch with --dtype={config.dtype}, --devices={config.devices}; the PyTorch "
                "reference allows float32 and 1"
            )
        import torch

        from tests.reference import torch_mister_e

        # JAX uses TF32 on NVIDIA GPUs by default, so PyTorch uses it too.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self._torch, self._loss = torch, torch_mister_e.loss
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = torch_mister_e.TorchMisterE(config.model).to(self._device)
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), lr=OptimizerConfig().learning_rate
        )

    def put(self, batches: Iterable[Batch]) -> Iterator[Any]:
        """Transfers speech, text and labels to the device."""
        for batch in batches:
            # The reference treats padding as utterances, so padding needs a label.
            label = np.maximum(batch["label"], 0).astype(np.int64)
            arrays = (batch["speech"], batch["text"], label)
            yield [self._torch.from_numpy(array).to(self._device) for array in arrays]

    def train(self, batch: Any) -> None:
        """Trains on a batch."""
        speech, text, label = batch
        self._model.train()
        self._optimizer.zero_grad()
        total, _ = self._loss(self._model(speech, text), label)
        total.backward()
        self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), OptimizerConfig().clip_norm)
        self._optimizer.step()

    def infer(self, batch: Any) -> None:
        """Runs the model on a batch."""
        self._model.eval()
        with self._torch.inference_mode():
            self._model(*batch[:2])

    def wait(self, _: None) -> None:
        """Waits for the GPU."""
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()

    def peak_memory(self) -> float | None:
        """Returns the peak memory of the GPU so far in MiB, or None on a CPU."""
        if self._device.type != "cuda":
            return None
        return self._torch.cuda.max_memory_allocated() / 2**20


Library = JaxMisterE | TorchMisterE


def _libraries(config: BenchmarkConfig, compare: bool) -> list[Library]:
    # Create TorchMisterE first, so that an error about a missing PyTorch is raised at once.
    torch = [TorchMisterE(config)] if compare else []
    return [JaxMisterE(config), *torch]


def repeated_epoch(library: Library, batches: Sequence[Batch]) -> Run:
    """Returns a run that transfers each batch from the host and trains on it."""

    def epoch() -> Any:
        result = None
        for batch in library.put(batches):
            result = library.train(batch)
        return result

    return repeated(epoch, library.wait)


def measure_steps(config: BenchmarkConfig, peak: float, compare: bool = False) -> list[Row]:
    """Measures inference and a training step on one batch of equally long dialogues.

    Args:
      config: Model, batch and devices.
      peak: Result of `matmul_peak`.
      compare: Whether to also measure PyTorch.
    """
    check_divisible(config, config.devices)
    libraries = {library.name: library for library in _libraries(config, compare)}
    batch = make_batch(config.model, np.full(config.batch_size, config.length), config.length)
    train_flops, infer_flops = step_flops(config.model, config.batch_size, config.length)
    rows = []
    for what, method, flops in (
        ("inference", "infer", infer_flops),
        ("training step", "train", train_flops),
    ):
        runs = {}
        for name, library in libraries.items():
            (on_device,) = library.put([batch])
            call = functools.partial(getattr(library, method), on_device)
            runs[name] = repeated(call, library.wait)
        timings = time_runs(runs, config.steps)
        for name in timings:
            row = _timing_row(what, name, timings, config.batch_size * config.length, flops, peak)
            rows.append({**row, "device_memory_mib": libraries[name].peak_memory()})
    return rows


def measure_epoch(
    config: BenchmarkConfig, lengths: np.ndarray, peak: float, compare: bool = False
) -> list[Row]:
    """Measures a training epoch.

    This library makes batches with `BatchPlan`, and PyTorch with `released_epoch`. Without
    `compare`, the row for PyTorch has only the numbers of batches and shapes, and the padding.

    Args:
      config: Model, batch size and devices.
      lengths: Number of utterances in each dialogue.
      peak: Result of `matmul_peak`.
      compare: Whether to also measure PyTorch.
    """
    model, num_utterances = config.model, int(lengths.sum())
    plan = BatchPlan(lengths, config.batch_size, multiple_of=config.devices)
    epochs = {
        JaxMisterE.name: ("epoch, bucketed", plan.epoch(seed=0, epoch=0)),
        TorchMisterE.name: (
            "epoch, padded as released",
            released_epoch(lengths, config.batch_size),
        ),
    }
    # In a planned batch, row index -1 marks an empty row and selects the appended length 0.
    lengths_and_empty = np.append(lengths, 0)
    runs = {}
    for library in _libraries(config, compare):
        _, planned = epochs[library.name]
        batches = [make_batch(model, lengths_and_empty[rows], length) for rows, length in planned]
        runs[library.name] = repeated_epoch(library, batches)
    timings = time_runs(runs, config.steps)
    rows = []
    for name, (what, planned) in epochs.items():
        shapes = [(len(batch.rows), batch.padded_length) for batch in planned]
        row: Row = {"what": what, "library": name, "utterances": num_utterances}
        if name in timings:
            flops_of_shape = {shape: step_flops(model, *shape)[0] for shape in set(shapes)}
            flops = sum(flops_of_shape[shape] for shape in shapes)
            row = _timing_row(what, name, timings, num_utterances, flops, peak)
        row |= {
            "batches": len(shapes),
            "shapes": len(set(shapes)),
            "padding_share": 1 - num_utterances / sum(size * length for size, length in shapes),
        }
        rows.append(row)
    return rows


def _timing_row(
    what: str,
    name: str,
    timings: Mapping[str, Timing],
    num_utterances: int,
    flops: float,
    peak: float,
) -> Row:
    timing, jax_timing = timings[name], timings[JaxMisterE.name]
    return {
        "what": what,
        "library": name,
        "utterances": num_utterances,
        "median_ms": timing.median * 1e3,
        "min_ms": min(timing.seconds) * 1e3,
        "ms_per_utterance": timing.median * 1e3 / num_utterances,
        "utterances_per_second": num_utterances / timing.median,
        "compile_s": timing.compile_seconds if timing is jax_timing else None,
        "relative_time": timing.median / jax_timing.median if len(timings) > 1 else None,
        "model_gflop": flops / 1e9,
        "matmul_peak_gflop_per_second": peak / 1e9,
        "peak_share": flops / timing.median / peak,
    }


def compile_for_tpus(
    config: BenchmarkConfig, names: str, log: aot.Log = lambda line: None
) -> list[Row]:
    """Compiles the training step for TPUs, with a batch's rows divided among all chips.

    Args:
      config: Model, and the batch size for the first topology. All other topologies have the same
        batch size per chip. Devices and steps are ignored.
      names: Topologies; see `aot.tpu_topologies`.
      log: Function called with a message before each compilation.

    Returns:
      A row per topology; see `aot.compile_ahead` and `aot.add_scaling_efficiency`.

    Raises:
      InputError: libtpu is missing, a topology is unknown, the chips of the first topology cannot
        share a batch equally, or the step does not compile.
    """
    topologies = aot.tpu_topologies(names)
    smallest = len(next(iter(topologies.values())))
    check_divisible(config, smallest)
    template, state = aot.abstract_state(lambda: initialize(config.model))
    train, _ = step_functions(config.model, template)
    rows = []
    for topology, devices in topologies.items():
        num_dialogues = config.batch_size // smallest * len(devices)
        log(f"compiling a training step on {num_dialogues} dialogues for {topology}")
        partitioner = JitPartitioner(data_mesh(1, devices))
        compiled = aot.compile_ahead(
            partitioner,
            partitioner.compile_step(train),
            state,
            abstract_batch(config.model, num_dialogues, config.length),
            step_flops(config.model, num_dialogues, config.length)[0],
        )
        dialogues = {"dialogues": num_dialogues, "length": config.length}
        rows.append({"topology": topology, **dialogues, **compiled})
    aot.add_scaling_efficiency(rows)
    return rows
