"""Benchmarks large utterance encoders at full size, with random parameters or only their shapes.

Two programs are measured: a LoRA fine-tuning step, and the extraction of features for MiSTER-E.
`compile_for_tpus` compiles both programs for TPUs, and `measure_encoder` times both programs on
this machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import aot
from benchmarks.flops import program_flops
from benchmarks.measure import repeated, time_runs
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
from mister_jax.nn.scanned_layers import Remat
from mister_jax.optim import OptimizerConfig, make_optimizer
from mister_jax.parallel.oom import explain_oom
from mister_jax.parallel.partitioning import CompiledStep, EvalFn, JitPartitioner, Step
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES, data_mesh, shardings
from mister_jax.training.steps import ModelTemplate, initial_state, make_train_step

Batch = dict[str, np.ndarray]

FINE_TUNING = "LoRA fine-tuning step"
EXTRACTION = "extraction"

_NUM_CLASSES = 7
_OPTIMIZER = make_optimizer(OptimizerConfig(name="adamw", b2=0.99, eps=1e-6), total_steps=1)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """LoRA fine-tuning of an encoder, as a task for `make_train_step`.

    Attributes:
      config: Config of the encoder.
      default_rows: Number of rows per device that makes good use of an accelerator.
      init: Function that creates the model from a random key.
      apply: Function that runs the model on a batch.
      inputs: Function of the number of rows that returns random inputs without padding.
    """

    config: Any
    default_rows: int
    init: Callable[[jax.Array], nnx.Module]
    apply: Callable[..., UtteranceOutput]
    inputs: Callable[[int], Batch]

    def batch(self, num_rows: int) -> Batch:
        """Returns a batch of random inputs with labels."""
        return {
            **self.inputs(num_rows),
            "label": np.arange(num_rows, dtype=np.int32) % _NUM_CLASSES,
            "weight": np.full(num_rows, 1 / num_rows, np.float32),
            "row": np.arange(num_rows, dtype=np.int32),
        }

    def loss(
        self, model: Any, batch: Any, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the focal loss of a batch, as in `tasks.encoder`."""
        rngs = PerExampleRngs(jax.vmap(jax.random.fold_in, (None, 0))(key, batch["row"]))
        logits = self.apply(model, batch, deterministic=False, rngs=rngs).logits
        focal = losses.focal_per_position(logits, batch["label"], batch["weight"] > 0, gamma=2.0)
        total = (focal * batch["weight"]).sum()
        return total, {"focal": total}


def text_tuning(config: DecoderConfig, length: int) -> Tuning:
    """Creates the fine-tuning task of a decoder on texts with `length` tokens."""

    def init(key: jax.Array) -> TextUtterance:
        rngs = nnx.Rngs(key)
        head = UtteranceHead(config.hidden_size, UtteranceConfig(_NUM_CLASSES), rngs=rngs)
        return TextUtterance(Decoder(config, rngs=rngs), head)

    def apply(model: TextUtterance, batch: Any, **options: Any) -> UtteranceOutput:
        return model(batch["input_ids"], batch["mask"], **options)

    def inputs(num_rows: int) -> Batch:
        shape = (num_rows, length)
        ids = np.random.default_rng(0).integers(config.vocab_size, size=shape)
        return {"input_ids": ids.astype(np.int32), "mask": np.ones(shape, bool)}

    return Tuning(config, 64, init, apply, inputs)


def speech_tuning(model_class: Callable[..., nnx.Module], config: Any) -> Tuning:
    """Creates the fine-tuning task of a speech LLM on 30 s clips in a prompt of 16 tokens."""
    num_samples = 30 * SAMPLE_RATE

    def init(key: jax.Array) -> SpeechUtterance:
        rngs = nnx.Rngs(key)
        prompt = (config.placeholder, *range(15))
        backbone = PromptedSpeech(model_class(config, rngs=rngs), prompt)
        head = UtteranceConfig(_NUM_CLASSES, pooling="mean")
        return SpeechUtterance(backbone, UtteranceHead(config.hidden_size, head, rngs=rngs))

    def apply(model: SpeechUtterance, batch: Any, **options: Any) -> UtteranceOutput:
        return model(batch["waveform"].astype(jnp.float32) / 2**15, batch["lengths"], **options)

    def inputs(num_rows: int) -> Batch:
        noise = np.random.default_rng(0).normal(0, 2**12, (num_rows, num_samples))
        lengths = np.full(num_rows, num_samples, np.int32)
        return {"waveform": noise.astype(np.int16), "lengths": lengths}

    return Tuning(config, 8, init, apply, inputs)


