"""Speed, memory and size of MiSTER-E: whole steps, its parts, beside PyTorch, on absent TPUs.

Everything is made up on the spot, so it runs where there is no dataset, no TensorFlow and no
config library. `launch/benchmark.py` is its command line.

How time is taken: all that is compared is first run twice, which compiles it, and then in turns, A
B A B, so that a machine that slows down slows all of it alike. A run waits for its results; where
one step is shorter than 50 ms a run is as many steps as fill them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from rich.table import Table

from mister_jax import losses
from mister_jax.data.pipeline import BatchPlan, PlannedBatch, prefetch_to_device
from mister_jax.errors import InputError
from mister_jax.models import EXPERTS, MisterE, MisterEConfig, MisterEOutput
from mister_jax.models.mister_e import vote_together
from mister_jax.nn import DialogueKeys, gru_scan, run_together
from mister_jax.optim import OptimizerConfig, optimizer
from mister_jax.parallel import JitSpread, PmapSpread, Spread, data_mesh
from mister_jax.steps import initial_state, mister_e_loss, read_dialogues, train_step

PRESETS: dict[str, Callable[..., MisterEConfig]] = {
    "paper": MisterEConfig.paper,
    "small": MisterEConfig.small,
}

CONVOLUTIONS = "convolutions"
RECURRENCE = "GRU"
CONTEXT_HEADS = "skips, classifiers"
CROSS_MODAL = "cross-modal expert"
GATE_AND_LOSSES = "gate, losses"
OPTIMISER = "optimiser"

MEMORY_GIB = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
"""High-bandwidth memory of one chip by its device kind, from the Cloud TPU documentation; "TPU v5
lite" is the v5e, "TPU v5" the v5p, "TPU v6 lite" the v6e."""

_SHORTEST_RUN = 0.05  # seconds

