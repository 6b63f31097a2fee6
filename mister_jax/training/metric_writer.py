"""Writes training metrics to `metrics.jsonl` and TensorBoard event files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from mister_jax.data.lazy import tf
from mister_jax.io import write_text


class MetricWriter:
    """Appends scalars to `metrics.jsonl` and a TensorBoard event file in the work directory.

    Only process 0 writes. A resumed run repeats the steps after its checkpoint, so the old values
    of these steps are removed from `metrics.jsonl` and hidden in TensorBoard.

    Args:
      workdir: Work directory of the training run.
      step: Step of the checkpoint that the run resumes from; 0 for a new run.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._first_step = step + 1
        self._tensorboard: Any = None
        if jax.process_index() == 0:
            lines = [line for line in self._read_lines() if _step_of_line(line) <= step]
            write_text(self._path, "".join(f"{line}\n" for line in lines))

    def __call__(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of one step."""
        if jax.process_index() != 0:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        if self._tensorboard is None:  # Not in __init__: importing TensorFlow takes seconds.
            self._tensorboard = _tensorboard_writer(self._path.parent, self._first_step)
        values = [
            tf.compat.v1.Summary.Value(tag=name, simple_value=value)
            for name, value in scalars.items()
        ]
        self._tensorboard.add_summary(tf.compat.v1.Summary(value=values), step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _read_lines(self) -> Iterable[str]:
        if not self._path.exists():
            return []
        # If the run was killed, the last line may be incomplete and may end inside a UTF-8
        # character.
        return self._path.read_bytes().decode(errors="replace").split("\n")


def _step_of_line(line: str) -> float:
    """Returns the step in a line of `metrics.jsonl`, or infinity if the line is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError):
        return math.inf


def _tensorboard_writer(workdir: epath.PathLike, first_step: int) -> Any:
    """Returns a writer; TensorBoard hides the events of older files from `first_step` on.

    This TensorFlow API does not need the `tensorboard` package, and it can write to cloud buckets
    without further packages.
    """
    with tf.Graph().as_default():  # The writer cannot be created in eager mode.
        # The suffix gives different names to the files of runs that start in the same second.
        writer = tf.compat.v1.summary.FileWriter(
            os.fspath(workdir), filename_suffix=f".{first_step}"
        )
    start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
    writer.add_session_log(start, first_step)
    return writer
