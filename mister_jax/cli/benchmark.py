"""Measures speed and memory; the benchmarks are in a checkout of the project, not in the wheel."""

import pathlib
import sys
from types import ModuleType

from mister_jax.errors import InputError

_benchmarks: ModuleType | None = None

if pathlib.Path("benchmarks", "cli.py").exists():
    # The console script does not look for modules in the current folder.
    sys.path.insert(0, str(pathlib.Path.cwd()))
    from benchmarks import cli

    _benchmarks, __doc__ = cli, cli.__doc__


def main() -> int | None:
    """Runs `mister-jax benchmark`."""
    if _benchmarks is None:
        raise InputError("no benchmarks in this folder; run this in a checkout of mister_jax")
    return _benchmarks.main()
