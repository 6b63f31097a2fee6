"""Compares variants of MiSTER-E, such as single experts, or MiSTER-E without its context network.

mister-jax ablate --config=fusion:mosi_features --config.num_seeds=5 --workdir=DIR
mister-jax ablate --config=fusion:mosi_features --workdir=DIR --variants=default,no_context

The command writes `ablation.md`, `ablation.csv` and `ablation.png`. Run it again to resume.
"""

from absl import flags
from ml_collections import config_flags

from mister_jax.cli import cluster
from mister_jax.cli.app import STOPPED_BY_SIGTERM, required_config, required_workdir
from mister_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "config of the experiment", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the study; created if missing")
_VARIANTS = flags.DEFINE_list(
    "variants", [], "variants to compare; by default, all that change the training of this config"
)


def _ablate() -> int:
    config = required_config(_CONFIG)
    workdir = required_workdir(_WORKDIR, "a directory; it is created if it does not exist")
    if config.task != "fusion":
        raise InputError(f"config.task={config.task!r}; allowed: 'fusion'")
    import jax
    from etils import epath

    from mister_jax.configs.fusion import ABLATIONS, ablation_configs
    from mister_jax.evaluation.ablation import run_ablation
    from mister_jax.evaluation.variants import Variant

    variants = [
        Variant(name, ABLATIONS[name], changed)
        for name, changed in ablation_configs(config).items()
    ]
    if run_ablation(variants, workdir, names=_VARIANTS.value) is None:
        return STOPPED_BY_SIGTERM
    if jax.process_index() == 0:
        folder = epath.Path(workdir)
        print((folder / "ablation.md").read_text())
        print(f"written to {folder}: ablation.md, ablation.csv, ablation.png")
    return 0


main = cluster.distributed(_ablate, saves_on_sigterm=True)
