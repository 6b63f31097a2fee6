"""Trains MiSTER-E or an encoder with a config. Run the command again to resume.

mister-jax train --config=fusion:mosi_features --workdir=DIR
mister-jax train --config=fusion:mosi_features --workdir=DIR --config.num_seeds=5
mister-jax train --config=fusion:mosi_features --workdir=DIR --evaluate=test
mister-jax train --config=my_config.py --workdir=DIR

--config is the name of a packaged config (demo, fusion, speech_encoder, text_encoder) or the path
of a Python file. A colon separates the name or path from the config's argument.
--config.FIELD=VALUE changes a field.
"""

from absl import flags
from ml_collections import ConfigDict, config_flags

from mister_jax.cli import cluster
from mister_jax.cli.app import STOPPED_BY_SIGTERM, required_config, required_workdir
from mister_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "config of the experiment", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "work directory; created if missing")
_EVALUATE = flags.DEFINE_list(
    "evaluate",
    [],
    "splits to score after training, as `mister-jax evaluate` does; by default none, or validation "
    "after training several seeds",
)


def _train() -> int:
    config = required_config(_CONFIG)
    workdir = required_workdir(_WORKDIR, "a directory; it is created if it does not exist")
    # Print this line before the imports, which take seconds.
    print(f"loading {config.data.name} to train {config.task} in {workdir}", flush=True)
    from mister_jax.data.schema import SPLITS
    from mister_jax.tasks.config import config_seeds
    from mister_jax.training.loop import train

    splits = list(dict.fromkeys(_EVALUATE.value))
    if unknown := [split for split in splits if split not in SPLITS]:
        raise InputError(f"--evaluate={','.join(unknown)}; allowed: {', '.join(SPLITS)}")
    if splits and not config.data.get("folds"):
        _check_splits(config, splits)
    if not splits and len(config_seeds(config)) > 1:
        splits = ["validation"]
    progress = train(config, workdir)
    if not progress.finished:
        return STOPPED_BY_SIGTERM
    if splits:
        _evaluate(workdir, splits)
    return 0


def _check_splits(config: ConfigDict, splits: list[str]) -> None:
    """Checks that the dataset has the splits, so that a missing split is not noticed at the end."""
    from mister_jax.data.storage import check_split, open_builder

    builder = open_builder(config.data.name, config.data.data_dir or None)
    for split in splits:
        check_split(builder, split)


def _evaluate(workdir: str, splits: list[str]) -> None:
    from mister_jax.console import output_console, score_table
    from mister_jax.evaluation.results import evaluate

    for split in splits:
        output_console().print(score_table(split, evaluate(workdir, split, quiet=True)))


main = cluster.distributed(_train, saves_on_sigterm=True)
