"""The large utterance encoders at full size, with random parameters or none at all.

Two programs of stage 1: a step of LoRA fine-tuning, and extraction, which gives the features that
stage 2 reads. `predict` compiles them for TPUs that are not there; `run` times them here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.aot import (
    Tell,
    abstract_state,
    add_efficiency,
    compile_ahead,
    placed_batch,
    placed_state,
    tpu_topologies,
)
from benchmarks.chips import CHIPS
from benchmarks.flops import program_flops
from benchmarks.measure import measure, repeated
from benchmarks.report import PREDICTED, Row
from mister_jax import losses
from mister_jax.encoders.audio_prompt import PromptedSpeech
from mister_jax.encoders.decoder import Decoder, DecoderConfig
from mister_jax.encoders.frontends import SAMPLE_RATE
from mister_jax.encoders.qwen2_audio import Qwen2Audio, Qwen2AudioConfig
from mister_jax.encoders.salmonn import Salmonn, SalmonnConfig
from mister_jax.errors import InputError
from mister_jax.models import SpeechUtterance, TextUtterance, UtteranceConfig, UtteranceHead
from mister_jax.models.utterance import UtteranceOutput
from mister_jax.nn import PerExampleRngs
from mister_jax.nn.lora import LoRAConfig
from mister_jax.optim import OptimizerConfig, make_optimizer
from mister_jax.parallel.memory import explain_oom
from mister_jax.parallel.partitioning import EvalFn, JitPartitioner, Step
from mister_jax.parallel.sharding import data_mesh, shardings
from mister_jax.training.steps import initial_state, make_train_step

Batch = dict[str, np.ndarray]

TUNING_STEP = "LoRA fine-tuning step"
EXTRACTION = "extraction"

_CLASSES = 7
_TRANSFORMATION = make_optimizer(OptimizerConfig(name="adamw", b2=0.99, eps=1e-6), total_steps=1)


class Tuning:
    """LoRA fine-tuning of an encoder, as `steps.make_train_step` needs it."""

    rows: int
    """Of a batch on one device that uses it well."""

    def init(self, key: jax.Array) -> nnx.Module:
        """The model with random parameters."""
        raise NotImplementedError

    def read(self, model: Any, batch: Any, **options: Any) -> UtteranceOutput:
        """What it gives for a batch."""
        raise NotImplementedError

    def batch(self, rows: int) -> Batch:
        """Random input, no padding."""
        raise NotImplementedError

    def loss(
        self, model: Any, batch: Any, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The focal loss of a batch, as in `tasks.encoder`."""
        keys = PerExampleRngs(jax.vmap(jax.random.fold_in, (None, 0))(key, batch["row"]))
        logits = self.read(model, batch, deterministic=False, rngs=keys).logits
        each = losses.focal_per_position(logits, batch["label"], batch["weight"] > 0, gamma=2.0)
        total = (each * batch["weight"]).sum()
        return total, {"focal": total}


def _labels(rows: int) -> Batch:
    return {
        "label": np.arange(rows, dtype=np.int32) % _CLASSES,
        "weight": np.full(rows, 1 / rows, np.float32),
        "row": np.arange(rows, dtype=np.int32),
    }


class TextTuning(Tuning):
    """A decoder that reads texts.

    Args:
      config: of the decoder.
      length: tokens of a text.
    """

    rows = 64

    def __init__(self, config: DecoderConfig, length: int):
        self.config = config
        self.length = length

    def init(self, key: jax.Array) -> TextUtterance:
        rngs = nnx.Rngs(key)
        head = UtteranceHead(self.config.hidden_size, UtteranceConfig(_CLASSES), rngs=rngs)
        return TextUtterance(Decoder(self.config, rngs=rngs), head)

    def read(self, model: TextUtterance, batch: Any, **options: Any) -> UtteranceOutput:
        return model(batch["input_ids"], batch["mask"], **options)

    def batch(self, rows: int) -> Batch:
        shape = (rows, self.length)
        ids = np.random.default_rng(0).integers(self.config.vocab_size, size=shape)
        return {"input_ids": ids.astype(np.int32), "mask": np.ones(shape, bool), **_labels(rows)}


class SpeechTuning(Tuning):
    """A language model that reads clips of 30 s, each in a prompt of 16 tokens.

    Args:
      model: made as `model(config, rngs=...)`.
      config: of all its parts.
    """

    rows = 8
    samples = 30 * SAMPLE_RATE

    def __init__(self, model: Callable[..., nnx.Module], config: Any):
        self.model = model
        self.config = config

    def init(self, key: jax.Array) -> SpeechUtterance:
        rngs = nnx.Rngs(key)
        prompt = (self.config.placeholder, *range(15))
        backbone = PromptedSpeech(self.model(self.config, rngs=rngs), prompt)
        head = UtteranceConfig(_CLASSES, pooling="mean")
        return SpeechUtterance(backbone, UtteranceHead(self.config.hidden_size, head, rngs=rngs))

    def read(self, model: SpeechUtterance, batch: Any, **options: Any) -> UtteranceOutput:
        waveform = batch["waveform"].astype(jnp.float32) / 2**15
        return model(waveform, batch["lengths"], **options)

    def batch(self, rows: int) -> Batch:
        noise = np.random.default_rng(0).normal(0, 2**12, (rows, self.samples))
        return {
            "waveform": noise.astype(np.int16),
            "lengths": np.full(rows, self.samples, np.int32),
            **_labels(rows),
        }


