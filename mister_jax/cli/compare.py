"""Compares the predictions of two or more runs on the same utterances.

mister-jax compare RUN_A RUN_B --split=test
mister-jax compare RUN_A RUN_B RUN_C --split=validation --output=DIR

The command reads the predictions that `mister-jax evaluate` has stored in the work directories.
Each run is compared with the first run. The intervals are 95% bootstrap intervals over dialogues.
With --output, the command writes `comparison.json`, `changed_utterances.csv` and `comparison.png`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from mister_jax.errors import InputError

_SPLIT = flags.DEFINE_string("split", "test", "split of the dataset")
_DATASET = flags.DEFINE_string(
    "dataset", None, "dataset of the predictions; by default each run's training dataset"
)
_OUTPUT = flags.DEFINE_string("output", None, "folder of the files; by default nothing is written")

TAKES_ARGUMENTS = True
"""Whether `main` takes the arguments that are not flags."""

_MAX_DIALOGUES = 5


def main(runs: Sequence[str]) -> None:
    """Compares the work directories."""
    if len(runs) < 2:
        raise InputError("two runs are needed, such as `mister-jax compare RUN_A RUN_B`")
    from mister_jax.evaluation.comparison import (
        FILES,
        Comparison,
        compare_predictions,
        write_comparison,
    )

    comparison = Comparison.from_runs(runs, _SPLIT.value, _DATASET.value)
    first, *others = comparison.predictions
    results = [compare_predictions(first, other) for other in others]
    for letter, run, result in zip(comparison.letters[1:], runs[1:], results, strict=True):
        _print_result(runs[0], run, letter, result)
    if _OUTPUT.value:
        write_comparison(comparison, results, _OUTPUT.value)
        print(f"written to {_OUTPUT.value}: {', '.join(FILES)}")


def _print_result(first_run: str, run: str, letter: str, result: Mapping[str, Any]) -> None:
    from mister_jax.console import comparison_table, output_console
    from mister_jax.metrics import title

    console = output_console()
    gain = f"{letter} - A"

    def cells(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
        return {
            "A": {name: f"{row['first']:.3f}" for name, row in rows.items()},
            letter: {name: f"{row['second']:.3f}" for name, row in rows.items()},
            gain: {name: f"{row['difference']['value']:+.3f}" for name, row in rows.items()},
            "95% interval": {name: _interval(row["difference"]) for name, row in rows.items()},
        }

    scores = {title(name): row for name, row in result["scores"].items()}
    print(f"A: {first_run}\n{letter}: {run}\n")
    console.print(comparison_table(f"scores on {_SPLIT.value}", cells(scores)))
    classes = result["per_class"]
    support = {"support": {name: str(row["support"]) for name, row in classes.items()}}
    console.print(comparison_table("F1 per class", {**support, **cells(classes)}))
    print("*: the interval does not contain 0\n")
    counts = result["utterances"]
    print(
        f"utterances predicted correctly by both runs: {counts['both']}, only by A: "
        f"{counts['only_first']}, only by {letter}: {counts['only_second']}, by neither: "
        f"{counts['neither']}"
    )
    print(
        f"McNemar's exact test: p = {result['mcnemar_p']:.3g}; equal predictions: "
        f"{result['agreement']:.1%}"
    )
    changed = [row for row in result["dialogues"] if row["first"] != row["second"]]
    shown = {row["dialogue"]: row for row in changed[:_MAX_DIALOGUES]}
    if shown:
        columns = {
            "utterances": {name: str(row["utterances"]) for name, row in shown.items()},
            "right in A": {name: str(row["first"]) for name, row in shown.items()},
            f"right in {letter}": {name: str(row["second"]) for name, row in shown.items()},
        }
        console.print(comparison_table("dialogues with the largest differences", columns))


def _interval(difference: Mapping[str, float | None]) -> str:
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return ""
    mark = " *" if low > 0 or high < 0 else ""
    return f"{low:+.3f} to {high:+.3f}{mark}"
