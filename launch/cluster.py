"""The flags of a command that several processes run together, and how they find each other.

Each process runs the same command with the same flags. Cloud TPU, GKE, Slurm and Open MPI tell a
process who it is, so there `--distributed` is enough; elsewhere flags or the environment tell it:

    python -m launch.train ... --distributed --coordinator=HOST:PORT --num_processes=2 --process_id=0
    JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 \
        python -m launch.train ... --distributed
"""

import faulthandler
import os
import re
import signal
import socket
import sys
import time

import jax
from absl import flags

from mister_jax.errors import InputError

_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of several processes of a job")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, a free port")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "of the job", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "of this process", lower_bound=0)
_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "seconds to wait for the other processes", lower_bound=1
)
_BY_HAND = {
    "coordinator": (_COORDINATOR, "JAX_COORDINATOR_ADDRESS"),
    "num_processes": (_NUM_PROCESSES, "JAX_NUM_PROCESSES"),
    "process_id": (_PROCESS_ID, "JAX_PROCESS_ID"),
}

HEARTBEAT_TIMEOUT = 30
"""Seconds of silence after which a process counts as dead, and all others end."""

PARTING_TIMEOUT = 20
"""Seconds that a process which ends waits for the others to end, too."""


def join(*, saves_on_sigterm: bool = False) -> None:
    """Meets the other processes of the job; to be called before JAX is used.

    Without `--distributed` it does nothing. Only the first process writes to stdout afterwards.

    Args:
      saves_on_sigterm: the command stops all processes after the same step when one of them gets
        SIGTERM; else the signal ends the process that gets it.

    Raises:
      InputError: flags that do not go together, no cluster, or processes that do not meet.
    """
    given = _given()
    if not _DISTRIBUTED.value:
        alone = [name for name, (flag, _) in _BY_HAND.items() if flag.value is not None]
        if alone:
            raise InputError(f"--{alone[0]} goes with --distributed")
        return
    missing = [f"--{name}" for name in _BY_HAND if name not in given]
    if given and missing:
        raise InputError(
            f"--distributed: {', '.join(missing)} not given; allowed are all of "
            f"{', '.join(f'--{name}' for name in _BY_HAND)}, or none in a cluster that JAX knows"
        )
