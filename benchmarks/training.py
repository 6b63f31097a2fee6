"""Measures a complete training run, from the start of the command to the test score.

This library runs `mister-jax train --evaluate=test`. PyTorch runs `benchmarks/torch_training.py`,
with its default number of threads and with one thread. PyTorch's threads wait for each other after
every operation, so one thread can be faster if the model is small or other programs are running.
Runs are sequential, in new processes and with an empty compilation cache.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.measure import require_torch
from benchmarks.report import Row
from mister_jax.configs import fusion
from mister_jax.data.schema import MODALITIES, SPLITS
from mister_jax.errors import InputError
from mister_jax.losses import LossWeights
from mister_jax.tasks.fusion import FusionTask

Log = Callable[[str], None]

# Script that runs a command, and prints its times and peak memory. This process cannot measure that
# memory: until a child calls exec, it has the memory of this process, which RUSAGE_CHILDREN would
# therefore include. All processes share the clock of time.monotonic().
_RUN_AND_MEASURE = """
import json, resource, subprocess, sys, time
start = time.monotonic()
status = subprocess.call(json.loads(sys.argv[1]), stdout=subprocess.DEVNULL)
if status:
    sys.exit(status)
end = time.monotonic()
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
cpu = usage.ru_utime + usage.ru_stime
print(json.dumps({"start": start, "end": end, "cpu": cpu, "memory": usage.ru_maxrss}))
"""

# Script that runs `mister-jax train` and records when the first, middle and last step and the whole
# training ended. The script waits for the devices only at these steps. At all other steps, training
# continues before the devices have finished, so waiting would slow it down.
_TRAIN = """
import json, pathlib, sys, time
import jax
from mister_jax.cli.main import main
from mister_jax.parallel.partitioning import CompiledStep
from mister_jax.training import loop

path, num_steps = pathlib.Path(sys.argv.pop(1)), int(sys.argv.pop(1))
run_step, run_training, latest, ends = CompiledStep.__call__, loop.train, [], {}

def run_and_keep_output(self, state, batch):
    latest[:] = [run_step(self, state, batch)]
    return latest[0]

