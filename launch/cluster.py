"""The flags of a command that several processes run together, and how they find each other.

Each process runs the same command with the same flags. Cloud TPU, GKE, Slurm and Open MPI tell a
process who it is, so there `--distributed` is enough; elsewhere flags or the environment tell it:

    python -m launch.train ... --distributed --coordinator=HOST:PORT --num_processes=2 \\
      --process_id=0
    JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 \\
      python -m launch.train ... --distributed
"""

import dataclasses
import faulthandler
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags

from mister_jax.errors import InputError

_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "this is one of several processes of a job")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, a free port of it")
_NUM_PROCESSES = flags.DEFINE_string("num_processes", None, "of the job")
_PROCESS_ID = flags.DEFINE_string("process_id", None, "of this process, from 0")
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "seconds to wait for the other processes at the start", lower_bound=1
)
_BY_HAND = {
    "JAX_COORDINATOR_ADDRESS": _COORDINATOR,
    "JAX_NUM_PROCESSES": _NUM_PROCESSES,
    "JAX_PROCESS_ID": _PROCESS_ID,
}

HEARTBEAT_TIMEOUT = 40
"""Seconds of silence after which a process counts as dead, and all others end."""

# A process that is done waits for the first one, which may still be writing.
_SHUTDOWN_TIMEOUT = 3600

_TALK = 10.0  # Seconds that one process waits for a word of another that it is connected with.

# Seconds after which a process says whom it waits for, and between two such messages.
_FIRST_MESSAGE, _NEXT_MESSAGE = 10.0, 60.0

