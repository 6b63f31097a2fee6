"""Maps a function over items in parallel processes, in order, and survives process crashes.

If a worker of `concurrent.futures` or loky is killed, all pending calls fail, and the error does
not name the item that caused the crash. Workers of these libraries also start slowly: they import
the user's main program again, or JAX together with the function's package. Workers in this module
run this file and import only the function's module.
"""

import collections
import concurrent.futures
import contextlib
import os
import pathlib
import pickle
import queue
import signal
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

QUEUED_PER_WORKER = 4
"""Maximum number of items per worker that are submitted and not yet yielded."""


class WorkerCrashError(Exception):
    """Reports that a worker process ended before it returned a result."""


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], *, num_workers: int
) -> Iterator[R | WorkerCrashError]:
    """Applies a function to items in parallel processes.

    At most `QUEUED_PER_WORKER * num_workers` items are read in advance, so memory does not grow
    with the number of items.

    Args:
        function: Function that can be imported by name, or a `functools.partial` of such a
            function.
        items: Items to process. Items and results must be picklable.
        num_workers: Number of processes. If 0, the function runs in this process.

    Yields:
        The results in the order of the items. If a worker crashes (killed, out of memory, a fault
        in a C library), the result of its item is a `WorkerCrashError`, and the iterator continues
        with the other items. An exception that the function raises is raised by the iterator.

    Raises:
        ValueError: `num_workers` is negative.
    """
    if num_workers < 0:
        raise ValueError(f"{num_workers=}; allowed: at least 0")
    if num_workers == 0:
        return map(function, items)
    return _parallel_map(function, items, num_workers)


def _parallel_map(
    function: Callable[[T], R], items: Iterable[T], num_workers: int
) -> Iterator[R | WorkerCrashError]:
    workers = [_Worker(function) for _ in range(num_workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def call(item: T) -> R | WorkerCrashError:
        worker = idle.get()
        try:
            return worker(item)
        except WorkerCrashError as crash:
            return crash
        finally:
            idle.put(worker)

    # One thread per worker waits for results, so workers continue while the caller is busy.
    threads = concurrent.futures.ThreadPoolExecutor(num_workers, "ordered_map")
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for item in items:
            pending.append(threads.submit(call, item))
            if len(pending) == QUEUED_PER_WORKER * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        # If the caller stops iterating early, calls may still be running.
        for process in [worker.process for worker in workers]:
            if process is not None:
                process.kill()
        threads.shutdown()
        for worker in workers:
            worker.close()


class _Worker:
    """Applies a function in a process, started at the first call and restarted after a crash."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self.process: subprocess.Popen[Any] | None = None

    def __call__(self, item: Any) -> Any:
        """Returns the function's result, or raises the function's error or `WorkerCrashError`."""
        message = pickle.dumps(item)
        process = self.process or self._start()
        try:
            _write(process.stdin, message)
            succeeded, value = pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            status = process.wait()
            self.close()
            reason = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise WorkerCrashError(f"a worker ended with {reason}") from None
        if succeeded:
            return value
        raise value

    def _start(self) -> subprocess.Popen[Any]:
        self.process = subprocess.Popen(
            # Without -P, modules next to this file would shadow modules with the same names.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with contextlib.suppress(OSError):  # If the process has died, `__call__` reports the crash.
            _write(self.process.stdin, pickle.dumps(sys.path) + pickle.dumps(self._function))
        return self.process

    def close(self) -> None:
        """Kills the process and closes its pipes. No call may be running."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self.process = None


def _write(stream: Any, message: bytes) -> None:
    stream.write(message)
    stream.flush()


def _serve() -> None:
    """Runs the calls that arrive on standard input until standard input is closed."""
    # Ctrl-C reaches all processes of a terminal, but only the parent process may end the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    calls = sys.stdin.buffer
    # The function's own output must not mix with the results.
    with os.fdopen(os.dup(1), "wb") as results:
        os.dup2(2, 1)
        sys.path[:] = pickle.load(calls)
        _skip_init_files()
        function = pickle.load(calls)
        while True:
            try:
                item = pickle.load(calls)
            except EOFError:
                return
            try:
                message = pickle.dumps((True, function(item)))
            except Exception as error:
                error.add_note(f"In a worker process:\n{traceback.format_exc()}")
                message = pickle.dumps((False, error))
            _write(results, message)


def _skip_init_files() -> None:
    """Makes the packages that contain this file importable without their `__init__.py`."""
    folder = pathlib.Path(__file__).resolve().parent
    parent = types.ModuleType(folder.parent.name)
    package = types.ModuleType(f"{parent.__name__}.{folder.name}")
    parent.__path__, package.__path__ = [str(folder.parent)], [str(folder)]
    setattr(parent, folder.name, package)
    sys.modules |= {parent.__name__: parent, package.__name__: package}


if __name__ == "__main__":
    _serve()
