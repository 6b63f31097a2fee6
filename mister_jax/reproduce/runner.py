"""Runs the stages of a reproduction in separate processes, and records their times."""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mister_jax.console import format_seconds
from mister_jax.errors import InputError
from mister_jax.io import read_json, write_json
from mister_jax.reproduce.settings import Settings
from mister_jax.reproduce.stages import Stage

RECORD = "reproduce.json"
"""File with the settings, and the seconds and hardware of each stage."""

Runner = Callable[[Sequence[str]], int]
"""Runs `mister-jax` with arguments and returns the exit status."""

STOPPED = 128 + signal.SIGTERM
"""Exit status after SIGTERM."""

# Settings that a later run may change: paths, and whether an incomplete corpus is allowed.
_MUTABLE = ("source", "workdir", "data_dir", "partial")


_MAIN = "from mister_jax.cli.main import main; main()"


class StageFailedError(InputError):
    """Raised if the command of a stage fails."""


def run_stages(
    stages: Sequence[Stage], settings: Settings, runner: Runner | None = None
) -> dict[str, Any] | None:
    """Runs all stages that are not complete.

    Args:
      stages: Stages in the order in which they run.
      settings: Settings of the reproduction.
      runner: Function that runs a command; by default, in a new process.

    Returns:
      The content of `reproduce.json`, or None if SIGTERM stopped a stage.

    Raises:
      InputError: The work directory belongs to other settings.
      StageFailedError: A stage failed.
    """
    runner = runner or run_in_process
    path = pathlib.Path(settings.workdir, RECORD)
    record = _open_record(path, settings)
    for number, stage in enumerate(stages, start=1):
        if stage.is_done():
            print(f"stage {number} of {len(stages)}, {stage.name}: complete", flush=True)
            continue
        print(f"stage {number} of {len(stages)}, {stage.name}:\n  {stage.command}", flush=True)
        start = time.perf_counter()
        try:
            status = runner(stage.arguments)
        finally:
            _record_time(record, stage, time.perf_counter() - start)
            write_json(path, record)
        if status in (STOPPED, -signal.SIGTERM):
            print(f"stopped by SIGTERM in stage {stage.name}. Run the same command to resume")
            return None
        if status != 0:
            raise StageFailedError(
                f"stage {stage.name} failed with exit status {status}: {stage.command}"
            )
        if not stage.is_done():
            raise StageFailedError(f"stage {stage.name} has not written its files: {stage.command}")
        seconds = format_seconds(record["stages"][stage.name]["seconds"])
        print(f"{stage.name} is complete after {seconds}", flush=True)
    return record


def _open_record(path: pathlib.Path, settings: Settings) -> dict[str, Any]:
    """Returns the record of the work directory, or a new record.

    Raises:
      InputError: The record belongs to other settings.
    """
    values = dataclasses.asdict(settings)
    # JSON has lists instead of tuples.
    values = {key: [*value] if isinstance(value, tuple) else value for key, value in values.items()}
    record = {"settings": values, "stages": {}}
    if path.exists():
        record = read_json(path)
        old = record["settings"]
        changes = [
            f"{key} {old.get(key)!r} -> {value!r}"
            for key, value in values.items()
            if old.get(key) != value and key not in _MUTABLE
        ]
        if changes:
            raise InputError(
                f"{path}: created with other settings ({', '.join(changes)}); use those settings, "
                "or another --workdir"
            )
        # An earlier run may have prepared an incomplete corpus.
        record["settings"] = values | {"partial": values["partial"] or old.get("partial", False)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record


def _record_time(record: dict[str, Any], stage: Stage, seconds: float) -> None:
    """Adds the run time of a stage in seconds to the record, and stores the hardware."""
    row = record["stages"].setdefault(stage.name, {"seconds": 0.0, "runs": 0})
    row["seconds"] += seconds
    row["runs"] += 1
    row["command"] = stage.command
    versions = pathlib.Path(stage.workdir, "versions.json")
    if stage.workdir and versions.exists():
        row["hardware"] = _describe_hardware(read_json(versions))


def _describe_hardware(versions: Mapping[str, Any]) -> str:
    return f"{versions['devices']} x {versions['device']}"


def run_in_process(arguments: Sequence[str]) -> int:
    """Runs `mister-jax` in a new process, and returns its exit status.

    The process releases the device and its memory when it ends. SIGTERM is passed on to the
    process, so that a training run saves its state.
    """
    command = [sys.executable, "-c", _MAIN, *arguments]
    stopped = False
    process: subprocess.Popen[bytes] | None = None

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        if process is not None:
            process.send_signal(signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        process = subprocess.Popen(command)
        if stopped:  # SIGTERM arrived before it could be passed on to the process.
            process.send_signal(signal.SIGTERM)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # A terminal sends Ctrl-C to both processes.
            raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    return STOPPED if stopped else status
