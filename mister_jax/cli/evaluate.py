"""Scores a trained work directory on a split.

mister-jax evaluate --workdir=DIR --split=test
mister-jax evaluate --workdir=DIR --split=test --report
mister-jax evaluate --workdir=DIR --split=test --fit_calibration=bias
mister-jax evaluate --workdir=DIR --split=test --drop_speech=0.1,0.3,0.5
"""

from typing import Any

from absl import flags

from mister_jax.cli import cluster
from mister_jax.cli.app import required_workdir
from mister_jax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a training run")
_SPLIT = flags.DEFINE_string("split", "test", "split of the dataset")
_DATASET = flags.DEFINE_string("dataset", None, "dataset; by default the training dataset")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "directory of the datasets; by default the directory used in training"
)
_OUTPUT = flags.DEFINE_string("output", None, "folder of the results; the workdir by default")
_REPORT = flags.DEFINE_bool("report", False, "write report.html: scores, figures, dialogues")
_CALIBRATE = flags.DEFINE_bool("calibrate", True, "calibrate the probabilities")
_FIT = flags.DEFINE_enum(
    "fit_calibration",
    None,
    ["temperature", "bias"],
    "fit the calibration again on the validation split: a temperature, or also class biases",
)
_ADAPT = flags.DEFINE_bool(
    "adapt_features",
    False,
    "shift and scale standardized features to the mean and standard deviation of the training "
    "features, for recordings of another kind, such as telephone calls",
)
_DROP_SPEECH = flags.DEFINE_list("drop_speech", [], "rates at which utterances lose their speech")
_DROP_TEXT = flags.DEFINE_list("drop_text", [], "rates at which utterances lose their text")
_DROP_AS_ZEROS = flags.DEFINE_bool(
    "drop_as_zeros",
    False,
    "replace dropped features with zeros that are not marked as missing, as in the paper",
)
_DRAWS = flags.DEFINE_integer("draws", 5, "random draws per rate", lower_bound=1)


def _evaluate() -> None:
    workdir = required_workdir(_WORKDIR, "a directory that `mister-jax train` has written")
    has_rates = bool(_DROP_SPEECH.value or _DROP_TEXT.value)
    if _DROP_AS_ZEROS.value and not has_rates:
        raise InputError("--drop_as_zeros requires --drop_speech or --drop_text")
    if _FIT.value and not _CALIBRATE.value:
        raise InputError("--fit_calibration: cannot be used with --nocalibrate")
    if has_rates and not _REPORT.value and _FIT.value:
        raise InputError("--fit_calibration with --drop_speech or --drop_text requires --report")
    if has_rates and _ADAPT.value:
        raise InputError("--adapt_features: cannot be used with --drop_speech or --drop_text")
    files = []
    options = {"dataset": _DATASET.value, "data_dir": _DATA_DIR.value, "output": _OUTPUT.value}
    if has_rates:
        files += _run_missing_modality_study(workdir, options)
    if _REPORT.value or not has_rates:
        files += _score_split(workdir, options)
    print(f"written to {_OUTPUT.value or workdir}: {', '.join(files)}")


def _run_missing_modality_study(workdir: str, options: dict[str, Any]) -> list[str]:
    """Runs the study, prints a table and returns the names of the files."""
    drop_speech, drop_text = _read_rates(_DROP_SPEECH), _read_rates(_DROP_TEXT)
    from mister_jax.console import missing_modality_table, output_console
    from mister_jax.evaluation.missing_modality import (
        MISSING_MODALITY,
        MISSING_MODALITY_AS_ZEROS,
        missing_modality_study,
    )

    points = missing_modality_study(
        workdir,
        _SPLIT.value,
        drop_speech=drop_speech,
        drop_text=drop_text,
        as_zeros=_DROP_AS_ZEROS.value,
        draws=_DRAWS.value,
        **options,
    )
    kind = " as zeros" if _DROP_AS_ZEROS.value else ""
    output_console().print(
        missing_modality_table(f"{_SPLIT.value}: missing modalities{kind}", points)
    )
    name = MISSING_MODALITY_AS_ZEROS if _DROP_AS_ZEROS.value else MISSING_MODALITY
    return [f"{name}.json", f"{name}.png"]


def _score_split(workdir: str, options: dict[str, Any]) -> list[str]:
    """Scores the split, prints a table and returns the names of the files."""
    from mister_jax.console import output_console, score_table
    from mister_jax.evaluation.results import evaluate

    scores = evaluate(
        workdir,
        _SPLIT.value,
        report=_REPORT.value,
        calibrate=_CALIBRATE.value,
        fit_calibration=_FIT.value,
        adapt_features=_ADAPT.value,
        **options,
    )
    output_console().print(score_table(_SPLIT.value, scores))
    files = ["metrics.json", "predictions.jsonl", "confusion.png"]
    return [*files, "report.html"] if _REPORT.value else files


def _read_rates(flag: flags.FlagHolder) -> list[float]:
    try:
        return [float(rate) for rate in flag.value] or [0.0]
    except ValueError as error:
        raise InputError(f"--{flag.name}={','.join(flag.value)}; allowed: numbers") from error


main = cluster.distributed(_evaluate)
