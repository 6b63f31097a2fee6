"""Compares the variants of MiSTER-E: each expert alone, without parts of the loss, gate or context.

python -m launch.ablate --config=configs/fusion.py:mosi_features --config.num_seeds=5 --workdir=DIR
python -m launch.ablate --config=... --workdir=DIR --variants=default,no_kl

Writes `ablation.md`, `ablation.csv` and `ablation.png`. Started again it goes on where it stopped.
"""

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from configs.fusion import STUDY, VARIANTS
from launch import TERMINATED, given_config, run
from mister_jax.cli.cluster import distributed
from mister_jax.errors import InputError
from mister_jax.evaluation.ablation import Variant, run_ablation

_CONFIG = config_flags.DEFINE_config_file("config", None, "experiment", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "where the study lives")
_VARIANTS = flags.DEFINE_list("variants", [], f"of {', '.join(STUDY)}; all by default")


def _variant(config: ConfigDict, name: str) -> Variant:
    changed = ConfigDict(config.to_dict())
    if name in VARIANTS:
        VARIANTS[name](changed)
    return Variant(name, STUDY[name], changed)


def main() -> int:
    config = given_config(_CONFIG)
    if not _WORKDIR.value:
        raise InputError("--workdir is needed: a directory, made if it is not there")
    if config.task != "fusion":
        raise InputError(f"config.task={config.task!r}; allowed is 'fusion'")
    variants = [_variant(config, name) for name in STUDY]
    if run_ablation(variants, _WORKDIR.value, names=_VARIANTS.value) is None:
        return TERMINATED
    if jax.process_index() == 0:
        folder = epath.Path(_WORKDIR.value)
        console = Console(highlight=False)
        console.out((folder / "ablation.md").read_text())
        console.out(f"written to {folder}: ablation.md, ablation.csv, ablation.png")
    return 0


if __name__ == "__main__":
    run(distributed(main, saves_on_sigterm=True))
