"""Compares the stored predictions of runs on the same utterances.

Differences between scores have paired confidence intervals: each resample draws the same dialogues
for both runs; see `confidence_intervals`. McNemar's exact test compares two counts: the utterances
that only the first run predicts correctly, and those that only the second run predicts correctly.
Unlike the intervals, the test treats utterances as independent.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import string
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mister_jax.checkpoint import BEST, Checkpoints
from mister_jax.data import load_features
from mister_jax.data.folds import load_fold, split_list
from mister_jax.errors import InputError
from mister_jax.evaluation.confidence_intervals import DialogueBootstrap, Estimate
from mister_jax.evaluation.figures import plot_differences
from mister_jax.evaluation.report import read_utterance_texts
from mister_jax.evaluation.split_predictions import SplitPredictions, group_index
from mister_jax.io import read_json, read_json_lines, write_json, write_text
from mister_jax.metrics import SCORE_NAMES, title
from mister_jax.workdir import config_path, read_config

FILES = ("comparison.json", "changed_utterances.csv", "comparison.png")
"""Files that `write_comparison` writes."""

_PREDICTIONS = "predictions.jsonl"


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Predictions of several runs for the same labeled utterances, in the same order.

    Attributes:
      runs: Paths of the runs.
      predictions: Predictions of each run.
    """

    runs: tuple[str, ...]
    predictions: tuple[SplitPredictions, ...]

    @property
    def letters(self) -> str:
        """Names of the runs, one capital letter per run, such as "AB" for two runs."""
        return string.ascii_uppercase[: len(self.runs)]

    @classmethod
    def from_runs(
        cls, runs: Sequence[epath.PathLike], split: str, dataset: str | None = None
    ) -> Comparison:
        """Reads the predictions that `evaluate` has stored for a split.

        Args:
          runs: Two or more work directories, or other folders with results of `evaluate`.
          split: Name of the split.
          dataset: Dataset of the predictions; by default each run's training dataset.

        Raises:
          InputError: The number of runs is unsupported, a run's predictions for the split are
            missing or outdated, the split has no labels, or the runs differ in their classes,
            labeled utterances or labels.
        """
        if not 2 <= len(runs) <= len(string.ascii_uppercase):
            raise InputError(
                f"{len(runs)} runs; needed: 2 to {len(string.ascii_uppercase)} work directories, "
                "such as `mister-jax compare RUN_A RUN_B`"
            )
        paths = [epath.Path(run) for run in runs]
        first, *others = (_read_rows(path, split, dataset) for path in paths)
        for path, rows in zip(paths[1:], others, strict=True):
            _check_same_utterances(paths[0], first, path, rows)
        class_names = tuple(next(iter(first.values()))["probabilities"])
        return cls(
            runs=tuple(map(str, runs)),
            predictions=tuple(
                _split_predictions([rows[key] for key in first], [*first], class_names, split)
                for rows in (first, *others)
            ),
        )


_Key = tuple[str, str]  # ids of the dialogue and the utterance


