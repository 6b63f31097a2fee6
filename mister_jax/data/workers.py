"""A function over many items in parallel processes, in order, whatever happens to a process.

The processes are Python interpreters that run this file. They import what the function's module
imports and nothing else: unlike those of `multiprocessing`, they do not run the user's main program
again, which need not be a file, and they do not run `mister_jax/__init__.py`, which imports JAX.
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

AHEAD = 4
"""Items per worker that are started before the first result is consumed."""


class WorkerCrash(Exception):
    """A worker process ended before it returned a result; the message says how."""


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], *, num_workers: int
) -> Iterator[R | WorkerCrash]:
    """Applies a function to items in parallel processes.

    At most `AHEAD * num_workers` items are taken from `items` before the first result is consumed,
    so memory does not grow with their number.

    Args:
        function: A function that can be imported by name, or a `functools.partial` of one. Its
            module must be on `sys.path`. It runs in this process only if `num_workers` is 0.
        items: Items that can be pickled. The results must be picklable too.
        num_workers: Number of processes; with 0 the function runs in this process.

    Yields:
        The results in the order of the items. If the process of an item died (killed, out of
        memory, a fault in a C library), its result is a `WorkerCrash`, which is not raised, and
        the other items are not affected. An exception of the function is raised here.

    Raises:
        ValueError: `num_workers` is negative.
    """
    if num_workers < 0:
        raise ValueError(f"{num_workers=}; allowed: at least 0")
    if num_workers == 0:
        return map(function, items)
    return _in_parallel(function, items, num_workers)


def _in_parallel(
    function: Callable[[T], R], items: Iterable[T], num_workers: int
) -> Iterator[R | WorkerCrash]:
    workers = [_Worker(function) for _ in range(num_workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def call(item: T) -> R | WorkerCrash:
        worker = idle.get()
        try:
            return worker(item)
        except WorkerCrash as crash:
            return crash
        finally:
            idle.put(worker)

    # A thread waits for each worker, so that workers keep running while the caller is busy.
    threads = concurrent.futures.ThreadPoolExecutor(num_workers, "ordered_map")
    pending: collections.deque[concurrent.futures.Future[R | WorkerCrash]] = collections.deque()
    try:
        for item in items:
            pending.append(threads.submit(call, item))
            if len(pending) == AHEAD * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        # If the caller stopped iterating, calls are still running.
        for worker in workers:
            worker.kill()
        threads.shutdown()
        for worker in workers:
            worker.close()


class _Worker:
    """A process that applies a function. It starts at the first call, and again after a crash."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._process: subprocess.Popen[Any] | None = None

    def __call__(self, item: Any) -> Any:
        """Returns the value of the function, or raises its exception or `WorkerCrash`."""
        message = pickle.dumps(item)
        process = self._process or self._start()
        try:
            _write(process.stdin, message)
            succeeded, value = pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            status = process.wait()
            self.close()
            reason = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise WorkerCrash(f"a worker ended with {reason}") from None
        if succeeded:
            return value
        raise value

    def _start(self) -> subprocess.Popen[Any]:
        self._process = subprocess.Popen(
            # With -P the modules beside this file do not hide others of the same name.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with contextlib.suppress(OSError):  # If the process died, the call reports it.
            _write(self._process.stdin, pickle.dumps(sys.path) + pickle.dumps(self._function))
        return self._process

    def kill(self) -> None:
        """Kills the process. A call that waits for it in another thread raises `WorkerCrash`."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Kills the process and closes its pipes. No call may be running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._process = None


def _write(stream: Any, message: bytes) -> None:
    stream.write(message)
    stream.flush()


def _serve() -> None:
    """Serves the requests on standard input until it is closed."""
    # Ctrl-C reaches all processes of a terminal; the parent process ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = sys.stdin.buffer
    # Output that the function prints must not mix with the results.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        sys.path[:] = pickle.load(requests)
        _skip_init_files()
        function = pickle.load(requests)
        while True:
            try:
                item = pickle.load(requests)
            except EOFError:
                return
            try:
                message = pickle.dumps((True, function(item)))
            except Exception as error:
                error.add_note(f"In a worker process:\n{traceback.format_exc()}")
                message = pickle.dumps((False, error))
            _write(answers, message)


def _skip_init_files() -> None:
    """Makes the packages above this file importable without running their `__init__.py`."""
    folder = pathlib.Path(__file__).resolve().parent
    parent = types.ModuleType(folder.parent.name)
    package = types.ModuleType(f"{parent.__name__}.{folder.name}")
    parent.__path__, package.__path__ = [str(folder.parent)], [str(folder)]
    setattr(parent, folder.name, package)
    sys.modules |= {parent.__name__: parent, package.__name__: package}


if __name__ == "__main__":
    _serve()
