"""Writes training metrics to `metrics.jsonl` and TensorBoard event files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
from etils import epath

from mister_jax.io import write_text


class MetricWriter:
    """Appends scalars to `metrics.jsonl` and a TensorBoard event file in the work directory.

    Only process 0 writes. A resumed run repeats the steps after its checkpoint, so their old values
    are removed from `metrics.jsonl` and hidden in TensorBoard.

    Args:
      workdir: Work directory of the training run.
      step: Step of the checkpoint that the run resumes from; 0 for a new run.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._tensorboard = None
        if jax.process_index() == 0:
            lines = [line for line in self._read_lines() if _step_of_line(line) <= step]
            write_text(self._path, "".join(f"{line}\n" for line in lines))
            self._tensorboard = _summary_writer(workdir, purge_step=step + 1)

    def __call__(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of one step."""
        if self._tensorboard is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _read_lines(self) -> Iterable[str]:
        if not self._path.exists():
            return []
        # If the run was killed, the last line may be cut off, even within a UTF-8 character.
        return self._path.read_bytes().decode(errors="replace").split("\n")


def _step_of_line(line: str) -> float:
    """Returns the step in a line of `metrics.jsonl`, or infinity if the line is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError):
        return math.inf


def _summary_writer(workdir: epath.PathLike, purge_step: int) -> Any:
    # If PyTorch is installed, tensorboardX imports it, which takes seconds.
    from tensorboardX import SummaryWriter, record_writer

    # For gs:// paths, tensorboardX needs google-cloud-storage. epath, which writes all other files
    # of a run, does not.
    bucket = SimpleNamespace(open=_BucketEvents, directory_check=lambda path: None)
    record_writer.register_writer_factory("gs", bucket)
    return SummaryWriter(os.fspath(workdir), purge_step=purge_step)


class _BucketEvents:
    """Event file in a bucket; each flush uploads the whole file, because buckets cannot append."""

    def __init__(self, path: str):
        self._path = epath.Path(path)
        self._events = bytearray()

    def write(self, events: bytes) -> None:
        self._events += events

    def flush(self) -> None:
        self._path.write_bytes(bytes(self._events))

    close = flush
