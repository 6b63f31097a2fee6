"""Runs commands as a user types them, in separate processes."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import NamedTuple

REPOSITORY = pathlib.Path(__file__).parents[2]

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
)
"""Modules that a process imports before it forks child processes."""


class CommandResult(NamedTuple):
    """Exit status and output of a command."""

    status: int
    stdout: str
    stderr: str


def run_script(name: str, *flags: str, stdin: str = "") -> CommandResult:
    """Runs one script of `launch/` in a new Python process, with `stdin` as standard input."""
    process = subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *flags],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "COLUMNS": "120"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return CommandResult(process.returncode, process.stdout, process.stderr)


def run_commands(
    commands: Sequence[str | Sequence[str]],
    folder: pathlib.Path,
    *,
    working_directory: pathlib.Path = REPOSITORY,
) -> list[CommandResult]:
    """Runs commands one after the other.

    Importing the libraries takes several seconds, but most commands take less than one second. A
    single process therefore imports the libraries once and forks a child process for each command.

    Args:
      commands: Arguments of `mister-jax`, such as "train --workdir=DIR/run", or a script and its
        arguments, such as "launch.train --workdir=DIR/run". DIR stands for the folder. Arguments
        in a list are used as they are.
      folder: Folder that replaces DIR.
      working_directory: Folder in which the commands run.
    """
    arguments = [
        command.replace("DIR", str(folder)).split() if isinstance(command, str) else command
        for command in commands
    ]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.commands"],
        input=json.dumps(arguments),
        cwd=working_directory,
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "COLUMNS": "200",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [CommandResult(*json.loads(line)) for line in process.stdout.splitlines()]


def _run_commands_from_stdin() -> None:
    """Reads the arguments of all commands and prints a `CommandResult` for each, as JSON."""
    for name in ("benchmarks", *SLOW_IMPORTS):
        importlib.import_module(name)
    for arguments in json.load(sys.stdin):
        print(json.dumps(_fork(arguments)), flush=True)


def _fork(arguments: list[str]) -> CommandResult:
    """Runs one command in a child process."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(stdout.fileno(), sys.stdout.fileno())
            os.dup2(stderr.fileno(), sys.stderr.fileno())
            status = _run(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # A normal exit would take longer than most commands.
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stdout.seek(0)
        stderr.seek(0)
        return CommandResult(status, stdout.read().decode(), stderr.read().decode())


def _run(arguments: list[str]) -> int:
    """Runs one command in this process and returns its exit status."""
    from mister_jax.cli.main import main

    try:
        if arguments[:1] and arguments[0].startswith("launch."):
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__")
        else:
            sys.argv = ["mister-jax", *arguments]
            main()
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _run_commands_from_stdin()