def _read_rows(path: epath.Path, split: str, dataset: str | None) -> dict[_Key, dict[str, Any]]:
    """Reads the labeled rows of a split from a run's stored predictions."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; needed: a work directory of a training run")
    file = path / _PREDICTIONS
    dataset_flag = f" --dataset={dataset}" if dataset else ""
    rows = read_json_lines(file) if file.exists() else []
    if dataset is None and config_path(path).exists():
        dataset = read_config(path).data.name
    selected = [
        row
        for row in rows
        if row.get("split") == split and dataset in (None, row.get("dataset", dataset))
    ]
    if not selected:
        raise InputError(
            f"{path}: split {split!r} is not evaluated; run `mister-jax evaluate "
            f"--workdir={path} --split={split}{dataset_flag}` first"
        )
    _check_current(path, split, str(selected[0].get("dataset", dataset)))
    # The datasets of a cross-validation may use the same dialogue ids.
    is_prefixed = len({row.get("dataset") for row in selected}) > 1
    labeled: dict[_Key, dict[str, Any]] = {}
    for row in selected:
        if row["label"] is None:
            continue
        prefix = f"{row['dataset']}/" if is_prefixed else ""
        key = (prefix + row["dialogue"], row["utterance"])
        if key in labeled:
            raise InputError(f"{file}: utterance {_describe(key)} occurs twice in split {split!r}")
        labeled[key] = row
    if not labeled:
        raise InputError(f"{file}: split {split!r} has no labels; needed: a labeled split")
    return labeled


def _check_current(path: epath.Path, split: str, dataset: str) -> None:
    """Raises InputError if training has found better parameters since the split was evaluated."""
    if not config_path(path).exists():  # The folder has only results, without a checkpoint.
        return
    metrics_path = path / "metrics.json"
    metrics_by_split = read_json(metrics_path) if metrics_path.exists() else {}
    scores = metrics_by_split.get(f"{dataset}/{split}") or metrics_by_split.get(split, {})
    with Checkpoints(path, read_only=True) as checkpoints:
        progress = checkpoints.progress(BEST)
    evaluated = scores.get("checkpoint", {}).get("epoch")
    if progress is not None and evaluated is not None and progress["epoch"] != evaluated:
        raise InputError(
            f"{path}: split {split!r} was evaluated with the parameters of epoch {evaluated}, but "
            f"the best epoch is now {progress['epoch']}; run `mister-jax evaluate "
            f"--workdir={path} --split={split}` again"
        )


def _describe(key: _Key) -> str:
    dialogue, utterance = key
    return f"{utterance} (dialogue {dialogue})"


def _check_same_utterances(
    first_path: epath.Path,
    first: Mapping[_Key, Mapping[str, Any]],
    path: epath.Path,
    rows: Mapping[_Key, Mapping[str, Any]],
) -> None:
    """Checks that two runs have the same labeled utterances, classes and labels."""
    for these, those, run, other in (
        (first, rows, path, first_path),
        (rows, first, first_path, path),
    ):
        missing = [key for key in these if key not in those]
        if missing:
            raise InputError(
                f"{run}: {len(missing)} of the {len(these)} labeled utterances of {other} are "
                f"missing, for example {_describe(missing[0])}; needed: runs on the same utterances"
            )
    classes, other_classes = (
        sorted(next(iter(run.values()))["probabilities"]) for run in (first, rows)
    )
    if classes != other_classes:
        raise InputError(
            f"{path}: classes {', '.join(other_classes)}; needed: the classes of {first_path}, "
            f"{', '.join(classes)}"
        )
    changed = [key for key, row in first.items() if row["label"] != rows[key]["label"]]
    if changed:
        key = changed[0]
        raise InputError(
            f"{path} and {first_path}: {len(changed)} of {len(first)} labels differ, for example "
            f"{rows[key]['label']} and {first[key]['label']} for utterance {_describe(key)}; "
            "needed: the same labels"
        )


def _split_predictions(
    rows: Sequence[Mapping[str, Any]],
    keys: Sequence[_Key],
    class_names: tuple[str, ...],
    split: str,
) -> SplitPredictions:
    """Converts rows to arrays; `keys` contains the ids of each row."""
    index = {name: number for number, name in enumerate(class_names)}
    dialogues = {dialogue: number for number, dialogue in enumerate(dict(keys))}
    return SplitPredictions(
        dataset=rows[0].get("dataset", ""),
        split=split,
        class_names=class_names,
        dialogue_ids=tuple(dialogues),
        dialogue_index=np.array([dialogues[dialogue] for dialogue, _ in keys]),
        utterance_ids=np.array([utterance for _, utterance in keys]),
        label=np.array([index[row["label"]] for row in rows]),
        predicted=np.array([index[row["emotion"]] for row in rows]),
        probabilities=np.array(
            [[row["probabilities"][name] for name in class_names] for row in rows]
        ),
        experts=(),
        votes=np.zeros((len(rows), 0), int),
        gate=None,
        group_index=group_index(rows),
    )


def compare_predictions(first: SplitPredictions, second: SplitPredictions) -> dict[str, Any]:
    """Compares two runs' predictions for the same utterances.

    Returns:
      A dict with these entries:

      - "scores": For each of `SCORE_NAMES`, the values of the "first" and the "second" run, and the
        "difference" (second minus first) with its interval.
      - "per_class": For each class, the same entries for the class's F1, and the "support".
      - "utterances": Numbers of utterances that are predicted correctly by "both" runs, by one run
        ("only_first", "only_second") or by "neither" run.
      - "mcnemar_p": p-value of McNemar's exact test.
      - "agreement": Share of utterances with equal predictions.
      - "dialogues": For each dialogue, its id ("dialogue"), its number of "utterances", and the
        numbers of correct predictions of the "first" and the "second" run. The dialogues with the
        largest absolute difference of these numbers come first.
    """
    bootstrap = DialogueBootstrap(first)
    scores = [bootstrap.scores(run.predicted) for run in (first, second)]

    def difference(name: str, index: Any = ()) -> dict[str, Any]:
        (value, resampled), (other_value, other_resampled) = (run[name] for run in scores)
        rows = (slice(None), *index) if index else slice(None)
        gain = Estimate.from_resamples(
            other_value[index] - value[index], other_resampled[rows] - resampled[rows]
        )
        return {
            "first": float(value[index]),
            "second": float(other_value[index]),
            "difference": gain.to_json(),
        }

    support = np.bincount(first.label, minlength=len(first.class_names))
    right, other_right = ~first.wrong, ~second.wrong
    only_first = int((right & ~other_right).sum())
    only_second = int((other_right & ~right).sum())
    return {
        "scores": {name: difference(name) for name in SCORE_NAMES},
        "per_class": {
            name: {"support": int(support[index]), **difference("f1", (index,))}
            for index, name in enumerate(first.class_names)
        },
        "utterances": {
            "both": int((right & other_right).sum()),
            "only_first": only_first,
            "only_second": only_second,
            "neither": int((~right & ~other_right).sum()),
        },
        "mcnemar_p": mcnemar_p(only_first, only_second),
        "agreement": float((first.predicted == second.predicted).mean()),
        "dialogues": _dialogues(first, right, other_right),
    }


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test.

    Exactly one run is correct on n utterances. Under the null hypothesis, each run is equally
    likely to be the correct one. With X ~ Binomial(n, 1/2) and k = min(only_first, only_second),
    p is min(1, 2 P(X <= k)).
    """
    total = only_first + only_second
    coefficient = tail = 1
    for index in range(min(only_first, only_second)):
        coefficient = coefficient * (total - index) // (index + 1)
        tail += coefficient
    # Integer arithmetic is exact, and dividing two large integers does not overflow.
    return min(1.0, 2 * tail / 2**total)