Row = dict[str, Any]
Batch = dict[str, np.ndarray]
Run = Callable[[int], None]
"""Does something so many times and waits until it is done."""


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured.

    Attributes:
      preset: sizes of the model, "paper" or "small".
      speech_dim: D of the speech vectors.
      text_dim: D of the text vectors.
      batch_size: dialogues in a global batch.
      length: utterances of each dialogue, where an epoch's lengths are not asked for.
      dtype: of the model's computation.
      precision: of float32 matrix products, PyTorch's too. "default" is JAX's own (one bfloat16
        pass on a TPU, TF32 on a GPU), "highest" full float32. A CPU knows only the latter.
      devices: how many to spread a batch over.
      backend: "jit" or "pmap".
      steps: timed runs, or with an epoch's lengths timed epochs.
    """

    preset: str = "paper"
    speech_dim: int = 2048
    text_dim: int = 2048
    batch_size: int = 8
    length: int = 49
    dtype: str = "float32"
    precision: Literal["default", "highest"] = "default"
    devices: int = 1
    backend: Literal["jit", "pmap"] = "jit"
    steps: int = 10

    def __post_init__(self):
        allowed = {
            "preset": tuple(PRESETS),
            "dtype": ("float32", "bfloat16"),
            "precision": ("default", "highest"),
            "backend": ("jit", "pmap"),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if value not in values:
                raise InputError(f"{name} {value!r}; allowed are {', '.join(values)}")
        for name in ("speech_dim", "text_dim", "batch_size", "length", "devices", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}; must be at least 1")

    @property
    def model(self) -> MisterEConfig:
        return PRESETS[self.preset](
            speech_dim=self.speech_dim, text_dim=self.text_dim, dtype=self.dtype
        )


class Flops(NamedTuple):
    """Floating-point operations of a part, a multiplication and its addition counted as two."""

    forward: float
    backward: float


def model_flops(config: MisterEConfig, dialogues: int, length: int) -> dict[str, Flops]:
    """The matrix products of a training step, by part.

    The gradient costs two products for each one of the forward pass, but one where the input is
    the batch, which needs no gradient. What is not a matrix product is left out. Padding counts
    like utterances.

    Args:
      config: of a model with all experts, a GRU and convolutions.
      dialogues: B.
      length: T.
    """
    positions = dialogues * length
    width, fusion, attention = config.context_width, config.fusion_width, config.attention_width
    features = config.speech_dim + config.text_dim
    experts, classes = len(EXPERTS), config.num_classes

    def linear(inputs: int, outputs: int) -> float:
        return 2.0 * positions * inputs * outputs

    def flops(of_batch: float, of_hidden: float = 0.0) -> Flops:
        return Flops(of_batch + of_hidden, of_batch + 2 * of_hidden)

    recurrence = linear(width, 3 * width) + linear(width // 2, 3 * width)
    attended = 4 * (linear(fusion, 4 * attention) + 4.0 * positions * length * attention)
    return {
        CONVOLUTIONS: flops(linear(features, width * sum(config.kernel_sizes))),
        RECURRENCE: flops(0, 2 * config.gru_layers * recurrence),
        CONTEXT_HEADS: flops(linear(features, width), 2 * linear(width, classes)),
        CROSS_MODAL: flops(
            linear(features, 2 * fusion),
            config.fusion_layers * attended + linear(2 * fusion, fusion) + linear(fusion, classes),
        ),
        GATE_AND_LOSSES: flops(
            0,
            linear(experts * classes, config.gate_width)
            + linear(config.gate_width, experts)
            + linear(experts, classes)
            + 2.0 * (2 * positions) ** 2 * fusion,
        ),
    }


def _forward_flops(config: MisterEConfig, dialogues: int, length: int) -> float:
    parts = model_flops(config, dialogues, length)
    return sum(part.forward for name, part in parts.items() if name != GATE_AND_LOSSES)


def _training_flops(config: MisterEConfig, dialogues: int, length: int) -> float:
    return sum(sum(part) for part in model_flops(config, dialogues, length).values())


def iemocap_like_lengths() -> np.ndarray:
    """Lengths [120] like those of IEMOCAP's training dialogues: mean 49, at most 110.

    Quantiles of a normal distribution, the last of them the longest dialogue, in a fixed random
    order. Its standard deviation of 16 gives batches of 8 the share of padding that the corpus
    has, near 31 %.
    """
    count, shortest, longest = 120, 8, 110
    normal = statistics.NormalDist(49, 16)
    quantiles = [normal.inv_cdf((index + 0.5) / count) for index in range(count)]
    lengths = np.clip(np.rint(quantiles), shortest, longest).astype(int)
    lengths[-1] = longest
    return np.random.default_rng(0).permutation(lengths)


LENGTHS: dict[str, Callable[[], np.ndarray]] = {"iemocap": iemocap_like_lengths}


def released_epoch(lengths: np.ndarray, batch_size: int) -> list[PlannedBatch]:
    """An epoch as the released code batches it: in random order, padded to a batch's longest."""
    order = np.random.default_rng(0).permutation(len(lengths))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [PlannedBatch(rows, int(lengths[rows].max())) for rows in batches]


def make_batch(config: MisterEConfig, lengths: np.ndarray, num_utterances: int) -> Batch:
    """A batch like those of `data.batches`, of random vectors and labels.

    Args:
      config: of the model.
      lengths: [B] int, 0 for an empty row.
      num_utterances: T.
    """
    random = np.random.default_rng(0)
    mask = np.arange(num_utterances) < lengths[:, None]

    def vectors(width: int) -> np.ndarray:
        values = random.standard_normal((*mask.shape, width), np.float32)
        return np.where(mask[..., None], values, 0)

    label = np.where(mask, random.integers(config.num_classes, size=mask.shape), -1)
    return {
        "speech": vectors(config.speech_dim),
        "text": vectors(config.text_dim),
        "mask": mask,
        "speech_present": mask,
        "text_present": mask,
        "label": label.astype(np.int32),
    }


class _Training:
    """The training of a `BenchmarkConfig`, for `steps`."""

    def __init__(self, config: BenchmarkConfig):
        self.config = config.model

    def init(self, key: jax.Array) -> MisterE:
        return MisterE(self.config, rngs=nnx.Rngs(key))

    def loss(self, model, batch, key, axis_name):
        return mister_e_loss(model, batch, key, axis_name)


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
        name: max(1, math.ceil(_SHORTEST_RUN / timed(run, 1))) for name, run in candidates.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(timed(run, times[name]))
    return {name: Timing(first[name], tuple(seconds[name])) for name in candidates}


def _repeated(call: Callable[[], Any]) -> Run:
    def run(times: int) -> None:
        result = None
        for _ in range(times):
            result = call()
        jax.block_until_ready(result)

    return run


