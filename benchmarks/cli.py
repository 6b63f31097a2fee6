"""Measures speed and memory on made-up data; needs no dataset.

MiSTER-E on dialogues:

    python -m launch.benchmark --parts
    python -m launch.benchmark --lengths=iemocap --steps=2 --torch
    python -m launch.benchmark --aot=v5e:2x2,4x4,8x8    # compiles for TPUs that are not there

An utterance encoder of full size: a step of LoRA fine-tuning, and extraction:

    python -m launch.benchmark --encoder=llama_3_1_8b --aot=v5e:2x4
    python -m launch.benchmark --encoder=llama_3_1_8b --random    # here, with random parameters

From texts, or clips, to features with an encoder's weights, and the preparation of recordings:

    python -m launch.benchmark --encoder=FOLDER --throughput --torch
    python -m launch.benchmark --prepare=5000
"""

import os
from typing import Any

import jax
from absl import flags
from rich.console import Console

from benchmarks import (
    LENGTHS,
    PRESETS,
    BenchmarkConfig,
    Report,
    benchmark,
    encoders,
    preparation,
)
from benchmarks.report import report_of
from mister_jax.errors import InputError

_DEFAULT = BenchmarkConfig()
_DEVICES = flags.DEFINE_integer("devices", _DEFAULT.devices, "to spread a batch over")
_CONFIG = (
    _DEVICES,
    flags.DEFINE_string("preset", _DEFAULT.preset, f"sizes: {', '.join(PRESETS)}"),
    flags.DEFINE_integer("speech_dim", _DEFAULT.speech_dim, "of the speech vectors"),
    flags.DEFINE_integer("text_dim", _DEFAULT.text_dim, "of the text vectors"),
    flags.DEFINE_integer("batch_size", _DEFAULT.batch_size, "dialogues in a batch"),
    flags.DEFINE_integer("length", _DEFAULT.length, "utterances of a dialogue"),
    flags.DEFINE_string("dtype", _DEFAULT.dtype, "float32 or bfloat16"),
    flags.DEFINE_string("precision", _DEFAULT.precision, "of products: default or highest"),
    flags.DEFINE_string("backend", _DEFAULT.backend, "jit or pmap"),
    flags.DEFINE_integer("steps", _DEFAULT.steps, "timed runs or epochs"),
)
_LENGTHS = flags.DEFINE_string("lengths", "", f"an epoch of dialogues like: {', '.join(LENGTHS)}")
_PARTS = flags.DEFINE_bool("parts", False, "the parts of the training step, each alone")
_TORCH = flags.DEFINE_bool("torch", False, "compare with PyTorch")
_AOT = flags.DEFINE_string("aot", "", "TPU topologies to compile for, such as v5e:2x2,4x4")
_ENCODER = flags.DEFINE_string(
    "encoder", "", f"{', '.join(encoders.ENCODERS)}; with --throughput a folder or a name"
)
_SEQUENCE = flags.DEFINE_integer("sequence", 128, "tokens of a text for --encoder")
_ROWS = flags.DEFINE_integer(
    "rows", 0, "for --encoder: utterances in a batch, a device; 0 for a good number"
)
_MODEL_PARALLELISM = flags.DEFINE_integer(
    "model_parallelism", 1, "chips that share their rows, for --encoder with --aot"
)
_RANDOM = flags.DEFINE_bool("random", False, "run --encoder with random parameters")
_THROUGHPUT = flags.DEFINE_bool("throughput", False, "from utterances to features with --encoder")
_TEXTS = flags.DEFINE_string("texts", "", "file for --throughput, a text a line; else random ones")
_PREPARE = flags.DEFINE_integer("prepare", 0, "utterances of a corpus that launch.prepare reads")
_JSON = flags.DEFINE_string("json", "", "file to write everything to")
_MODES = (_AOT, _RANDOM, _THROUGHPUT)


def main() -> int:
    jax.config.update("jax_enable_compilation_cache", False)  # how long it takes is told
    if _AOT.value:
        jax.config.update("jax_platforms", "cpu")
    if _DEVICES.value > 1:
        jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    if _TORCH.value:
        # Both share an accelerator's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    report = _report()
    for table in report.tables():
        Console().print(table)
    if _JSON.value:
        report.write(_JSON.value)
    return 0 if report.fits else 1


def _report() -> Report:
    options: dict[str, Any] = {flag.name: flag.value for flag in _CONFIG}
    tell = Console(stderr=True, highlight=False).print
    if _PREPARE.value:
        rows = preparation.preparation_rows(_PREPARE.value, tell=tell)
        return report_of({"prepare": _PREPARE.value}, {"preparation": rows})
    if not _ENCODER.value:
        choice: dict[str, Any] = {"lengths": _LENGTHS.value, "parts": _PARTS.value}
        choice |= {"compare": _TORCH.value, "topologies": _AOT.value, "tell": tell}
        return benchmark(BenchmarkConfig(**options), **choice)
    if sum(bool(flag.value) for flag in _MODES) != 1:
        names = ", ".join(f"--{flag.name}" for flag in _MODES)
        raise InputError(f"--encoder={_ENCODER.value} goes with one of {names}")
    batch = {"length": _SEQUENCE.value, "rows": _ROWS.value}
    settings = {"encoder": _ENCODER.value, "topologies": _AOT.value, **batch}
    if _AOT.value:
        batch |= {"model_parallelism": _MODEL_PARALLELISM.value}
        found = encoders.predict(_ENCODER.value, _AOT.value, **batch, tell=tell)
    elif _RANDOM.value:
        found = {"encoder": encoders.run(_ENCODER.value, **batch, steps=options["steps"])}
    else:
        found = {"extraction": _throughput(options, tell)}
    return report_of(settings, found, compare=_TORCH.value)


def _throughput(options: dict[str, Any], tell: Any) -> list[dict[str, Any]]:
    # Needs the libraries that extraction needs; the rest of this command does not.
    from benchmarks import throughput

    return throughput.throughput_rows(
        _ENCODER.value,
        throughput.read_texts(_TEXTS.value) if _TEXTS.value else (),
        max_tokens=_SEQUENCE.value,
        dtype=options["dtype"],
        compare=_TORCH.value,
        rounds=options["steps"],
        tell=tell,
    )
