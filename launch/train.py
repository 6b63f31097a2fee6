"""Trains what a config says.

python -m launch.train --config=configs/fusion.py:mosi_features --workdir=DIR
"""

from absl import flags
from ml_collections import ConfigDict, config_flags

from launch import run
from mister_jax.errors import InputError
from mister_jax.train import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "experiment", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "where the training lives")

TERMINATED = 128 + 15
"""Exit status after SIGTERM, by the convention of shells: the work is not finished."""


def _config() -> ConfigDict:
    if not _CONFIG.value:
        raise InputError("--config is needed: a file, such as configs/fusion.py:mosi_features")
    try:
        _CONFIG.value.to_dict()
    except OSError as error:  # What ml_collections gives for a file it did not find.
        raise InputError(" ".join(str(error).split())) from error
    return _CONFIG.value


def main() -> int:
    config = _config()
    if not _WORKDIR.value:
        raise InputError("--workdir is needed: a directory, made if it is not there")
    progress = train(config, _WORKDIR.value)
    return 0 if progress.finished else TERMINATED


if __name__ == "__main__":
    run(main)