_TEXT: dict[str, Any] = {
    "lora": LoRAConfig(rank=8, alpha=32, dropout=0.1, targets=("query", "value"))
}
_SPEECH: dict[str, Any] = {
    "lora": LoRAConfig(rank=16, alpha=8, dropout=0.05, targets=("query", "key"))
}

ENCODERS: dict[str, Callable[..., Tuning]] = {
    "llama_3_1_8b": lambda length, **options: TextTuning(
        DecoderConfig.llama_3_1_8b(**_TEXT, **options), length
    ),
    "qwen2_5_7b": lambda length, **options: TextTuning(
        DecoderConfig.qwen2_5_7b(**_TEXT, **options), length
    ),
    "qwen2_audio_7b": lambda _, **options: SpeechTuning(
        Qwen2Audio, Qwen2AudioConfig.qwen2_audio_7b(**_SPEECH, **options)
    ),
    "salmonn_7b": lambda _, **options: SpeechTuning(Salmonn, SalmonnConfig.salmonn_7b(**options)),
}
"""From the tokens of a text, which speech has no use for, and options to the encoder's tuning."""


class CompiledStep(NamedTuple):
    """One of the two programs.

    Attributes:
      function: under `jit`, of the state and a batch.
      state: its shapes.
      model_flops: of the model on the batch.
    """

    function: Any
    state: Any
    model_flops: float


def programs(
    encoder: str, length: int, spread: JitPartitioner, rows: int
) -> dict[str, CompiledStep]:
    """Both programs of an encoder by name, for batches of `rows`."""
    tuning = tuning_of(encoder, length, remat="full")
    graph, state = abstract_state(lambda: _initial(tuning))
    step, extract = _functions(tuning, graph)
    read = {name: state[name] for name in ("params", "frozen")}
    step_flops, extract_flops = _model_flops(tuning_of(encoder, length, remat="none"))
    return {
        TUNING_STEP: CompiledStep(spread.compile_step(step).function, state, rows * step_flops),
        EXTRACTION: CompiledStep(spread.compile_eval(extract).function, read, rows * extract_flops),
    }


def _initial(tuning: Tuning) -> tuple[Any, Any]:
    trained = nnx.Any(nnx.LoRAParam, nnx.All(nnx.Param, nnx.PathContains("head")))
    return initial_state(tuning, _TRANSFORMATION, seed=0, trainable=trained)


def _functions(tuning: Tuning, graph: Any) -> tuple[Step, EvalFn]:
    def extract(state: Any, batch: Any, axis_name: str | None) -> jax.Array:
        model = nnx.merge(graph, state["params"], state["frozen"])
        return tuning.read(model, batch).feature

    return make_train_step(tuning, graph, _TRANSFORMATION), extract


def _model_flops(tuning: Tuning) -> list[float]:
    """Of both programs, for one utterance; without remat they compute nothing twice."""
    graph, state = abstract_state(lambda: _initial(tuning))
    batch = _shapes(tuning, 1)
    return [
        program_flops(jax.make_jaxpr(function, static_argnums=2)(state, batch, None).jaxpr)
        for function in _functions(tuning, graph)
    ]


def _shapes(tuning: Tuning, rows: int) -> Any:
    """Of a batch, without one."""
    return {
        name: jax.ShapeDtypeStruct((rows, *value.shape[1:]), value.dtype)
        for name, value in tuning.batch(1).items()
    }


def tuning_of(encoder: str, length: int, **options: Any) -> Tuning:
    """Of an encoder that is named, in bfloat16.

    Args:
      encoder: one of `ENCODERS`.
      length: tokens of a text.
      **options: fields of the language model's config.

    Raises:
      InputError: no such encoder, or no length.
    """
    if encoder not in ENCODERS:
        raise InputError(f"encoder {encoder!r}; allowed are {', '.join(ENCODERS)}")
    if length < 1:
        raise InputError(f"sequence {length}; must be at least 1")
    return ENCODERS[encoder](length, dtype="bfloat16", param_dtype="bfloat16", **options)


