"""Golden files: inputs, weights and outputs of the reference implementations."""

import functools
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@functools.cache
def _read_file(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def read_golden(name, prefix=""):
    """Returns the arrays of a golden file by name. Tests must not change the arrays.

    Args:
      name: Name of the file without its suffix.
      prefix: Prefix of the names to select, which is removed from the names.
    """
    return {
        key.removeprefix(prefix): value
        for key, value in _read_file(name).items()
        if key.startswith(prefix)
    }
