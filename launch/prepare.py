"""Writes a corpus as a TFDS dataset and prints what it holds.

python -m launch.prepare --corpus=features --source=features.npz --name=my_features
python -m launch.prepare --corpus=synthetic_features --name=synthetic_features --seed=0
"""

from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch import run
from mister_jax import data
from mister_jax.errors import InputError

CORPORA = ("features", "synthetic_features")

_CORPUS = flags.DEFINE_string("corpus", None, f"what to prepare: {', '.join(CORPORA)}")
_SOURCE = flags.DEFINE_string("source", None, "npz file of utterance features")
_NAME = flags.DEFINE_string("name", None, "name of the dataset; the corpus when left out")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "where datasets are kept; TFDS's own by default")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace a dataset of this name")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the synthetic features", lower_bound=0)


def main() -> None:
    if _CORPUS.value == "features":
        if not _SOURCE.value:
            raise InputError("--source is needed with --corpus=features: an npz file")
        splits = data.read_npz(_SOURCE.value)
    elif _CORPUS.value == "synthetic_features":
        if _SOURCE.value:
            raise InputError("--source goes with --corpus=features; synthetic features have none")
        splits = data.generate(_SEED.value)
    else:
        raise InputError(f"--corpus={_CORPUS.value or ''}; allowed: {', '.join(CORPORA)}")
    builder = data.write(
        splits, _NAME.value or _CORPUS.value, _DATA_DIR.value, overwrite=_OVERWRITE.value
    )

    table = Table("", *splits)
    summaries = [features.summary() for features in splits.values()]
    for field in summaries[0]:
        table.add_row(escape(field), *(summary[field] for summary in summaries))
    console = Console()
    console.print(table)
    console.print(f"written to {builder.data_dir}", soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    run(main)
