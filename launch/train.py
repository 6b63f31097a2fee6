"""Trains what a config says.

python -m launch.train --config=configs/fusion.py:mosi_features --workdir=DIR
"""

from absl import flags
from ml_collections import config_flags

from launch import run
from mister_jax.errors import InputError
from mister_jax.train import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "experiment", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "where the training lives")

TERMINATED = 128 + 15
"""Exit status after SIGTERM, by the convention of shells: the work is not finished."""


def main() -> int:
    for name, value in (("config", _CONFIG.value), ("workdir", _WORKDIR.value)):
        if not value:
            raise InputError(f"--{name} is needed")
    progress = train(_CONFIG.value, _WORKDIR.value)
    return 0 if progress.finished else TERMINATED


if __name__ == "__main__":
    run(main)
