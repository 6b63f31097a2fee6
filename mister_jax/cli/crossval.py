"""Trains and scores one model per fold of a dataset, and pools the test predictions.

mister-jax crossval --config=fusion:iemocap --workdir=DIR --folds=session
mister-jax crossval --config=fusion:my_features --workdir=DIR --folds=speaker:5
mister-jax crossval --config=fusion:polish_1 --workdir=DIR --datasets=polish_1,polish_2

--folds is the column whose values are held out in turn: dialogue, speaker or session (for IEMOCAP,
speaker and session are read from the ids), or a column of a manifest. COLUMN:K groups the values
into K folds with similar class frequencies. With --datasets, each dataset is one fold and keeps its
splits.

The folds share compiled programs. Run the command again to resume.
"""

from absl import flags
from ml_collections import config_flags

from mister_jax.cli import cluster
from mister_jax.cli.app import STOPPED_BY_SIGTERM, required_config, required_workdir
from mister_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "config of the experiment", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of all folds; created if missing")
_FOLDS = flags.DEFINE_string("folds", None, "COLUMN or COLUMN:K, such as session or speaker:5")
_MODELS_AT_ONCE = flags.DEFINE_integer(
    "models_at_once",
    None,
    "number of models, each a seed of a fold, that train at once; by default the seeds of one fold "
    "on CPU, and 16 on accelerators",
    lower_bound=1,
)
_DATASETS = flags.DEFINE_list("datasets", [], "datasets, each of which is one fold")


def _crossval() -> int:
    config = required_config(_CONFIG)
    workdir = required_workdir(_WORKDIR, "a directory; it is created if it does not exist")
    if config.task != "fusion":
        raise InputError(f"config.task={config.task!r}; allowed: 'fusion'")
    if _FOLDS.value and _DATASETS.value:
        raise InputError("--folds and --datasets; allowed: only one of them")
    if not _FOLDS.value and not _DATASETS.value:
        raise InputError("--folds or --datasets is needed, such as --folds=speaker:5")
    import jax
    from etils import epath

    from mister_jax.evaluation import cross_validation

    if _FOLDS.value:
        folds = cross_validation.folds_of_dataset(config, _FOLDS.value)
    else:
        folds = cross_validation.folds_of_datasets(config, _DATASETS.value)
    result = cross_validation.cross_validate(folds, workdir, models_at_once=_MODELS_AT_ONCE.value)
    if result is None:
        return STOPPED_BY_SIGTERM
    if jax.process_index() == 0:
        folder = epath.Path(workdir)
        print((folder / "crossval.md").read_text())
        print(f"written to {folder}: {', '.join(cross_validation.FILES)}")
    return 0


main = cluster.distributed(_crossval, saves_on_sigterm=True)