class Ours:
    """Training and inference with this library.

    Args:
      config: what is measured.
    """

    name = "mister_jax"

    def __init__(self, config: BenchmarkConfig):
        self.spread = _spread(config)
        task = _Training(config)
        transformation = optimizer(OptimizerConfig(), total_steps=1)
        graph, state = initial_state(task, transformation, seed=0)
        self._state = self.spread.put_state(state)
        self._step = self.spread.program_of_step(train_step(task, graph, transformation))

        def read(state, batch, axis_name):
            output = read_dialogues(nnx.merge(graph, state["params"]), batch)
            return output.logits, output.gate

        self._reader = self.spread.program_of_reader(read)

    def train(self, batches: Sequence[Batch]) -> Run:
        """Takes a step on each batch; the batches come from the host."""

        def epoch() -> Any:
            metrics = None
            for batch in prefetch_to_device(batches, self.spread.put_batch):
                self._state, metrics = self._step(self._state, batch)
            return metrics, self._state["step"]

        return _repeated(epoch)

    def train_on(self, batch: Batch) -> Run:
        """Takes a step on a batch that is on the devices."""
        placed = self.spread.put_batch(batch)

        def step() -> Any:
            self._state, metrics = self._step(self._state, placed)
            return metrics, self._state["step"]

        return _repeated(step)

    def infer_on(self, batch: Batch) -> Run:
        """Reads a batch that is on the devices."""
        placed = self.spread.put_batch(batch)
        return _repeated(lambda: self._reader(self._state, placed))

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

        from mister_jax.convert import torch_reference

        self._torch, self._reference = torch, torch_reference
        torch.backends.cuda.matmul.allow_tf32 = config.precision == "default"
        torch.backends.cudnn.allow_tf32 = config.precision == "default"
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = torch_reference.TorchMisterE(config.model).to(self._device)
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


def _devices(config: BenchmarkConfig) -> list[jax.Device]:
    found = jax.devices()
    if len(found) < config.devices:
        raise InputError(f"devices {config.devices}; allowed are 1 to {len(found)}, as many as are")
    return found[: config.devices]


def _spread(config: BenchmarkConfig) -> Spread:
    devices = _devices(config)
    return PmapSpread(devices) if config.backend == "pmap" else JitSpread(data_mesh(1, devices))


def _check_divisible(config: BenchmarkConfig, devices: int) -> None:
    if config.batch_size % devices:
        raise InputError(
            f"batch_size {config.batch_size}; allowed are multiples of the {devices} devices"
        )