def on_step(step):
    if step in (1, num_steps // 2, num_steps):
        jax.block_until_ready(latest)
        ends[step] = time.monotonic()

def train(config, workdir):
    progress = run_training(config, workdir, on_step=on_step)
    CompiledStep.__call__ = run_step
    result = {"steps": num_steps, "ends": ends, "trained": time.monotonic()}
    path.write_text(json.dumps(result))
    return progress

CompiledStep.__call__ = run_and_keep_output
loop.train = train
main("train")
"""


def measure_training(
    dataset: str,
    data_dir: str | None = None,
    *,
    compare: bool = False,
    changes: Mapping[str, Any] | None = None,
    log: Log = lambda line: None,
) -> list[Row]:
    """Trains on a dataset of dialogue features with the default recipe, and scores the test split.

    Args:
      dataset: Name of the dataset.
      data_dir: Directory of the dataset; if None, TFDS's default directory.
      compare: Whether to also measure PyTorch.
      changes: Overrides of config fields by path, such as "train.epochs".
      log: Function called with a message before each training run.

    Returns:
      A row per run. Times are seconds since the start of the command. Steps per second are measured
      over the second half of the steps, including validation. CPU seconds are summed over threads.
      The load average covers the last minute before the command.

    Raises:
      InputError: The dataset cannot be used, PyTorch is missing, or a command fails.
    """
    if "," in dataset:
        raise InputError(f"--training={dataset}; allowed: the name of a dataset, without variants")
    if compare:
        require_torch()
        # JAX's files are already in the page cache. Without this import, PyTorch would have to read
        # its files from disk, and the comparison would favor JAX.
        importlib.import_module("torch")
    changes = {"data.data_dir": data_dir or "", **(changes or {})}
    config = fusion.get_config(dataset)
    config.update_from_flattened_dict(changes)
    task = FusionTask.from_data(config)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        log(f"training on {dataset} with mister_jax")
        rows = [_measure_jax(config, task, changes, folder)]
        if compare:
            rows += _measure_torch(config, task, folder, log)
    return rows


def _measure_jax(
    config: ConfigDict, task: FusionTask, changes: Mapping[str, Any], folder: pathlib.Path
) -> Row:
    epochs = config.train.epochs
    split = task.split("train", num_shards=jax.device_count(), shuffle=True, epochs=epochs)
    num_steps = epochs * split.steps
    times, workdir = folder / "times.json", folder / "workdir"
    command = [
        *(sys.executable, "-c", _TRAIN, str(times), str(num_steps)),
        *(f"--config=fusion:{config.data.name}", f"--workdir={workdir}", "--evaluate=test"),
        *(f"--config.{field}={value}" for field, value in changes.items()),
    ]
    run = _run(command, folder)
    result = json.loads(times.read_text())
    if str(num_steps) not in result["ends"]:
        raise InputError(f"mister-jax train ended before step {num_steps}")
    scores = json.loads((workdir / "metrics.json").read_text())
    result["weighted_f1"] = scores["test"]["weighted_f1"]
    return _row("mister_jax", config, result, run)


def _measure_torch(
    config: ConfigDict, task: FusionTask, folder: pathlib.Path, log: Log
) -> list[Row]:
    data, settings, times = (folder / name for name in ("data.npz", "torch.json", "times.json"))
    arrays: dict[str, Any] = _export(task)
    np.savez(data, **arrays)
    settings.write_text(json.dumps(torch_config(config, task)))
    script = pathlib.Path(__file__).with_name("torch_training.py")
    command = [sys.executable, *map(str, (script, settings, data, times))]
    rows = []
    for library, environment in (("torch", {}), ("torch, 1 thread", {"OMP_NUM_THREADS": "1"})):
        log(f"training on {config.data.name} with {library}")
        run = _run(command, folder, environment)
        rows.append(_row(library, config, json.loads(times.read_text()), run))
    return rows


def torch_config(config: ConfigDict, task: FusionTask) -> dict[str, Any]:
    """Returns the settings of `benchmarks/torch_training.py`, as JSON values."""
    loss = config.loss.to_dict()
    loss["weights"] = dataclasses.asdict(LossWeights(**loss["weights"]))
    return {
        "seed": config.seed,
        "epochs": config.train.epochs,
        "batch_size": config.data.batch_size,
        "model": dataclasses.asdict(task.model),
        "loss": loss,
        "optimizer": config.optimizer.to_dict(),
    }


def _export(task: FusionTask) -> dict[str, np.ndarray]:
    """Returns the standardized features and labels of all splits by "SPLIT/FIELD"."""
    arrays: dict[str, np.ndarray] = {}
    for split in SPLITS:
        features = task.features(split)
        fields = {"lengths": features.lengths, "label": features.label.astype(np.int64)}
        for modality in MODALITIES:
            values = getattr(features, modality).astype(np.float32)
            if modality in task.standardizers:
                values = task.standardizers[modality](values)
            fields[modality] = values
            fields[f"{modality}_present"] = getattr(features, f"{modality}_present")
        arrays |= {f"{split}/{name}": value for name, value in fields.items()}
    return arrays


def _run(
    command: Sequence[str],
    folder: pathlib.Path,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs a command with an empty compilation cache. Returns times, memory and load average."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        load_average = os.getloadavg()[0]
        result = subprocess.run(
            [sys.executable, "-c", _RUN_AND_MEASURE, json.dumps(command)],
            # `mister-jax` sets the same variables, but with another cache directory.
            env={
                **os.environ,
                **(environment or {}),
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "TF_USE_LEGACY_KERAS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"a training run failed: {reason}")
    return {**json.loads(result.stdout), "load_average": load_average}


def _row(
    library: str, config: ConfigDict, result: Mapping[str, Any], run: Mapping[str, Any]
) -> Row:
    num_steps, ends = result["steps"], result["ends"]
    middle = num_steps // 2
    return {
        "library": library,
        "dataset": config.data.name,
        "epochs": config.train.epochs,
        "steps": num_steps,
        "first_step_s": ends["1"] - run["start"],
        "trained_s": result["trained"] - run["start"],
        "scored_s": run["end"] - run["start"],
        "steps_per_second": (num_steps - middle) / (ends[str(num_steps)] - ends[str(middle)]),
        "cpu_s": run["cpu"],
        "peak_memory_mib": run["memory"] / (2**20 if sys.platform == "darwin" else 2**10),
        "test_weighted_f1": result["weighted_f1"],
        "load_average": run["load_average"],
    }
