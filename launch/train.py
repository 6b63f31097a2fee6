"""Trains what a config says.

python -m launch.train --config=configs/fusion.py:mosi_features --workdir=DIR
python -m launch.train --config=configs/fusion.py:mosi_features --workdir=DIR --config.num_seeds=5
"""

import jax
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from launch import TERMINATED, given_config, run
from mister_jax.cli.cluster import distributed
from mister_jax.console import score_table
from mister_jax.errors import InputError
from mister_jax.evaluation.results import evaluate
from mister_jax.tasks import config_seeds
from mister_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "experiment", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "where the training lives")


def main() -> int:
    config = given_config(_CONFIG)
    if not _WORKDIR.value:
        raise InputError("--workdir is needed: a directory, made if it is not there")
    progress = train(config, _WORKDIR.value)
    if not progress.finished:
        return TERMINATED
    if len(config_seeds(config)) > 1:
        found = evaluate(_WORKDIR.value, "validation", quiet=True)
        if jax.process_index() == 0:
            Console().print(score_table("validation", found))
    return 0


if __name__ == "__main__":
    run(distributed(main, saves_on_sigterm=True))
