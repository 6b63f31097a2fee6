r"""Defines the flags and start-up of commands that run as several processes.

Every process runs the same command with the same flags. On Cloud TPU, GKE, Slurm and Open MPI, JAX
detects the other processes, so `--distributed` is enough. Otherwise, flags or environment variables
describe the job:

    mister-jax train ... --distributed --coordinator=HOST:PORT --num_processes=2 \
      --process_id=0
    JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 \
      mister-jax train ... --distributed
"""

import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from absl import flags

from mister_jax.cli.rendezvous import Process, log_while_waiting, wait_for_all_processes
from mister_jax.errors import InputError

_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "run as one process of a multi-process job")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, with a free port of that host"
)
_NUM_PROCESSES = flags.DEFINE_string("num_processes", None, "number of processes in the job")
_PROCESS_ID = flags.DEFINE_string("process_id", None, "index of this process, from 0")
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "seconds to wait for the other processes at start-up", lower_bound=1
)
_JOB_FLAGS = {
    "JAX_COORDINATOR_ADDRESS": _COORDINATOR,
    "JAX_NUM_PROCESSES": _NUM_PROCESSES,
    "JAX_PROCESS_ID": _PROCESS_ID,
}
_JOB_FLAG_NAMES = ", ".join(f"--{flag.name}" for flag in _JOB_FLAGS.values())

HEARTBEAT_TIMEOUT = 40
"""If a process sends no heartbeat for this many seconds, JAX ends the other processes."""

# A finished process waits up to this many seconds for process 0, which may still be writing.
_SHUTDOWN_TIMEOUT = 3600


def distributed(
    main: Callable[[], int | None], *, saves_on_sigterm: bool = False
) -> Callable[[], int | None]:
    """Wraps a command's `main` so that it supports `--distributed`.

    A failed process exits immediately, and JAX ends the other processes after `HEARTBEAT_TIMEOUT`.
    Without the immediate exit, JAX would make the failed process wait for the other processes,
    which in turn wait for the failed process. Set `saves_on_sigterm` if `main` asks JAX whether any
    process received SIGTERM. Otherwise, SIGTERM ends the process that receives the signal.
    """

    def distributed_main() -> int | None:
        initialize(saves_on_sigterm=saves_on_sigterm)
        if not _DISTRIBUTED.value:
            return main()
        import jax

        process = f"process {jax.process_index()} of {jax.process_count()}"
        try:
            status = main() or 0
            jax.distributed.shutdown()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except BaseException:
            traceback.print_exc()
            print(f"error: {process} failed; start the job again to resume", file=sys.stderr)
            status = 1
        if status in (1, 2):
            sys.stdout.flush()
            sys.stderr.flush()
            if jax.process_index() == 0:
                # Process 0 runs JAX's coordinator. Without the coordinator, JAX ends the other
                # processes before they can print their own errors.
                time.sleep(2)
            os._exit(status)
        return status

    return distributed_main


def initialize(*, saves_on_sigterm: bool = False) -> None:
    """Connects to the other processes of the job. Call this function before any JAX computation.

    This function does nothing without `--distributed`. After this call, only process 0 writes to
    stdout.

    Raises:
      InputError: The flags are incomplete or contradict each other, JAX detects no cluster, or a
        process does not connect in time.
    """
    if not _DISTRIBUTED.value:
        job_flags = [flag.name for flag in _JOB_FLAGS.values() if flag.value is not None]
        if job_flags:
            raise InputError(f"--{job_flags[0]} requires --distributed")
        return
    import jax

    process, timeout = _process_from_flags(), _START_TIMEOUT.value
    job: dict[str, Any] = {}
    if process is not None:
        wait_for_all_processes(process, timeout)
        job = {
            "coordinator_address": f"{process.host}:{process.port}",
            "num_processes": process.num_processes,
            "process_id": process.process_id,
        }
    jax.config.update("jax_enable_preemption_service", saves_on_sigterm)
    # When another process fails, JAX prints a line and calls abort(). Without the next statement,
    # Python would then print the stack traces of all threads, which would hide that line.
    faulthandler.disable()
    try:
        # On a cluster that JAX detects, this process does not know which processes are missing.
        with log_while_waiting(lambda: "waiting for the other processes of the job"):
            jax.distributed.initialize(
                **job,
                initialization_timeout=timeout,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
            )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--distributed: cannot start ({reason}); run on Cloud TPU, GKE, Slurm or Open MPI, or "
            f"pass {_JOB_FLAG_NAMES}"
        ) from error
    if jax.process_index() != 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _process_from_flags() -> Process | None:
    """Returns the process that the flags or the environment describe, or None if neither does."""
    values = [
        flag.value if flag.value is not None else os.environ.get(variable, "")
        for variable, flag in _JOB_FLAGS.items()
    ]
    if not any(values):
        return None
    if not all(values):
        raise InputError(
            f"--distributed: pass all of {_JOB_FLAG_NAMES}; they can be omitted only on a cluster "
            "that JAX detects"
        )
    host, _, port = values[0].rpartition(":")
    if not host or not all(value.isdigit() for value in (port, *values[1:])):
        raise InputError(
            f"{_JOB_FLAG_NAMES}: {', '.join(values)}; allowed: HOST:PORT and two integers"
        )
    process = Process(host, int(port), int(values[1]), int(values[2]))
    if not 0 < process.port < 2**16:
        raise InputError(f"--coordinator={values[0]}; allowed: ports from 1 to {2**16 - 1}")
    if not process.num_processes:
        raise InputError("--num_processes=0; allowed: at least 1")
    if process.process_id >= process.num_processes:
        raise InputError(
            f"--process_id={process.process_id}; allowed: 0 to {process.num_processes - 1}, less "
            "than --num_processes"
        )
    return process
