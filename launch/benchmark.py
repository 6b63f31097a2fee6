"""Measures training and inference on made-up dialogues; needs no dataset.

python -m launch.benchmark --parts
python -m launch.benchmark --lengths=iemocap --steps=2 --torch
python -m launch.benchmark --aot=v5e:2x2    # compiles for TPUs that are not there
"""

import os
from typing import Any

import jax
from absl import flags
from rich.console import Console

from launch import run
from mister_jax.benchmark import LENGTHS, PRESETS, BenchmarkConfig, benchmark

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
_AOT = flags.DEFINE_string("aot", "", "TPU topology to compile for, such as v5e:2x2")
_JSON = flags.DEFINE_string("json", "", "file to write everything to")


def main() -> int:
    options: dict[str, Any] = {flag.name: flag.value for flag in _CONFIG}
    config = BenchmarkConfig(**options)
    if _AOT.value:
        jax.config.update("jax_platforms", "cpu")
    if _DEVICES.value > 1:
        jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    if _TORCH.value:
        # Both share an accelerator's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    choice: dict[str, Any] = {"lengths": _LENGTHS.value, "parts": _PARTS.value}
    report = benchmark(config, **choice, compare=_TORCH.value, topology=_AOT.value)
    for table in report.tables():
        Console().print(table)
    if _JSON.value:
        report.write(_JSON.value)
    return 0 if report.fits else 1


if __name__ == "__main__":
    run(main)