def _spread(devices: Sequence[jax.Device], model_parallelism: int) -> JitPartitioner:
    if model_parallelism < 1 or len(devices) % model_parallelism:
        raise InputError(
            f"model_parallelism {model_parallelism}; allowed are divisors of the {len(devices)} "
            "devices"
        )
    if len(devices) == 1:
        return JitPartitioner(data_mesh(1, devices))
    # The rules stand where encoders are loaded, which needs the Hugging Face libraries; a machine
    # of one accelerator may lack them.
    from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES

    return JitPartitioner(data_mesh(model_parallelism, devices), ENCODER_SHARDING_RULES)


def _rows_of(tuning: Tuning, rows: int) -> int:
    if rows < 0:
        raise InputError(f"rows {rows}; allowed are 1 or more, 0 for {tuning.rows}")
    return rows or tuning.rows


def predict(
    encoder: str,
    named: str,
    *,
    length: int = 128,
    rows: int = 0,
    model_parallelism: int = 1,
    tell: Tell = lambda line: None,
) -> dict[str, list[Row]]:
    """Compiles both programs for TPUs that are not there.

    Each chip holds a part of every kernel, which is put together where a layer needs it (FSDP);
    with model parallelism so many chips compute each with its part, and the activations travel.

    Args:
      encoder: one of `ENCODERS`.
      named: topologies, see `aot.tpu_topologies`.
      length: tokens of a text.
      rows: of a batch, a device; 0 for as many as use a chip well.
      model_parallelism: chips that share the work on their rows.
      tell: is given a line when something long begins.

    Returns:
      By program a row for each topology, as `aot.compile_ahead` and `aot.add_efficiency` describe
      it.

    Raises:
      InputError: an unknown encoder or topology, rows that cannot be spread, a program that does
        not compile.
    """
    tuning = tuning_of(encoder, length)
    each = _rows_of(tuning, rows)
    compiled: dict[str, list[Row]] = {TUNING_STEP: [], EXTRACTION: []}
    for topology, devices in tpu_topologies(named).items():
        spread = _spread(devices, model_parallelism)
        total = each * len(devices)
        batch = placed_batch(spread, _shapes(tuning, total))
        for what, program in programs(encoder, length, spread, total).items():
            tell(f"compiling for {topology}: {what} of {encoder}, {total} rows")
            found = compile_ahead(
                program.function,
                placed_state(spread, program.state),
                batch,
                devices,
                program.model_flops,
            )
            if "predicted_ms" in found:
                found["utterances_per_second"] = total / found["predicted_ms"] * 1e3
            mesh = " x ".join(map(str, spread.mesh.shape.values()))
            about = {"topology": topology, "encoder": encoder, "data_x_model": mesh, "rows": total}
            compiled[what].append(about | found)
    for found_rows in compiled.values():
        add_efficiency(found_rows)
    return {f"{what}, {PREDICTED}": found_rows for what, found_rows in compiled.items()}


def run(encoder: str, *, length: int = 128, rows: int = 0, steps: int = 3) -> list[Row]:
    """Times both programs on the devices that are there, with random parameters.

    Args:
      encoder: one of `ENCODERS`.
      length: tokens of a text.
      rows: of a batch, a device; 0 for as many as use an accelerator well.
      steps: timed runs.

    Raises:
      InputError: an unknown encoder, too little memory.
    """
    tuning = tuning_of(encoder, length)
    rows = _rows_of(tuning, rows) * jax.device_count()
    spread = _spread(jax.devices(), 1)
    both = programs(encoder, length, spread, rows)
    placed = shardings(both[TUNING_STEP].state, spread.mesh, spread.rules)
    with explain_oom(encoder, f"batches of {rows} rows", "a smaller --rows"):
        batch = spread.put_batch(tuning.batch(rows))
        # Made where it belongs: no one device need hold all of it.
        state = jax.jit(lambda: _initial(tuning)[1], out_shardings=placed)()

        def tune() -> Any:
            nonlocal state
            state, metrics = both[TUNING_STEP].function(state, batch)
            return metrics

        def extract() -> Any:
            read = {name: state[name] for name in both[EXTRACTION].state}
            return both[EXTRACTION].function(read, batch)

        return [
            _timed(what, call, both[what], encoder, rows, steps)
            for what, call in ((EXTRACTION, extract), (TUNING_STEP, tune))
        ]


def _timed(
    what: str, call: Callable[[], Any], program: CompiledStep, encoder: str, rows: int, steps: int
) -> Row:
    timing = measure({what: repeated(call)}, steps)[what]
    device, devices = jax.devices()[0], jax.device_count()
    chip = CHIPS.get(device.device_kind)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    done = program.model_flops / timing.median / devices
    return {
        "what": what,
        "encoder": encoder,
        "device_kind": device.device_kind,
        "devices": devices,
        "rows": rows,
        "compile_s": timing.compiling,
        "median_ms": timing.median * 1e3,
        "utterances_per_second": rows / timing.median,
        "model_gflop_per_device": program.model_flops / devices / 1e9,
        "utilisation": None if chip is None else done / chip.flops,
        "peak_memory_mib_per_device": None if memory is None else memory / 2**20,
    }