def matmul_peak(config: BenchmarkConfig) -> float:
    """Flops a second of a large matrix product in the config's dtype, over its devices.

    Of all devices together; virtual devices of one CPU share its cores, so they count as one.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(config.dtype))
    product = jax.jit(jnp.matmul)
    timing = measure({"product": _repeated(lambda: product(x, x))}, rounds=5)["product"]
    devices = 1 if on_cpu else config.devices
    return devices * 2 * size**3 / min(timing.seconds)


def step_rows(config: BenchmarkConfig, peak: float, compare: bool = False) -> list[Row]:
    """Inference and a training step on one batch of full dialogues.

    Args:
      config: what is measured.
      peak: of `matmul_peak`.
      compare: with PyTorch, too.
    """
    _check_divisible(config, config.devices)
    model = config.model
    batch = make_batch(model, np.full(config.batch_size, config.length), config.length)
    sides = _sides(config, compare)
    shape = (config.batch_size, config.length)
    whats = {
        "inference": (lambda side: side.infer_on(batch), _forward_flops(model, *shape)),
        "training step": (lambda side: side.train_on(batch), _training_flops(model, *shape)),
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
    sides = _sides(config, compare)
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
            flops = sum(_training_flops(model, *shape) for shape in shapes)
            row = _timing_row(what, name, timing, timings, utterances)
            row |= {"model_gflop": flops / 1e9, "peak_share": flops / timing.median / peak}
        rows.append(
            {**row, "batches": len(shapes), "shapes": len(set(shapes)), "padding_share": padding}
        )
    return rows


def _sides(config: BenchmarkConfig, compare: bool) -> dict[str, Ours | Torch]:
    # PyTorch first: if it is missing, that is said at once.
    torch = {Torch.name: Torch(config)} if compare else {}
    return {Ours.name: Ours(config), **torch}


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


Part = Callable[[Any, Any], Any]
"""A part of the model: from what it is differentiated by, and what not, to a tree of arrays."""


def _model_parts(config: BenchmarkConfig) -> dict[str, tuple[Part, Any, Any]]:
    """The parts that have a gradient, each with what it is differentiated by and what not."""
    model_config = config.model
    model = MisterE(model_config, rngs=nnx.Rngs(0))
    shape = (config.batch_size, config.length)
    batch = make_batch(model_config, np.full(config.batch_size, config.length), config.length)
    dtype = jnp.dtype(config.dtype)
    speech, text = (jnp.asarray(batch[name], dtype) for name in ("speech", "text"))
    mask, label = jnp.asarray(batch["mask"]), jnp.asarray(batch["label"])
    key = jax.random.key(0)

    def hidden(width: int, kind: Any = dtype) -> jax.Array:
        return jax.random.normal(key, (*shape, width), kind)

    def split(modules: Any) -> tuple[Any, Any]:
        graph, params = nnx.split(modules)
        return graph, nnx.as_pure(params)

    contexts = (model.speech, model.text)
    convolutions, convolution_params = split([expert.convolution for expert in contexts])
    grus, gru_params = split([expert.gru for expert in contexts])
    # Without them what is left of a context expert is the skip and the classifier.
    for expert in contexts:
        expert.convolution = expert.gru = None
    heads, head_params = split(list(contexts))
    cross_modal, cross_modal_params = split(model.fusion)
    gate, gate_params = split(model.gate)
    width, fusion = model_config.context_width, model_config.fusion_width

    def convolve(params, inputs):
        layers = nnx.merge(convolutions, params)
        return [layer(x, mask) for layer, x in zip(layers, inputs, strict=True)]

    def recur(differentiated, _):
        params, inputs = differentiated
        return run_together(nnx.merge(grus, params), inputs, mask)

    def head(params, inputs):
        return vote_together(tuple(nnx.merge(heads, params)), inputs, mask)

    def fuse(params, inputs):
        keys = DialogueKeys.of_batch(key, shape[0])
        expert = nnx.merge(cross_modal, params)
        return expert(*inputs, mask, mask, deterministic=False, rngs=keys)

    def weigh(differentiated, _):
        params, expert_logits, speech_repr, text_repr = differentiated
        present = jnp.broadcast_to(mask[..., None], expert_logits.shape[:-1])
        weights = nnx.merge(gate, params)(expert_logits, present)
        output = MisterEOutput(
            logits=jnp.einsum("bte,btec->btc", weights, expert_logits),
            expert_logits=expert_logits,
            gate=weights,
            expert_present=present,
            speech_context=jnp.zeros((*shape, 0)),
            text_context=jnp.zeros((*shape, 0)),
            speech_repr=speech_repr,
            text_repr=text_repr,
            speech_present=mask,
            text_present=mask,
        )
        return losses.mister_e(output, label, mask)[0]

    expert_logits = jax.random.normal(
        key, (*shape, len(EXPERTS), model_config.num_classes), jnp.float32
    )
    return {
        CONVOLUTIONS: (convolve, convolution_params, (speech, text)),
        RECURRENCE: (recur, (gru_params, [hidden(width), hidden(width)]), None),
        CONTEXT_HEADS: (head, head_params, (speech, text)),
        CROSS_MODAL: (fuse, cross_modal_params, (speech, text)),
        GATE_AND_LOSSES: (
            weigh,
            (gate_params, expert_logits, hidden(fusion), hidden(fusion)),
            None,
        ),
    }


def _one_scan(config: BenchmarkConfig) -> tuple[Part, Any, Any]:
    """What is recurrent in one GRU layer of both experts."""
    groups, width = 4, config.model.context_width // 2
    steps = (config.length, groups, config.batch_size)
    key = jax.random.key(0)
    differentiated = (
        jax.random.normal(key, (*steps, 3 * width), jnp.float32),
        jax.random.normal(key, (groups, width, 3 * width), jnp.dtype(config.dtype)) / width**0.5,
        jnp.zeros((groups, width)),
    )

    def scan(differentiated, mask):
        gates, kernel, bias = differentiated
        return gru_scan(gates, mask, kernel, bias)

    return scan, differentiated, jnp.ones(steps, bool)


def _optimiser_run(config: BenchmarkConfig) -> Run:
    transformation = optimizer(OptimizerConfig(), total_steps=1)
    _, state = initial_state(_Training(config), transformation, seed=0)
    gradient = jax.tree.map(lambda value: jnp.full_like(value, 1e-3), state["params"])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, gradient):
        updates, opt_state = transformation.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    placed = state["params"], state["opt_state"]

    def step() -> Any:
        nonlocal placed
        placed = update(*placed, gradient)
        return placed

    return _repeated(step)


def part_rows(config: BenchmarkConfig, peak: float) -> list[Row]:
    """Each part alone on one device, forward and backward, beside the whole training step.

    Parts are compiled apart, so they do not share what XLA would fuse; their sum is a guide to
    where the time goes, not a second measurement of the step. The backward time is the time of
    both passes without that of the forward one.

    Raises:
      InputError: more than one device.
    """
    if config.devices != 1:
        raise InputError(f"devices {config.devices}; the parts are measured on 1")
    parts = _model_parts(config)
    scan = "one of its scans"
    batch = make_batch(config.model, np.full(config.batch_size, config.length), config.length)
    runs: dict[str, Run] = {
        "training step": Ours(config).train_on(batch),
        OPTIMISER: _optimiser_run(config),
    }
    for name, part in {**parts, scan: _one_scan(config)}.items():
        runs[f"{name}: forward"], runs[f"{name}: both"] = _part_runs(*part)
    timings = {name: timing.median for name, timing in measure(runs, config.steps).items()}
    whole = timings["training step"]
    flops = model_flops(config.model, config.batch_size, config.length)

    def row(name: str, seconds: float, forward: float | None = None) -> Row:
        found: Row = {"what": name, "ms": seconds * 1e3, "share_of_step": seconds / whole}
        if forward is not None:
            found |= {"forward_ms": forward * 1e3, "backward_ms": (seconds - forward) * 1e3}
        if name in flops:
            total = sum(flops[name])
            found |= {"model_gflop": total / 1e9, "peak_share": total / seconds / peak}
        return found

    rows = []
    for name in (CONVOLUTIONS, RECURRENCE, scan, CONTEXT_HEADS, CROSS_MODAL, GATE_AND_LOSSES):
        rows.append(row(name, timings[f"{name}: both"], timings[f"{name}: forward"]))
    rows.append(row(OPTIMISER, timings[OPTIMISER]))
    summed = sum(found["ms"] for found in rows if found["what"] != scan) / 1e3
    return [*rows, row("sum of the parts", summed), row("training step", whole)]


def _part_runs(part: Part, differentiated: Any, fixed: Any) -> tuple[Run, Run]:
    """The forward pass of a part, and both passes."""

    def both(differentiated, fixed, cotangent):
        output, pull_back = jax.vjp(lambda value: part(value, fixed), differentiated)
        return output, pull_back(cotangent)

    shapes = jax.eval_shape(part, differentiated, fixed)
    cotangent = jax.tree.map(lambda shape: jnp.ones(shape.shape, shape.dtype), shapes)
    forward, both = jax.jit(part), jax.jit(both)
    return (
        _repeated(lambda: forward(differentiated, fixed)),
        _repeated(lambda: both(differentiated, fixed, cotangent)),
    )


def compile_for_tpu(config: BenchmarkConfig, topology: str) -> Row:
    """Compiles the training step for TPUs that are not there, the batch spread over all of them.

    All figures are the compiler's predictions. Needs libtpu, and a process in which JAX runs on
    the CPU.

    Args:
      config: what is compiled; its devices and steps are not used.
      topology: such as "v5e:2x2".

    Returns:
      One row; "fits" is false where a device has too little memory, None where its memory is not
      known.

    Raises:
      InputError: no libtpu, an unknown topology, or a step that does not compile.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu is not installed; compiling for TPUs needs it: pip install libtpu")
    # Or libtpu would look for TPUs of the machine's own, and complain.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError) as error:
        raise InputError(f"topology {topology!r}: {_first_line(error)}") from error
    _check_divisible(config, len(devices))
    spread = JitSpread(data_mesh(1, devices))
    task = _Training(config)
    transformation = optimizer(OptimizerConfig(), total_steps=1)
    graph: Any = None

    def initial() -> Any:
        nonlocal graph
        graph, state = initial_state(task, transformation, seed=0)
        return state

    def placed(sharding: jax.sharding.Sharding) -> Callable[[Any], jax.ShapeDtypeStruct]:
        return lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    state = jax.tree.map(placed(spread.replicated), jax.eval_shape(initial))
    batch = make_batch(config.model, np.full(config.batch_size, config.length), config.length)
    start = time.perf_counter()
    try:
        step = spread.program_of_step(train_step(task, graph, transformation)).function
        compiled = step.lower(state, jax.tree.map(placed(spread.rows), batch)).compile()
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"does not compile for {topology}: {_first_line(error)}") from error
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    kind = devices[0].device_kind
    gib = MEMORY_GIB.get(kind)
    return {
        "what": "training step, predicted",
        "topology": topology,
        "device_kind": kind,
        "devices": len(devices),
        "dialogues": config.batch_size,
        "length": config.length,
        "compile_s": seconds,
        "arguments_mib_per_device": memory.argument_size_in_bytes / 2**20,
        "results_mib_per_device": memory.output_size_in_bytes / 2**20,
        "results_in_place_of_arguments_mib_per_device": memory.alias_size_in_bytes / 2**20,
        "temporaries_mib_per_device": memory.temp_size_in_bytes / 2**20,
        "total_mib_per_device": needed / 2**20,
        "memory_mib_per_device": None if gib is None else gib * 2**10,
        "fits": None if gib is None else needed <= gib * 2**30,
        "model_gflop_per_device": (
            _training_flops(config.model, config.batch_size, config.length) / len(devices) / 1e9
        ),
        "compiler_gflop_per_device_scan_bodies_once": cost.get("flops", 0.0) / 1e9,
        "compiler_ms_scan_bodies_once": (
            cost["optimal_seconds"] * 1e3 if cost.get("optimal_seconds", 0) > 0 else None
        ),
    }


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
      settings: what was asked for.
      environment: of the machine, with figures of the whole process.
      sections: rows by title; a value is None where it does not apply.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    sections: dict[str, list[Row]]

    @property
    def fits(self) -> bool:
        """No row says that it does not fit."""
        return all(row.get("fits") is not False for rows in self.sections.values() for row in rows)

    def write(self, path: str | os.PathLike) -> None:
        """Writes all of it as JSON; the rows are one list and name their section."""
        rows = [
            {"section": title, **row} for title, found in self.sections.items() for row in found
        ]
        value = {"settings": self.settings, "environment": self.environment, "rows": rows}
        try:
            pathlib.Path(path).write_text(json.dumps(value, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error

    def tables(self) -> list[Table]:
        """The settings and the environment, and a table a section."""
        about = {name: value for name, value in self.settings.items() if value}
        titled = {"": [{**about, **self.environment}], **self.sections}
        return [_table(title, rows) for title, rows in titled.items()]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def _table(title: str, rows: Sequence[Row]) -> Table:
    """A column a value, or a row a value where the rows are few."""
    names = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if any(row.get(name) is not None for row in rows)
    ]
    lines = [[name.replace("_", " ") for name in names]]
    lines += [[_shown(row.get(name)) for name in names] for row in rows]
    if len(names) > len(rows):
        lines = [list(line) for line in zip(*lines, strict=True)]
    header, *body = lines
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    for line in body:
        table.add_row(*line)
    return table


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
        environment = _environment(compare)
        if topology:
            sections["ahead of time"] = [compile_for_tpu(config, topology)]
            return Report(settings, environment, sections)
        _devices(config)  # before anything long begins
        peak = matmul_peak(config)
        if lengths:
            sections["epoch"] = epoch_rows(config, LENGTHS[lengths](), peak, compare)
        if parts:
            sections["parts"] = part_rows(config, peak)
        if not (lengths or parts):
            sections["steps"] = step_rows(config, peak, compare)
    environment["matmul_peak_gflop_per_second"] = peak / 1e9
    environment["host_memory_mib"] = _host_memory()
    return Report(settings, environment, sections)


def _environment(compare: bool) -> dict[str, Any]:
    device: Any = jax.devices()[0]
    found = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "cpu_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
    }
    if compare and importlib.util.find_spec("torch") is not None:
        import torch

        found |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    return found


def _host_memory() -> float:
    """Most memory this process has held, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