_TEXT_LORA = LoRAConfig(rank=8, alpha=32, dropout=0.1, targets=("query", "value"))
_SPEECH_LORA = LoRAConfig(rank=16, alpha=8, dropout=0.05, targets=("query", "key"))

ENCODERS: dict[str, Callable[..., Tuning]] = {
    "llama_3_1_8b": lambda length, **options: text_tuning(
        DecoderConfig.llama_3_1_8b(lora=_TEXT_LORA, **options), length
    ),
    "qwen2_5_7b": lambda length, **options: text_tuning(
        DecoderConfig.qwen2_5_7b(lora=_TEXT_LORA, **options), length
    ),
    "qwen2_audio_7b": lambda _, **options: speech_tuning(
        Qwen2Audio, Qwen2AudioConfig.qwen2_audio_7b(lora=_SPEECH_LORA, **options)
    ),
    "salmonn_7b": lambda _, **options: speech_tuning(Salmonn, SalmonnConfig.salmonn_7b(**options)),
}
"""Maps each encoder to a function that creates its task, given the tokens per text and options."""


def make_tuning(encoder: str, length: int, **options: Any) -> Tuning:
    """Creates the fine-tuning task of an encoder in `ENCODERS`, in bfloat16.

    Texts have `length` tokens; speech encoders ignore `length`. `options` are fields of the
    language model's config.

    Raises:
      InputError: The encoder is unknown, or the length is not positive.
    """
    if encoder not in ENCODERS:
        raise InputError(f"--encoder={encoder}; allowed: {', '.join(ENCODERS)}")
    if length < 1:
        raise InputError(f"--sequence={length}; allowed: 1 or more")
    return ENCODERS[encoder](length, dtype="bfloat16", param_dtype="bfloat16", **options)


def step_functions(tuning: Tuning, template: ModelTemplate) -> tuple[Step, EvalFn]:
    """Returns the fine-tuning step and extraction, both functions of state, batch and axis name."""

    def extract(state: Any, batch: Any, axis_name: str | None) -> jax.Array:
        model = template.merge(state["params"], state["frozen"])
        return tuning.apply(model, batch).feature

    return make_train_step(tuning, template, _OPTIMIZER), extract


def initialize(tuning: Tuning) -> tuple[Any, Any]:
    """Returns the model's template and the initial training state."""
    trainable = nnx.Any(nnx.LoRAParam, nnx.All(nnx.Param, nnx.PathContains("head")))
    return initial_state(tuning, _OPTIMIZER, seed=0, trainable=trainable)


def model_flops(encoder: str, length: int) -> dict[str, float]:
    """Returns the FLOPs of fine-tuning and extraction for one utterance, without recomputation."""
    tuning = make_tuning(encoder, length, remat="none")
    template, state = aot.abstract_state(lambda: initialize(tuning))
    batch = abstract_batch(tuning, 1)
    return {
        name: program_flops(jax.make_jaxpr(function, static_argnums=2)(state, batch, None).jaxpr)
        for name, function in zip(
            (FINE_TUNING, EXTRACTION), step_functions(tuning, template), strict=True
        )
    }


def abstract_batch(tuning: Tuning, num_rows: int) -> Any:
    """Returns the shape and dtype of each array in a batch."""
    return {
        name: jax.ShapeDtypeStruct((num_rows, *value.shape[1:]), value.dtype)
        for name, value in tuning.batch(1).items()
    }


def compile_programs(
    tuning: Tuning, partitioner: JitPartitioner
) -> dict[str, tuple[CompiledStep, Any]]:
    """Returns both programs by name, each with the shapes of its input state."""
    template, state = aot.abstract_state(lambda: initialize(tuning))
    step, extract = step_functions(tuning, template)
    return {
        FINE_TUNING: (partitioner.compile_step(step), state),
        EXTRACTION: (partitioner.compile_eval(extract), _model_state(state)),
    }


def _model_state(state: Any) -> Any:
    return {name: state[name] for name in ("params", "frozen")}


def make_partitioner(devices: Sequence[jax.Device], model_parallelism: int) -> JitPartitioner:
    """Makes the partitioner of an encoder.

    `model_parallelism` is the number of devices that work on the same rows together.

    Raises:
      InputError: `model_parallelism` does not divide the number of devices.
    """
    if model_parallelism < 1 or len(devices) % model_parallelism:
        raise InputError(
            f"--model_parallelism={model_parallelism}; allowed: divisors of the {len(devices)} "
            "devices"
        )
    return JitPartitioner(data_mesh(model_parallelism, devices), ENCODER_SHARDING_RULES)


def _rows_per_device(tuning: Tuning, rows: int) -> int:
    if rows < 0:
        raise InputError(f"--rows={rows}; allowed: 1 or more, or 0 for {tuning.default_rows}")
    return rows or tuning.default_rows