_LAST_WORDS = (
    "has failed, or lost the others; see above, and what they print. Started again, all go on from "
    "what is saved"
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the processes of a job meet, and which of them this is."""

    host: str
    port: int
    num_processes: int
    process_id: int


def member(
    main: Callable[[], int | None], *, saves_on_sigterm: bool = False
) -> Callable[[], int | None]:
    """A script's `main` as one process of a job, if `--distributed` says so.

    A process that fails ends at once; JAX would have it wait for the others, who wait for it. They
    end when they hear no more of it.

    Args:
      main: of the script.
      saves_on_sigterm: `main` itself asks JAX whether one of the processes got SIGTERM; else the
        signal ends the process that gets it.
    """

    def of_job() -> int | None:
        join(saves_on_sigterm=saves_on_sigterm)
        if not _DISTRIBUTED.value:
            return main()
        index, count = jax.process_index(), jax.process_count()
        # JAX ends a process that has lost the others by abort(), which no Python code outlives. A
        # shell that finds its input closed says in one line what has happened.
        words = shlex.quote(f"error: process {index} of {count} {_LAST_WORDS}")
        script = f"read -r done || echo {words} >&2"
        witness = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, text=True)
        try:
            status = main() or 0
            jax.distributed.shutdown()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except BaseException:
            traceback.print_exc()
            status = 1
        if status != 1:
            witness.communicate("done\n")
        if status in (1, 2):
            sys.stdout.flush()
            sys.stderr.flush()
            if index == 0:
                time.sleep(2)  # With it all others end; they may have the same to say.
            os._exit(status)
        return status

    return of_job


def join(*, saves_on_sigterm: bool = False) -> None:
    """Meets the other processes of the job; called before anything is computed.

    Without `--distributed` it does nothing. Afterwards the first process alone writes to stdout.

    Args:
      saves_on_sigterm: see `member`.

    Raises:
      InputError: flags that do not go together, no cluster, or processes that do not meet.
    """
    if not _DISTRIBUTED.value:
        given = [flag.name for flag in _BY_HAND.values() if flag.value is not None]
        if given:
            raise InputError(f"--{given[0]} goes with --distributed")
        return
    place, timeout = _place(), _START_TIMEOUT.value
    told: dict[str, Any] = {}
    if place:
        meet(place, timeout)
        told = {
            "coordinator_address": f"{place.host}:{place.port}",
            "num_processes": place.num_processes,
            "process_id": place.process_id,
        }
    jax.config.update("jax_enable_preemption_service", saves_on_sigterm)
    # JAX ends a process whose job is lost by abort(), after a line that says so. The stacks of all
    # threads, which would follow, hide that line.
    faulthandler.disable()
    # Where a cluster says who the processes are, JAX waits for them and cannot name a missing one.
    waiting = _Waiting(lambda: "waiting for the other processes of the job")
    try:
        with waiting:
            jax.distributed.initialize(
                **told,
                initialization_timeout=timeout,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
            )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--distributed: no job found ({reason}); allowed are Cloud TPU, GKE, Slurm, Open MPI, "
            f"or {_names()}"
        ) from error
    if jax.process_index() != 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Waiting:
    """Says on stderr whom a process waits for, after ten seconds and then each minute.

    Args:
      message: Returns what it waits for.
    """

    def __init__(self, message: Callable[[], str]):
        self._message = message
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _speak(self) -> None:
        began, pause = time.monotonic(), _FIRST_MESSAGE
        while not self._done.wait(pause):
            seconds = time.monotonic() - began
            print(f"{self._message()} ({seconds:.0f} s so far)", file=sys.stderr, flush=True)
            pause = _NEXT_MESSAGE


def _names() -> str:
    return ", ".join(f"--{flag.name}" for flag in _BY_HAND.values())


def _place() -> Place | None:
    """What the user says; None if that is nothing."""
    values = [
        flag.value if flag.value is not None else os.environ.get(variable, "")
        for variable, flag in _BY_HAND.items()
    ]
    if not any(values):
        return None
    if not all(values):
        raise InputError(f"--distributed: allowed are all of {_names()}, or none in a cluster")
    host, _, port = values[0].rpartition(":")
    if not host or not all(value.isdigit() for value in (port, *values[1:])):
        raise InputError(f"{_names()}: {', '.join(values)}; allowed: HOST:PORT and two numbers")
    place = Place(host, int(port), int(values[1]), int(values[2]))
    if place.process_id >= place.num_processes:
        raise InputError(
            f"--process_id={place.process_id}; allowed: 0 to {place.num_processes - 1}, one less "
            "than --num_processes"
        )
    return place


def meet(place: Place, timeout: float) -> None:
    """Waits until all processes are there and agree how many they are.

    JAX would wait, too, but abort() where they do not come.

    Args:
      place: of this process.
      timeout: seconds to wait.

    Raises:
      InputError: they are not there in time or do not agree; the same for all that are there.
    """
    if place.process_id == 0:
        guests: dict[int, socket.socket] = {}
        with _Waiting(lambda: f"waiting for process {_missing(place, guests)}"):
            problem = _receive(place, timeout, guests)
    else:
        with _Waiting(lambda: f"waiting for process 0 at {place.host}:{place.port}, or others"):
            problem = _visit(place, timeout)
    if problem:
        raise InputError(f"--coordinator={place.host}:{place.port}: {problem}")


def _missing(place: Place, guests: Mapping[int, socket.socket]) -> str:
    """Returns the numbers of the processes that process 0 has not heard from."""
    return ", ".join(str(index) for index in range(1, place.num_processes) if index not in guests)


def _receive(place: Place, timeout: float, guests: dict[int, socket.socket]) -> str:
    """Hears as process 0 from all others, and answers each with what is wrong.

    Args:
      place: Place of process 0.
      timeout: Seconds to wait.
      guests: Is filled with the connections of the other processes.

    Returns:
      What is wrong, empty if nothing is.
    """
    deadline = time.monotonic() + timeout
    count, problem = place.num_processes, ""
    try:
        server = socket.create_server(("", place.port))
    except OSError as error:
        return f"cannot be listened at ({error.strerror}); allowed: a free port of this machine"
    with server:
        while len(guests) < count - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                guest = server.accept()[0]
            except TimeoutError:
                problem = f"of {count} processes {_missing(place, guests)} did not come in time"
                break
            guest.settimeout(_TALK)
            try:
                words = guest.makefile().readline().split()
            except OSError:
                words = []
            if len(words) != 2 or not all(word.isdigit() for word in words):
                guest.close()  # none of ours
                continue
            index, said = map(int, words)
            if said != count:
                problem = f"--num_processes is {count} for process 0, {said} for process {index}"
            elif index in guests:
                problem = f"two processes have --process_id={index}"
            guests[-1 if problem else index] = guest
    for guest in guests.values():
        with guest:
            guest.sendall(f"{problem or 'welcome'}\n".encode())
    return problem


def _visit(place: Place, timeout: float) -> str:
    """Tells process 0 which process this is; returns what process 0 finds wrong, else "".

    Process 0, which may have started later, waits for the others until its own deadline, and a
    process that has reached it waits with it: otherwise who is missing would not be told.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            address = (place.host, place.port)
            with socket.create_connection(address, deadline - time.monotonic()) as host:
                host.settimeout(timeout + _TALK)
                host.sendall(f"{place.process_id} {place.num_processes}\n".encode())
                answer = host.makefile().readline().strip()
                if answer:
                    return answer.removeprefix("welcome")
        except OSError:
            pass  # Not there yet.
        time.sleep(0.2)
    return "process 0 does not answer; it must run there, with a port that others can reach"
