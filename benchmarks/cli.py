"""Measures speed and memory, and compares training recipes.

MiSTER-E on dialogues:

    mister-jax benchmark --parts
    mister-jax benchmark --lengths=iemocap --steps=2 --torch
    mister-jax benchmark --aot=v5e:2x2,4x4,8x8    # compiles for TPUs that this machine lacks

A large utterance encoder at full size, its LoRA fine-tuning step and extraction:

    mister-jax benchmark --encoder=llama_3_1_8b --aot=v5e:2x4
    mister-jax benchmark --encoder=llama_3_1_8b --random    # on this machine, random parameters

Extraction with an encoder's weights, and the preparation of recordings:

    mister-jax benchmark --encoder=FOLDER --throughput --torch --onnx
    mister-jax benchmark --prepare=5000

The prediction of a recording, with utterances from a transcript and from voice activity detection:

    mister-jax benchmark --recording=call.wav --model=RUN --repeat=100

A complete training run with the default recipe, from the start of the command to the test score:

    mister-jax benchmark --training=DATASET --torch

Compares training recipes by cross-validation (see `benchmarks.recipes`):

    mister-jax benchmark --set=DATASET@dialogue:5 --recipe=default --recipe="wide: FIELD=VALUE"
        --num_seeds=3 --workdir=DIR
"""

import os
import signal
from typing import Any, get_args

import jax
from absl import flags
from rich.console import Console

from benchmarks import encoders, fusion, parts, preparation, recipes, recordings, training
from benchmarks.config import PRESETS, BenchmarkConfig, select_devices
from benchmarks.dialogues import LENGTHS
from benchmarks.measure import matmul_peak
from benchmarks.report import PREDICTED, Report, Row, environment
from mister_jax.console import output_console
from mister_jax.errors import InputError
from mister_jax.nn.scanned_layers import Remat

_DEFAULT = BenchmarkConfig()


def _define_positive(name: str, help_text: str) -> flags.FlagHolder[int]:
    return flags.DEFINE_integer(name, getattr(_DEFAULT, name), help_text, lower_bound=1)


_CONFIG_FLAGS = (
    flags.DEFINE_enum("preset", _DEFAULT.preset, list(PRESETS), "sizes of MiSTER-E"),
    _define_positive("speech_dim", "size of the speech vectors"),
    _define_positive("text_dim", "size of the text vectors"),
    _define_positive("batch_size", "dialogues per batch"),
    _define_positive("length", "utterances per dialogue"),
    flags.DEFINE_enum("dtype", _DEFAULT.dtype, ["float32", "bfloat16"], "type of the computation"),
    _define_positive("devices", "devices that share a batch"),
    flags.DEFINE_enum("backend", _DEFAULT.backend, ["jit", "pmap"], "how devices share a batch"),
    _define_positive("steps", "timed runs or epochs"),
)
_LENGTHS = flags.DEFINE_enum(
    "lengths", None, list(LENGTHS), "measure an epoch with the dialogue lengths of a corpus"
)
_PARTS = flags.DEFINE_bool("parts", False, "measure the parts of the training step")
_TORCH = flags.DEFINE_bool("torch", False, "compare with PyTorch")
_ONNX = flags.DEFINE_bool("onnx", False, "compare --throughput of a text encoder with ONNX Runtime")
_AOT = flags.DEFINE_string("aot", None, "TPU topologies to compile for, such as v5e:2x2,4x4")
_ENCODER = flags.DEFINE_string(
    "encoder",
    None,
    f"encoder to measure: {', '.join(encoders.ENCODERS)}; with --throughput, a folder or a name on "
    "the Hugging Face Hub",
)
_SEQUENCE = flags.DEFINE_integer("sequence", 128, "tokens per text for --encoder")
_ROWS = flags.DEFINE_integer(
    "rows", 0, "utterances per device for --encoder; 0: the encoder's default"
)
_REMAT = flags.DEFINE_enum(
    "remat", "full", get_args(Remat), "activations that --encoder recomputes, see nn.ScannedLayers"
)
_MODEL_PARALLELISM = flags.DEFINE_integer(
    "model_parallelism", 1, "chips that work on the same rows together, for --encoder with --aot"
)
_RANDOM = flags.DEFINE_bool("random", False, "run --encoder with random parameters")
_THROUGHPUT = flags.DEFINE_bool("throughput", False, "measure extraction with --encoder")
_TEXTS = flags.DEFINE_string(
    "texts", None, "file for --throughput with one text per line; random texts by default"
)
_PREPARE = flags.DEFINE_integer(
    "prepare", None, "measure the preparation of a corpus with this number of utterances"
)
_TRAINING = flags.DEFINE_string(
    "training", None, "measure a complete training run on this feature dataset"
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "directory of the datasets of --training and --set; by default TFDS's"
)
_RECORDING = flags.DEFINE_string(
    "recording", None, "measure the prediction of this recording; needs --model"
)
_MODEL = flags.DEFINE_string(
    "model", None, "work directory or bundle of the model that predicts --recording"
)
_TRANSCRIPT = flags.DEFINE_string(
    "transcript", None, "transcript of --recording; by default, one beside the recording"
)
_REFERENCE = flags.DEFINE_string(
    "reference", None, "RTTM with the speech of --recording; by default, one beside the recording"
)
_REPEAT = flags.DEFINE_integer(
    "repeat", 1, "number of copies of --recording to concatenate", lower_bound=1
)
_SETS = flags.DEFINE_multi_string(
    "set",
    [],
    "DATASET@FOLDS on which recipes are cross-validated, or DATASET@test for its test split; repeat"
    " it for more datasets",
)
_RECIPES = flags.DEFINE_multi_string(
    "recipe",
    ["default"],
    "recipe, as NAME or 'NAME: VARIANT FIELD=VALUE ...', with changes to the default config; the "
    "other recipes are compared with the first recipe",
)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 1, "seeds of each recipe", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of --set")
_JSON = flags.DEFINE_string("json", None, "JSON file to write")