def compile_for_tpus(
    encoder: str,
    names: str,
    *,
    length: int = 128,
    rows: int = 0,
    remat: Remat = "full",
    model_parallelism: int = 1,
    log: aot.Log = lambda line: None,
) -> dict[str, list[Row]]:
    """Compiles the fine-tuning step and the extraction for TPUs.

    Each chip stores a part of every kernel, and layers gather their kernels (FSDP). With model
    parallelism, each chip in a group uses a part of a layer's kernels, and the chips exchange
    activations.

    Args:
      encoder: Key of `ENCODERS`.
      names: Topologies; see `aot.tpu_topologies`.
      length: Number of tokens per text.
      rows: Number of rows per device; 0 for the encoder's default.
      remat: Rematerialization in the language model; see `mister_jax.nn.ScannedLayers`.
      model_parallelism: Number of chips that work on the same rows together.
      log: Function called with a message before each compilation.

    Returns:
      Rows by program, with one row per topology; see `aot.compile_ahead`.

    Raises:
      InputError: An argument is not allowed, libtpu is missing, or a program does not compile.
    """
    tuning = make_tuning(encoder, length, remat=remat)
    rows_per_device = _rows_per_device(tuning, rows)
    flops = model_flops(encoder, length)
    tables: dict[str, list[Row]] = {name: [] for name in flops}
    for topology, devices in aot.tpu_topologies(names).items():
        partitioner = make_partitioner(devices, model_parallelism)
        num_rows = rows_per_device * len(devices)
        batch = abstract_batch(tuning, num_rows)
        mesh = " x ".join(map(str, partitioner.mesh.shape.values()))
        for what, (program, state) in compile_programs(tuning, partitioner).items():
            log(f"compiling for {topology}: {what} of {encoder}, {num_rows} rows")
            row: Row = {
                "topology": topology,
                "encoder": encoder,
                "data_x_model": mesh,
                "rows": num_rows,
                "remat": remat,
            }
            row |= aot.compile_ahead(partitioner, program, state, batch, num_rows * flops[what])
            if "predicted_ms" in row:
                row["utterances_per_second"] = num_rows / row["predicted_ms"] * 1e3
            tables[what].append(row)
    for table in tables.values():
        aot.add_scaling_efficiency(table)
    return {f"{what}, {PREDICTED}": table for what, table in tables.items()}


def measure_encoder(
    encoder: str, *, length: int = 128, rows: int = 0, remat: Remat = "full", steps: int = 3
) -> list[Row]:
    """Times both programs of `compile_for_tpus` with random parameters on this machine.

    Raises:
      InputError: An argument is not allowed, or the devices run out of memory.
    """
    tuning = make_tuning(encoder, length, remat=remat)
    flops = model_flops(encoder, length)
    num_rows = _rows_per_device(tuning, rows) * jax.device_count()
    partitioner = make_partitioner(jax.devices(), 1)
    programs = compile_programs(tuning, partitioner)
    tune, state_shapes = programs[FINE_TUNING]
    extract, _ = programs[EXTRACTION]
    state_shardings = shardings(state_shapes, partitioner.mesh, partitioner.rules)
    with explain_oom(encoder, f"batches of {num_rows} rows", "a smaller --rows"):
        batch = partitioner.put_batch(tuning.batch(num_rows))
        # Under jit, each device creates only its part of the state.
        state = jax.jit(lambda: initialize(tuning)[1], out_shardings=state_shardings)()

        def tuning_step() -> Any:
            nonlocal state
            state, metrics = tune(state, batch)
            return metrics

        runs = {
            EXTRACTION: repeated(lambda: extract(_model_state(state), batch)),
            FINE_TUNING: repeated(tuning_step),
        }
        device, num_devices = jax.devices()[0], jax.device_count()
        chip = aot.CHIPS.get(device.device_kind)
        table = []
        for what, run in runs.items():
            timing = time_runs({what: run}, steps)[what]
            peak_memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
            flops_per_device = num_rows * flops[what] / num_devices
            table.append(
                {
                    "what": what,
                    "encoder": encoder,
                    "device_kind": device.device_kind,
                    "devices": num_devices,
                    "rows": num_rows,
                    "compile_s": timing.compile_seconds,
                    "median_ms": timing.median * 1e3,
                    "utterances_per_second": num_rows / timing.median,
                    "model_gflop_per_device": flops_per_device / 1e9,
                    "utilization": chip and flops_per_device / timing.median / chip.flops,
                    "peak_memory_mib_per_device": peak_memory and peak_memory / 2**20,
                }
            )
    return table
