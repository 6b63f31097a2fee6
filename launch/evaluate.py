"""Scores a trained work directory on a split.

python -m launch.evaluate --workdir=DIR --split=test
python -m launch.evaluate --workdir=DIR --split=test --report
python -m launch.evaluate --workdir=DIR --split=test --drop_speech=0.1,0.3,0.5
"""

from typing import Any

from absl import flags
from rich.console import Console

from launch import run
from mister_jax.cli.cluster import distributed
from mister_jax.console import missing_modality_table, score_table
from mister_jax.errors import InputError
from mister_jax.evaluation.missing_modality import (
    MISSING_MODALITY,
    MISSING_MODALITY_AS_ZEROS,
    missing_modality_study,
)
from mister_jax.evaluation.results import evaluate

_WORKDIR = flags.DEFINE_string("workdir", None, "of a training")
_SPLIT = flags.DEFINE_string("split", "test", "split of the dataset")
_DATASET = flags.DEFINE_string("dataset", None, "another dataset than the training's")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "where the dataset is; as in the training")
_OUTPUT = flags.DEFINE_string("output", None, "folder of the results; the workdir by default")
_REPORT = flags.DEFINE_bool("report", False, "write report.html: scores, pictures, dialogues")
_DROP_SPEECH = flags.DEFINE_list("drop_speech", [], "rates at which utterances lose their speech")
_DROP_TEXT = flags.DEFINE_list("drop_text", [], "rates at which utterances lose their text")
_DROP_AS_ZEROS = flags.DEFINE_bool(
    "drop_as_zeros", False, "as in the paper: the lost are zeros that the model takes for vectors"
)
_DRAWS = flags.DEFINE_integer("draws", 5, "random draws for each rate", lower_bound=1)


def _rates(flag: flags.FlagHolder) -> list[float]:
    try:
        return [float(rate) for rate in flag.value] or [0.0]
    except ValueError as error:
        raise InputError(f"--{flag.name}={','.join(flag.value)}; allowed are numbers") from error


def main() -> None:
    if not _WORKDIR.value:
        raise InputError("--workdir is needed: a directory that training has made")
    options: dict[str, Any] = {
        "dataset": _DATASET.value,
        "data_dir": _DATA_DIR.value,
        "output": _OUTPUT.value,
    }
    console = Console()
    written = []
    dropping = _DROP_SPEECH.value or _DROP_TEXT.value
    if dropping:
        rates: dict[str, Any] = {
            "drop_speech": _rates(_DROP_SPEECH),
            "drop_text": _rates(_DROP_TEXT),
        }
        points = missing_modality_study(
            _WORKDIR.value,
            _SPLIT.value,
            **rates,
            as_zeros=_DROP_AS_ZEROS.value,
            draws=_DRAWS.value,
            **options,
        )
        kind = " as zeros" if _DROP_AS_ZEROS.value else ""
        console.print(missing_modality_table(f"{_SPLIT.value}: missing modalities{kind}", points))
        name = MISSING_MODALITY_AS_ZEROS if _DROP_AS_ZEROS.value else MISSING_MODALITY
        written += [f"{name}.json", f"{name}.png"]
    elif _DROP_AS_ZEROS.value:
        raise InputError("--drop_as_zeros goes with --drop_speech or --drop_text")
    if _REPORT.value or not dropping:
        found = evaluate(_WORKDIR.value, _SPLIT.value, report=_REPORT.value, **options)
        console.print(score_table(_SPLIT.value, found))
        written += ["metrics.json", "predictions.jsonl", "confusion.png"]
        written += ["report.html"] if _REPORT.value else []
    place = _OUTPUT.value or _WORKDIR.value
    console.out(f"written to {place}: {', '.join(written)}", highlight=False)


if __name__ == "__main__":
    run(distributed(main))