_OF_RECORDING = (_MODEL, _TRANSCRIPT, _REFERENCE, _REPEAT)
_OF_SETS = (_RECIPES, _NUM_SEEDS, _WORKDIR)
_ENCODER_MODES = (_AOT, _RANDOM, _THROUGHPUT)


def main() -> int:
    """Runs the selected benchmark and returns the exit status.

    The status is 1 if a program does not fit into a TPU's memory, and 143 if SIGTERM stopped the
    comparison of recipes.
    """
    if _SETS.value:
        return _compare_recipes()
    for flag in _OF_SETS:
        if flag.present:
            raise InputError(f"--{flag.name} needs --set=DATASET@FOLDS")
    # Compile times are measured, so no program may come from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    fields: dict[str, Any] = {flag.name: flag.value for flag in _CONFIG_FLAGS}
    config = BenchmarkConfig(**fields)
    if _AOT.value:
        jax.config.update("jax_platforms", "cpu")
    if config.devices > 1:
        jax.config.update("jax_num_cpu_devices", config.devices)
    if _TORCH.value:
        # JAX must not preallocate accelerator memory, because PyTorch needs this memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sections = _measure(config)
    others = (_ENCODER, _PREPARE, _TRAINING, _RECORDING)
    settings = {} if any(flag.value for flag in others) else fields
    own_flags = flags.FLAGS.flags_by_module_dict()[__name__]
    settings |= {flag.name: flag.value for flag in own_flags if flag.present}
    report = Report(settings, environment(), sections)
    console = output_console()
    for table in report.tables(console.width):
        console.print(table)
    if _JSON.value:
        report.write(_JSON.value)
    return 0 if report.fits else 1


def _compare_recipes() -> int:
    if not _WORKDIR.value:
        raise InputError("--set needs --workdir=DIR; it is created if it does not exist")
    result = recipes.compare_recipes(
        [recipes.FoldedSet.parse(text) for text in _SETS.value],
        [recipes.Recipe.parse(text) for text in _RECIPES.value],
        _WORKDIR.value,
        data_dir=_DATA_DIR.value or "",
        num_seeds=_NUM_SEEDS.value,
    )
    if result is None:
        return 128 + signal.SIGTERM
    for table in recipes.tables(result):
        output_console().print(table)
    print(f"written to {_WORKDIR.value}: {', '.join(recipes.FILES)}")
    return 0


