"""Writes training metrics to `metrics.jsonl` and TensorBoard event files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from mister_jax.io import write_text


class _BucketEvents:
    """A file of TensorBoard events on a bucket; each flush writes it whole."""

    def __init__(self, path: str):
        self._path = epath.Path(path)
        self._events = bytearray()

    def write(self, events: bytes) -> None:
        self._events += events

    def flush(self) -> None:
        self._path.write_bytes(bytes(self._events))

    def close(self) -> None:
        self.flush()


class _Bucket:
    """Lets tensorboardX write to `gs://` without a further package."""

    open = _BucketEvents

    @staticmethod
    def directory_check(path: str) -> None:
        """Does nothing: a bucket has no directories."""


def _summary_writer(workdir: epath.PathLike, purge_step: int) -> Any:
    # Imported here: tensorboardX imports PyTorch where it is installed, which takes seconds.
    from tensorboardX import SummaryWriter, record_writer

    record_writer.register_writer_factory("gs", _Bucket())
    return SummaryWriter(os.fspath(workdir), purge_step=purge_step)


class MetricWriter:
    """Appends scalars to `workdir/metrics.jsonl` and to TensorBoard files beside it.

    Only the first process writes. A resumed run drops the lines after its checkpoint, which it
    writes again.

    Args:
      workdir: Work directory of the training.
      step: Step of the checkpoint that the run resumes from.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._board = None
        if jax.process_index() == 0:
            kept = [line for line in self._lines() if _step(line) <= step]
            write_text(self._path, "".join(f"{line}\n" for line in kept))
            self._board = _summary_writer(workdir, purge_step=step + 1)

    def __call__(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step."""
        if self._board is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._board is not None:
            self._board.close()

    def _lines(self) -> Iterable[str]:
        if not self._path.exists():
            return
        # The last one may be cut short where a run was killed, within a character, too.
        yield from self._path.read_bytes().decode(errors="replace").split("\n")


def _step(line: str) -> float:
    """Returns the step of a line of `metrics.jsonl`, infinity if the line cannot be read."""
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError):
        return math.inf
