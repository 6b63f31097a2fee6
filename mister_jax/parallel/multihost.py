"""Agreement between the processes of a job."""

from __future__ import annotations

import itertools
import threading

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mister_jax.errors import InputError

_num_calls = itertools.count(1)
"""Number of the next call of `should_stop` in this process."""


def assert_visible_to_all_processes(path: epath.PathLike) -> None:
    """Checks that all processes see a file the first process has written; each must call this.

    Args:
      path: File written by the first process.

    Raises:
      InputError: Some process does not see the file. All processes raise it.
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


def should_stop(stop_event: threading.Event) -> bool:
    """Returns whether training stops after this step; the result is the same in all processes.

    A SIGTERM to one of several processes stops all of them after the same step. All processes call
    this function after every step.
    """
    # JAX stops at the number after the last one that it has seen, which is 0 before the first call.
    # Steps of a resumed run do not start at 1, so they would never match after an early SIGTERM.
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_num_calls)):
        stop_event.set()
    return stop_event.is_set()