def _measure(config: BenchmarkConfig) -> dict[str, list[Row]]:
    """Runs the selected benchmark and returns its rows by title."""
    log = Console(stderr=True, highlight=False).print
    if _ONNX.value and not _THROUGHPUT.value:
        raise InputError("--onnx needs --encoder=FOLDER --throughput")
    if _DATA_DIR.value and not _TRAINING.value:
        raise InputError(f"--data_dir={_DATA_DIR.value} needs --training or --set")
    for flag in _OF_RECORDING:
        if flag.present and not _RECORDING.value:
            raise InputError(f"--{flag.name}={flag.value} needs --recording=FILE")
    if _RECORDING.value:
        if not _MODEL.value:
            raise InputError(f"--recording={_RECORDING.value} needs --model=RUN")
        rows = recordings.measure_recording(
            _RECORDING.value,
            _MODEL.value,
            transcript=_TRANSCRIPT.value,
            reference=_REFERENCE.value,
            repeat=_REPEAT.value,
            log=log,
        )
        return {"recording": rows}
    if _TRAINING.value:
        rows = training.measure_training(
            _TRAINING.value, _DATA_DIR.value, compare=_TORCH.value, log=log
        )
        return {"training": rows}
    if _PREPARE.value is not None:
        return {"preparation": preparation.measure_preparation(_PREPARE.value, log=log)}
    if not _ENCODER.value:
        return measure_fusion(
            config,
            lengths=_LENGTHS.value,
            parts_alone=_PARTS.value,
            compare=_TORCH.value,
            topologies=_AOT.value,
            log=log,
        )
    if sum(bool(flag.value) for flag in _ENCODER_MODES) != 1:
        names = ", ".join(f"--{flag.name}" for flag in _ENCODER_MODES)
        raise InputError(f"--encoder={_ENCODER.value} needs one of {names}")
    batch: dict[str, Any] = {"length": _SEQUENCE.value, "rows": _ROWS.value, "remat": _REMAT.value}
    if _AOT.value:
        batch["model_parallelism"] = _MODEL_PARALLELISM.value
        return encoders.compile_for_tpus(_ENCODER.value, _AOT.value, **batch, log=log)
    if _RANDOM.value:
        rows = encoders.measure_encoder(_ENCODER.value, **batch, steps=config.steps)
        return {"encoder": rows}
    from benchmarks import extraction  # Slow: it imports the Hugging Face libraries.

    rows = extraction.measure_extraction(
        _ENCODER.value,
        extraction.read_texts(_TEXTS.value) if _TEXTS.value else (),
        max_tokens=_SEQUENCE.value,
        dtype=config.dtype,
        compare=_TORCH.value,
        onnx=_ONNX.value,
        rounds=config.steps,
        log=log,
    )
    return {"extraction": rows}


def measure_fusion(
    config: BenchmarkConfig,
    *,
    lengths: str | None = None,
    parts_alone: bool = False,
    compare: bool = False,
    topologies: str | None = None,
    log: fusion.aot.Log = lambda line: None,
) -> dict[str, list[Row]]:
    """Measures MiSTER-E, by default inference and a training step, and returns rows by title.

    Args:
      config: Model, batch and devices.
      lengths: Key of `LENGTHS`, to measure an epoch.
      parts_alone: Whether to measure the parts of a training step.
      compare: Whether to also measure PyTorch.
      topologies: TPU topologies to compile for; see `aot.tpu_topologies`. Cannot be combined with
        `lengths`, `parts_alone` or `compare`.
      log: Function called with a message before each long step.

    Raises:
      InputError: The options exclude each other, or this machine lacks devices or packages.
    """
    if topologies and (lengths or parts_alone or compare):
        raise InputError(f"--aot={topologies} excludes --lengths, --parts and --torch")
    if topologies:
        rows = fusion.compile_for_tpus(config, topologies, log)
        return {f"training step, {PREDICTED}": rows}
    select_devices(config)  # Raises an error at once if there are too few devices.
    peak = matmul_peak(config)
    sections: dict[str, list[Row]] = {}
    if lengths:
        sections["epoch"] = fusion.measure_epoch(config, LENGTHS[lengths](), peak, compare)
    if parts_alone:
        sections["parts"] = parts.measure_parts(config, peak)
    return sections or {"steps": fusion.measure_steps(config, peak, compare)}