def _dialogues(
    predictions: SplitPredictions, right: np.ndarray, other_right: np.ndarray
) -> list[dict[str, Any]]:
    """Counts each run's correct predictions per dialogue; the largest differences come first."""
    count = len(predictions.dialogue_ids)
    totals, first, second = (
        np.bincount(predictions.dialogue_index, weights=values, minlength=count).astype(int)
        for values in (np.ones_like(right), right, other_right)
    )
    order = np.argsort(-abs(second - first), kind="stable")
    return [
        {
            "dialogue": predictions.dialogue_ids[index],
            "utterances": int(totals[index]),
            "first": int(first[index]),
            "second": int(second[index]),
        }
        for index in order
    ]


def write_comparison(
    comparison: Comparison, results: Sequence[Mapping[str, Any]], output: epath.PathLike
) -> None:
    """Writes `FILES`: all results, the utterances whose predictions differ, and a plot.

    Args:
      comparison: Predictions of the runs.
      results: Results of `compare_predictions` for the first run and each other run.
      output: Folder of the files; created if missing.
    """
    output = epath.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    runs = dict(zip(comparison.letters, comparison.runs, strict=True))
    pairs = [
        {"first": "A", "second": letter, **result}
        for letter, result in zip(comparison.letters[1:], results, strict=True)
    ]
    split = comparison.predictions[0].split
    write_json(output / FILES[0], {"split": split, "runs": runs, "comparisons": pairs})
    write_text(output / FILES[1], changed_csv(comparison, _read_texts(comparison)))
    differences = {}
    for letter, result in zip(comparison.letters[1:], results, strict=True):
        rows = {title(name): row["difference"] for name, row in result["scores"].items()}
        rows |= {f"F1: {name}": row["difference"] for name, row in result["per_class"].items()}
        differences[f"{letter} - A"] = {
            name: (row["value"], row["low"], row["high"]) for name, row in rows.items()
        }
    label = "difference" if len(results) > 1 else "difference, B - A"
    plot_differences(differences, f"{label}, with 95% interval", output / FILES[2])


def changed_csv(comparison: Comparison, texts: Mapping[str, str]) -> str:
    """Returns a CSV table of the utterances whose predictions differ between runs.

    Each run has three columns: its prediction, the probability of the prediction, and the
    probability of the label.
    """
    first = comparison.predictions[0]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [
        f"{letter}{column}"
        for letter in comparison.letters
        for column in ("", "_probability", "_label_probability")
    ]
    writer.writerow(["dialogue", "utterance", "text", "label", *columns])
    changed = np.any(
        [run.predicted != first.predicted for run in comparison.predictions[1:]], axis=0
    )
    for index in np.flatnonzero(changed):
        label, utterance = first.label[index], str(first.utterance_ids[index])
        cells: list[Any] = []
        for run in comparison.predictions:
            predicted, probabilities = run.predicted[index], run.probabilities[index]
            cells.append(first.class_names[predicted])
            cells += (round(float(probabilities[choice]), 6) for choice in (predicted, label))
        dialogue = first.dialogue_ids[first.dialogue_index[index]]
        label_name = first.class_names[label]
        writer.writerow([dialogue, utterance, texts.get(utterance, ""), label_name, *cells])
    return text.getvalue()


def _read_texts(comparison: Comparison) -> dict[str, str]:
    """Returns the transcripts by utterance id, from the first run whose dataset has them."""
    for run, predictions in zip(comparison.runs, comparison.predictions, strict=True):
        # A cross-validation has a work directory for each fold.
        folders = [epath.Path(run), *sorted(epath.Path(run).glob("fold_*"))]
        workdir = next((folder for folder in folders if config_path(folder).exists()), None)
        if workdir is None:
            continue
        data = read_config(workdir).data
        name, split, data_dir = predictions.dataset, predictions.split, data.data_dir or None
        features: Any
        try:
            if data.get("folds"):
                features = load_fold(
                    name,
                    split,
                    data.folds,
                    data.fold,
                    data_dir,
                    seed=data.get("fold_seed", 0),
                    pooled_splits=split_list(data.get("fold_splits", "")),
                )
            else:
                features = load_features(name, split, data_dir)
        except InputError:
            # An encoder's training dataset contains texts or recordings instead of features.
            features = types.SimpleNamespace(name=name, split=split, metadata={})
        texts = read_utterance_texts(features, data_dir)
        if texts:
            return texts
    return {}
