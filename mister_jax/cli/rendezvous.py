"""Waits until all processes of a job have started and agree on the number of processes.

`jax.distributed.initialize` also waits for all processes. However, if a process is missing,
`initialize` aborts with a C++ stack trace that does not name the process. Also, `initialize` does
not detect that processes disagree on the number of processes. Therefore, every process except
process 0 first sends "PROCESS_ID NUM_PROCESSES" to process 0, on the port that JAX uses afterwards.
Once all processes have reported, process 0 answers "ok". If a problem occurs, process 0 answers
with the error.
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

# Seconds before the first message about missing processes, and between later messages.
_FIRST_MESSAGE, _NEXT_MESSAGE = 10.0, 60.0


@dataclasses.dataclass(frozen=True)
class Process:
    """A process in a job. `host` and `port` are the address of process 0."""

    host: str
    port: int
    num_processes: int
    process_id: int


def wait_for_all_processes(process: Process, timeout: float) -> None:
    """Waits at most `timeout` seconds until all processes of the job have started.

    Raises:
      InputError: A process is missing, or two processes contradict each other. Process 0 and all
        processes that have reported to it raise the same error.
    """
    wait = _coordinate if process.process_id == 0 else _report
    if problem := wait(process, timeout):
        raise InputError(f"--coordinator={process.host}:{process.port}: {problem}")


@contextlib.contextmanager
def log_while_waiting(message: Callable[[], str]) -> Iterator[None]:
    """Prints a message to stderr if the block takes ten seconds, and then once a minute."""
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


def _coordinate(process: Process, timeout: float) -> str:
    """Collects and answers the other processes' reports, and returns the error, or ""."""
    deadline = time.monotonic() + timeout
    reported: dict[int, socket.socket] = {}

    def missing() -> str:
        indices = range(1, process.num_processes)
        return ", ".join(str(index) for index in indices if index not in reported)

    try:
        server = socket.create_server(("", process.port))
    except OSError as error:
        return f"cannot listen ({error.strerror}); use a free port of this machine"
    problem = ""
    waiting = log_while_waiting(lambda: f"waiting for process {missing()}")
    with waiting, server, contextlib.ExitStack() as connections:
        while len(reported) < process.num_processes - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = connections.enter_context(server.accept()[0])
            except TimeoutError:
                problem = f"process {missing()} of {process.num_processes} did not start in time"
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
            # A process that contradicts another process also needs the answer.
            reported[-1 if problem else index] = connection
        for connection in reported.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{problem or 'ok'}\n".encode())
    return problem


def _report(process: Process, timeout: float) -> str:
    """Reports this process to process 0, and returns the error in the answer, or ""."""
    deadline = time.monotonic() + timeout
    address = (process.host, process.port)
    coordinator = f"process 0 at {process.host}:{process.port}"
    with log_while_waiting(lambda: f"waiting for {coordinator}, or for processes it needs"):
        while (remaining := deadline - time.monotonic()) > 0:
            # An OSError usually means that process 0 is not listening yet.
            with (
                contextlib.suppress(OSError),
                socket.create_connection(address, remaining) as connection,
            ):
                connection.sendall(f"{process.process_id} {process.num_processes}\n".encode())
                # Process 0 may have started later than this process. At its deadline, process 0
                # reports which processes are missing, so wait until then.
                if answer := _read_line(connection, timeout + _READ_TIMEOUT):
                    return answer.removeprefix("ok")
            time.sleep(0.2)
    return "process 0 does not answer; start it on that host, with a port that others can reach"


def _read_line(connection: socket.socket, timeout: float) -> str:
    """Returns the next line without the newline, or "" if no line arrives in time."""
    connection.settimeout(timeout)
    try:
        return connection.makefile().readline().strip()
    except (OSError, UnicodeDecodeError):
        return ""
