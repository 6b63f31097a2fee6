"""Coordination of the processes of a job."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mister_jax.errors import InputError

_num_calls = itertools.count(1)
"""Number of the next call of `should_stop` in this process."""


def assert_visible_to_all_processes(path: epath.PathLike) -> None:
    """Checks that all processes can see a file; all processes must call this function.

    Args:
      path: File written by process 0.

    Raises:
      InputError: A process cannot see the file. All processes raise this error.
    """
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices(str(path))
    visible = multihost_utils.process_allgather(np.array(epath.Path(path).exists()))
    if not visible.all():
        raise InputError(
            f"{path}: not visible to process {int(visible.argmin())} of {len(visible)}; use a "
            "location that all processes share, such as gs://BUCKET/FOLDER or a network folder"
        )


@contextlib.contextmanager
def same_error_in_all_processes() -> Iterator[None]:
    """Raises the first `InputError` of any process in all processes, which must all call this."""
    message = ""
    try:
        yield
    except InputError as error:
        if jax.process_count() == 1:
            raise
        message = str(error)
    for gathered in _gather_json(message):
        if gathered:
            raise InputError(gathered)


def _gather_json(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, which must all call this function."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data))).ravel()
    padded = np.pad(data, (0, lengths.max() - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def assert_same_in_all_processes(values: Mapping[str, str]) -> None:
    """Checks that all processes of a job have the same values; all must call this function.

    Args:
      values: Values by name.

    Raises:
      InputError: A value differs. All processes raise this error.
    """
    first, *others = _gather_json(dict(values))
    for process, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise InputError(
                    f"{name} is {first.get(name)} in process 0 and {other.get(name)} in process "
                    f"{process}; start all processes with the same flags and data"
                )


def should_stop(stop_event: threading.Event) -> bool:
    """Returns whether training should stop after this step; all processes get the same result.

    A SIGTERM to one process stops all processes after the same step. All processes must call this
    function after every step.
    """
    # After a SIGTERM, JAX stops at the step number after the largest number it has seen so far, or
    # at 1 if it has seen none. The step numbers of a resumed run do not start at 1, so a SIGTERM
    # before the first step would never stop the run. A call counter avoids this problem.
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_num_calls)):
        stop_event.set()
    return stop_event.is_set()
