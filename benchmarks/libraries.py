"""MiSTER-E trained and run by this library, and by the PyTorch reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.config import BenchmarkConfig, devices_of
from benchmarks.dialogues import Batch
from benchmarks.measure import Run, repeated
from mister_jax.data.pipeline import prefetch_to_device
from mister_jax.errors import InputError
from mister_jax.models import MisterE
from mister_jax.optim import OptimizerConfig, make_optimizer
from mister_jax.parallel.partitioning import JitPartitioner, Partitioner, PmapPartitioner
from mister_jax.parallel.sharding import data_mesh
from mister_jax.tasks.fusion import apply_to_batch, mister_e_loss
from mister_jax.training.steps import initial_state, make_train_step


class Training:
    """The training of a `BenchmarkConfig`, for `steps`."""

    def __init__(self, config: BenchmarkConfig):
        self.config = config.model

    def init(self, key: jax.Array) -> MisterE:
        return MisterE(self.config, rngs=nnx.Rngs(key))

    def loss(self, model, batch, key, axis_name):
        return mister_e_loss(model, batch, key, axis_name)


class Ours:
    """Training and inference with this library.

    Args:
      config: what is measured.
    """

    name = "mister_jax"

    def __init__(self, config: BenchmarkConfig):
        self.partitioner = _spread(config)
        task = Training(config)
        transformation = make_optimizer(OptimizerConfig(), total_steps=1)
        graph, state = initial_state(task, transformation, seed=0)
        self._state = self.partitioner.put_state(state)
        self._step = self.partitioner.compile_step(make_train_step(task, graph, transformation))

        def read(state, batch, axis_name):
            output = apply_to_batch(nnx.merge(graph, state["params"]), batch)
            return output.logits, output.gate

        self._reader = self.partitioner.compile_eval(read)

    def train(self, batches: Sequence[Batch]) -> Run:
        """Takes a step on each batch; the batches come from the host."""

        def epoch() -> Any:
            metrics = None
            for batch in prefetch_to_device(batches, self.partitioner.put_batch):
                self._state, metrics = self._step(self._state, batch)
            return metrics, self._state["step"]

        return repeated(epoch)

    def train_on(self, batch: Batch) -> Run:
        """Takes a step on a batch that is on the devices."""
        placed = self.partitioner.put_batch(batch)

        def step() -> Any:
            self._state, metrics = self._step(self._state, placed)
            return metrics, self._state["step"]

        return repeated(step)

    def infer_on(self, batch: Batch) -> Run:
        """Reads a batch that is on the devices."""
        placed = self.partitioner.put_batch(batch)
        return repeated(lambda: self._reader(self._state, placed))

    def memory(self) -> float | None:
        """Most memory used so far on one device, MiB; None where the device does not tell."""
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        return None if peak is None else peak / 2**20


class Torch:
    """Training and inference with the PyTorch reference; methods as those of `Ours`.

    Raises:
      InputError: PyTorch is missing, or the config is one that the reference does not know.
    """

    name = "torch"

    def __init__(self, config: BenchmarkConfig):
        if importlib.util.find_spec("torch") is None:
            raise InputError("PyTorch is not installed; the comparison needs it: pip install torch")
        if config.dtype != "float32" or config.devices != 1:
            raise InputError(
                f"dtype {config.dtype}, devices {config.devices}; the PyTorch reference allows "
                "float32 and 1"
            )
        import torch

        from tests.reference import torch_mister_e

        self._torch, self._reference = torch, torch_mister_e
        torch.backends.cuda.matmul.allow_tf32 = config.precision == "default"
        torch.backends.cudnn.allow_tf32 = config.precision == "default"
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = torch_mister_e.TorchMisterE(config.model).to(self._device)
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), lr=OptimizerConfig().learning_rate
        )

    def _put(self, batch: Batch) -> tuple[Any, Any, Any]:
        # Padding is an utterance like others to the reference, so it must have a label.
        arrays = (batch["speech"], batch["text"], np.maximum(batch["label"], 0).astype(np.int64))
        speech, text, label = (self._torch.from_numpy(array) for array in arrays)
        return speech.to(self._device), text.to(self._device), label.to(self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()

    def _step(self, speech: Any, text: Any, label: Any) -> None:
        self._model.train()
        self._optimizer.zero_grad()
        total, _ = self._reference.loss(self._model(speech, text), label)
        total.backward()
        self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), OptimizerConfig().clip_norm)
        self._optimizer.step()

    def train(self, batches: Sequence[Batch]) -> Run:
        def run(times: int) -> None:
            for _ in range(times):
                for batch in batches:
                    self._step(*self._put(batch))
            self._wait()

        return run

    def train_on(self, batch: Batch) -> Run:
        placed = self._put(batch)

        def run(times: int) -> None:
            for _ in range(times):
                self._step(*placed)
            self._wait()

        return run

    def infer_on(self, batch: Batch) -> Run:
        speech, text, _ = self._put(batch)

        def run(times: int) -> None:
            self._model.eval()
            with self._torch.inference_mode():
                for _ in range(times):
                    self._model(speech, text)
            self._wait()

        return run

    def memory(self) -> float | None:
        if self._device.type != "cuda":
            return None
        return self._torch.cuda.max_memory_allocated() / 2**20


def _spread(config: BenchmarkConfig) -> Partitioner:
    devices = devices_of(config)
    return (
        PmapPartitioner(devices)
        if config.backend == "pmap"
        else JitPartitioner(data_mesh(1, devices))
    )


def sides_of(config: BenchmarkConfig, compare: bool) -> dict[str, Ours | Torch]:
    """Ours and, to compare with, PyTorch's."""
    # PyTorch first: if it is missing, that is said at once.
    torch = {Torch.name: Torch(config)} if compare else {}
    return {Ours.name: Ours(config), **torch}
