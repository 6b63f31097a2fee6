"""Runs commands as a user types them, in separate processes.

Importing the libraries takes several seconds, but most commands take less than one second. One
process therefore imports the libraries once and forks a child process for each command. Environment
variables that the libraries read during import have the values of the first command.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

REPOSITORY = pathlib.Path(__file__).parents[2]

_MAX_SECONDS = 600
_INITIAL_ENVIRONMENT = frozenset(os.environ)

SLOW_IMPORTS = (
    "matplotlib.pyplot",
    "tensorflow_datasets",
    "tensorflow",
    "orbax.checkpoint",
    "transformers.models.auto.tokenization_auto",
    "av",
    "mister_jax.data.prepare",
    "mister_jax.inference.recognizer",
    "mister_jax.training.loop",
    "mister_jax.cli.app",
    "tests.helpers.long_lived_imports",
)
"""Modules that a process imports, in this order, before it forks child processes."""


class CommandResult(NamedTuple):
    """Exit status and output of a command."""

    status: int
    stdout: str
    stderr: str


def run_command(
    arguments: Sequence[str],
    *,
    working_directory: pathlib.Path = REPOSITORY,
    stdin: str = "",
    stop_file: str = "",
) -> CommandResult:
    """Runs one command in a child process with one CPU device.

    Args:
      arguments: Arguments of `mister-jax`, or a script such as "launch.train" and its arguments.
      working_directory: Folder in which the command runs.
      stdin: Standard input of the command.
      stop_file: Path whose last part may be a glob pattern. The command receives SIGTERM when such
        a file exists.
    """
    request = {
        "arguments": [*arguments],
        "environment": _environment(),
        "working_directory": str(working_directory),
        "stdin": stdin,
        "stop_file": stop_file,
    }
    server = _start_server()
    try:
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server ended with status {server.wait()}")
    except BaseException:  # The next command must not read the answer to this command.
        server.kill()
        _start_server.cache_clear()
        raise
    return CommandResult(*json.loads(answer))


def run_commands(
    commands: Sequence[str | Sequence[str]],
    folder: pathlib.Path,
    *,
    working_directory: pathlib.Path = REPOSITORY,
) -> list[CommandResult]:
    """Runs commands one after the other.

    Args:
      commands: See the arguments of `run_command`. In a string, such as "train
        --workdir=DIR/run", DIR stands for the folder.
      folder: Folder that replaces DIR.
      working_directory: Folder in which the commands run.
    """
    arguments = [
        command.replace("DIR", str(folder)).split() if isinstance(command, str) else command
        for command in commands
    ]
    return [run_command(flags, working_directory=working_directory) for flags in arguments]


def _environment() -> dict[str, str]:
    changes = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "COLUMNS": "200"}
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **changes}


@functools.cache
def _start_server() -> Any:
    """Starts the process that forks a child for each command. It ends when this process exits."""
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.commands"],
        cwd=REPOSITORY,
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def close() -> None:
        server.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            server.stdin.close()
        server.wait()

    atexit.register(close)
    return server


def _serve() -> None:
    """Reads requests from standard input and prints a `CommandResult` for each, as JSON."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Libraries may print when imported.
    for name in ("benchmarks", *SLOW_IMPORTS):
        importlib.import_module(name)
    while line := sys.stdin.readline():
        print(json.dumps(_fork(json.loads(line))), file=answers, flush=True)


def _fork(request: dict[str, Any]) -> CommandResult:
    """Runs one command in a child process."""
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        stdin.write(request["stdin"].encode())
        stdin.seek(0)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(stdin.fileno(), sys.stdin.fileno())
                os.dup2(stdout.fileno(), sys.stdout.fileno())
                os.dup2(stderr.fileno(), sys.stderr.fileno())
                status = _run(request)
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)  # A normal exit would take longer than most commands.
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stdout.seek(0)
        stderr.seek(0)
        return CommandResult(status, *(file.read().decode() for file in (stdout, stderr)))


def _stop_when_created(pattern: pathlib.Path) -> None:
    """Sends SIGTERM to this process when a file matches the pattern."""
    while not list(pattern.parent.glob(pattern.name)):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def _run(request: dict[str, Any]) -> int:
    """Runs the command of a request in this process and returns its exit status."""
    from mister_jax.cli.main import main

    signal.alarm(_MAX_SECONDS)  # SIGALRM ends the process.
    for name in os.environ.keys() - request["environment"].keys():
        if name in _INITIAL_ENVIRONMENT:
            del os.environ[name]
    os.environ.update(request["environment"])
    os.chdir(request["working_directory"])
    if request["stop_file"]:
        pattern = pathlib.Path(request["stop_file"])
        threading.Thread(target=_stop_when_created, args=(pattern,), daemon=True).start()
    arguments = request["arguments"]
    try:
        if arguments[:1] and arguments[0].startswith("launch."):
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__")
        else:
            sys.argv = ["mister-jax", *arguments]
            main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


if __name__ == "__main__":
    _serve()
