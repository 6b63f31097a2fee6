"""Waits until all processes of a job run and agree on its size.

`jax.distributed.initialize` waits as well. But when a process is missing, it aborts with a C++
stack trace that names no process, and it does not notice that processes disagree on their number.
So each process first reports to process 0, on the port that JAX uses afterwards.

Protocol: a process sends the line "PROCESS_ID NUM_PROCESSES". When all have reported, or something
is wrong, process 0 sends every process one line: "ok" or the error.
"""

import contextlib
import dataclasses
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from mister_jax.errors import InputError

# Seconds to wait for a line on an open connection.
_READ_TIMEOUT = 10.0

# Seconds before the first message about missing processes, and between later ones.
_FIRST_MESSAGE, _NEXT_MESSAGE = 10.0, 60.0


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of a job.

    Attributes:
      host: Host of process 0.
      port: Port of process 0.
      num_processes: Number of processes in the job.
      process_id: Index of this process, from 0.
    """

    host: str
    port: int
    num_processes: int
    process_id: int


def wait_for_all_processes(process: Process, timeout: float) -> None:
    """Waits until all processes of the job run.

    Args:
      process: This process.
      timeout: Seconds to wait.

    Raises:
      InputError: A process is missing, or two processes contradict each other. All processes that
        run raise the same error.
    """
    if process.process_id == 0:
        reported: dict[int, socket.socket] = {}
        with log_while_waiting(lambda: f"waiting for process {_missing(process, reported)}"):
            problem = _coordinate(process, timeout, reported)
    else:
        coordinator = f"process 0 at {process.host}:{process.port}"
        with log_while_waiting(lambda: f"waiting for {coordinator}, or for processes it needs"):
            problem = _report(process, timeout)
    if problem:
        raise InputError(f"--coordinator={process.host}:{process.port}: {problem}")


@contextlib.contextmanager
def log_while_waiting(message: Callable[[], str]) -> Iterator[None]:
    """Prints a message to stderr after ten seconds in the block, then once a minute.

    Args:
      message: Returns what the block waits for.
    """
    done = threading.Event()
    start = time.monotonic()

    def log() -> None:
        pause = _FIRST_MESSAGE
        while not done.wait(pause):
            seconds = time.monotonic() - start
            print(f"{message()} ({seconds:.0f} s so far)", file=sys.stderr, flush=True)
            pause = _NEXT_MESSAGE

    thread = threading.Thread(target=log, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _missing(process: Process, reported: dict[int, socket.socket]) -> str:
    """Returns the indices of the processes that have not reported, separated by commas."""
    return ", ".join(
        str(index) for index in range(1, process.num_processes) if index not in reported
    )


def _coordinate(process: Process, timeout: float, reported: dict[int, socket.socket]) -> str:
    """Collects the reports of all other processes and sends each the result.

    Args:
      process: Process 0.
      timeout: Seconds to wait.
      reported: Filled with the connection of each process that reports.

    Returns:
      The error, "" if there is none.
    """
    deadline = time.monotonic() + timeout
    try:
        server = socket.create_server(("", process.port))
    except OSError as error:
        return f"cannot listen ({error.strerror}); use a free port of this machine"
    problem = ""
    with server, contextlib.ExitStack() as connections:
        while len(reported) < process.num_processes - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = connections.enter_context(server.accept()[0])
            except TimeoutError:
                missing = _missing(process, reported)
                problem = f"process {missing} of {process.num_processes} did not start in time"
                break
            words = _read_line(connection, _READ_TIMEOUT).split()
            if len(words) != 2 or not all(word.isdigit() for word in words):
                connection.close()  # The client is not a process of this job.
                continue
            index, num_processes = map(int, words)
            if num_processes != process.num_processes:
                problem = (
                    f"--num_processes is {process.num_processes} for process 0 and {num_processes} "
                    f"for process {index}"
                )
            elif index in reported:
                problem = f"two processes have --process_id={index}"
            # A process that contradicts another needs the answer, too.
            reported[-1 if problem else index] = connection
        for connection in reported.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{problem or 'ok'}\n".encode())
    return problem


def _report(process: Process, timeout: float) -> str:
    """Reports this process to process 0; returns the error that process 0 sends, "" for none."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # Process 0 does not listen yet.
            address = (process.host, process.port)
            with socket.create_connection(address, deadline - time.monotonic()) as connection:
                connection.sendall(f"{process.process_id} {process.num_processes}\n".encode())
                # Process 0 may have started later. It names the missing processes at its own
                # deadline, so wait for that.
                answer = _read_line(connection, timeout + _READ_TIMEOUT)
                if answer:
                    return answer.removeprefix("ok")
        time.sleep(0.2)
    return "process 0 does not answer; start it on that host, with a port that others can reach"


def _read_line(connection: socket.socket, timeout: float) -> str:
    """Returns the next line without its end; "" if none arrives in time."""
    connection.settimeout(timeout)
    try:
        return connection.makefile().readline().strip()
    except (OSError, UnicodeDecodeError):
        return ""
