"""Runs `benchmarks.cli` from a checkout, because the wheel does not contain the benchmarks."""

import pathlib
import sys

import mister_jax
from mister_jax.errors import InputError

_CHECKOUT = pathlib.Path(mister_jax.__file__).parents[1]

if not (_CHECKOUT / "benchmarks" / "cli.py").exists():
    raise InputError("benchmarks are not installed; run this in a checkout of mister_jax")
sys.path.insert(0, str(_CHECKOUT))

from benchmarks import cli  # noqa: E402

__doc__, main = cli.__doc__, cli.main
