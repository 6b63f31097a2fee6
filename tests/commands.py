"""Commands of `launch/` as they are typed, many at little cost."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

REPOSITORY = pathlib.Path(__file__).parents[1]

# One process starts the commands one after the other, so that libraries are loaded once. A command
# ends without taking them down, which takes longer than most commands.
_START_ALL = """
import importlib, json, os, sys, tempfile
import matplotlib.pyplot, tensorflow
import benchmarks, mister_jax.cli.app, mister_jax.data.prepare, mister_jax.inference.recognizer

for name, *flags in json.load(sys.stdin):
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(told.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.argv = [f"mister-jax {name}", *flags]
            try:
                mister_jax.cli.app.run(importlib.import_module(f"mister_jax.cli.{name}"))
            except SystemExit as end:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(end.code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.seek(0), said.seek(0)
        print(json.dumps([status, told.read().decode(), said.read().decode()]), flush=True)
"""


def run_all(uses: Sequence[str], folder: pathlib.Path) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of commands.

    Args:
      uses: each the name of a script and its flags, with DIR for the folder.
      folder: that of DIR.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _START_ALL],
        input=json.dumps([use.replace("DIR", str(folder)).split() for use in uses]),
        cwd=REPOSITORY,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]
