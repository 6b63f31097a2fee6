"""Cross-validation: trains and scores one model per fold, and pools the test predictions.

Each fold trains in a subfolder of the work directory and can be resumed. Several folds can train at
the same time. If the folds divide one dataset, each labeled utterance is tested in one fold.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mister_jax import metrics
from mister_jax.data import SPLITS, UNLABELED, DialogueFeatures, split_names
from mister_jax.data.folds import check_folds, fold_groups, load_pooled, make_folds, split_list
from mister_jax.data.schema import MODALITIES
from mister_jax.errors import InputError
from mister_jax.evaluation.confidence_intervals import DialogueBootstrap, Estimate
from mister_jax.evaluation.figures import plot_confusion
from mister_jax.evaluation.scores import score_other_targets
from mister_jax.evaluation.split_predictions import NO_VOTE, SplitPredictions, group_index
from mister_jax.evaluation.variants import Row, Study, Variant
from mister_jax.io import read_json, read_json_lines, write_json, write_text
from mister_jax.models import EXPERTS

FILES = ("crossval.json", "crossval.csv", "crossval.md", "crossval.png", "predictions.jsonl")
"""Files that `cross_validate` writes."""

_MAX_LISTED = 10  # maximum number of values that are listed per fold

_COLUMNS = {
    "uar": "UA (UAR)",
    "accuracy": "WA (accuracy)",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
}

# Scores of `score_other_targets`, which only some models and datasets have: entry in the scores of
# a split -> {name of the score: title}.
_OTHER_COLUMNS = {
    "regression": {
        "mae": "MAE",
        "pearson_r": "Pearson's r",
        "accuracy_7": "7-class accuracy",
        "accuracy_5": "5-class accuracy",
    },
    "raters": {
        "kl_divergence": "KL divergence",
        "js_divergence": "JS divergence",
        "any_rater_accuracy": "any-rater accuracy",
    },
}


def folds_of_dataset(config: ConfigDict, spec: str) -> list[Variant]:
    """Returns the folds of the config's dataset; `spec` is described in `data.folds.Folds`.

    Raises:
      InputError: The dataset or the column in `spec` does not exist, the column has too few values,
        or a split of a fold would have no dialogue or no labeled utterance.
    """
    splits = split_list(config.data.get("fold_splits", ""))
    pooled = load_pooled(config.data.name, config.data.data_dir or None, splits)
    folds = make_folds(pooled, spec, config.data.fold_seed)
    check_folds(pooled, folds)
    _warn_of_tuned_encoders(pooled)
    result = []
    for index, (name, members) in enumerate(zip(folds.names, folds.members, strict=True)):
        changed = ConfigDict(config.to_dict())
        changed.data.folds, changed.data.fold = spec, index
        change = "" if members == (name,) else ", ".join(members)
        if len(members) > _MAX_LISTED:
            change = f"{len(members)} values of {spec.partition(':')[0]}"
        result.append(Variant(f"fold_{_folder_name(name)}", change, changed))
    return _with_unique_names(result)


def _warn_of_tuned_encoders(features: DialogueFeatures) -> None:
    """Warns if an encoder was fine-tuned on a corpus whose utterances are now in test folds."""
    for modality in MODALITIES:
        encoder = features.metadata.get(modality)
        if isinstance(encoder, Mapping) and encoder.get("kind") == "tuned":
            corpus = encoder.get("config", {}).get("data", {}).get("name")
            if corpus == encoder.get("dataset"):
                logging.warning(
                    "the %s encoder of dataset %s was fine-tuned on %s: it has seen labels of "
                    "utterances that are now in test folds, so the scores are too high",
                    modality,
                    features.name,
                    corpus,
                )


def _with_unique_names(folds: list[Variant]) -> list[Variant]:
    names = [fold.name for fold in folds]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"folds: {', '.join(repeated)} repeated; needed: unique names")
    return folds


def folds_of_datasets(config: ConfigDict, names: Sequence[str]) -> list[Variant]:
    """Returns one fold per dataset, such as a fold of EmoBox, with the dataset's splits.

    Raises:
      InputError: A dataset does not exist, lacks a split, or is repeated.
    """
    result = []
    for name in names:
        splits = split_names(name, config.data.data_dir or None)
        missing = [split for split in SPLITS if split not in splits]
        if missing:
            raise InputError(f"dataset {name}: no split {', '.join(missing)}; needed in each fold")
        changed = ConfigDict(config.to_dict())
        changed.data.name = name
        result.append(Variant(f"fold_{_folder_name(name)}", "", changed))
    return _with_unique_names(result)


def cross_validate(
    folds: Sequence[Variant],
    workdir: epath.PathLike,
    *,
    models_at_once: int | None = None,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Trains and scores a model for each fold, and writes `FILES`.

    Completed folds are skipped, and interrupted folds resume.

    Args:
      folds: Result of `folds_of_dataset` or `folds_of_datasets`.
      workdir: Work directory of the cross-validation, created if it does not exist.
      models_at_once: Maximum number of models, one per seed, that train at the same time; the seeds
        of a fold always train together. By default, 16 on accelerators; on CPU, folds train one
        after another. The scores do not depend on this number, up to rounding.
      quiet: Whether to hide progress.

    Returns:
      None if SIGTERM interrupted a fold, otherwise a dict with these entries:

      - "folds": For each fold, the name ("fold"), the values of the column that are in the fold, as
        text ("members"; empty if the fold is named after its only value), the number of labeled
        test "utterances", and the mean of each score over the seeds. If the model predicts scores
        or the dataset has ratings, the ensemble's scores on them follow; see
        `scores.score_other_targets`.
      - "mean" and "deviation": Mean and standard deviation of each score over the folds.
      - "num_seeds": Number of seeds.
      - "pooled": Scores of the test predictions of all folds together, with the entries of
        `scores.score_other_targets`. With several seeds, the ensemble's predictions are scored.
      - "pooled_intervals": Confidence intervals of the pooled scores.
      - "interval_unit": What the intervals resample: the column of the folds, such as "speaker", or
        "dialogue".
      - "confusion": Confusion matrix of the pooled predictions.

    Raises:
      InputError: A config is invalid, a fold's directory belongs to another config, or the folds
        have different classes.
    """
    study = Study(
        folds,
        workdir,
        splits=("test",),
        row_file="fold.json",
        kind="fold",
        models_at_once=models_at_once or _default_models_at_once(),
        quiet=quiet,
    )
    if not study.run(_describe, on_completed=lambda: None):
        return None
    return _summarize(study)


def _default_models_at_once() -> int:
    # The steps of one model keep a CPU busy, and the CPU's caches are too small for several models.
    return 1 if jax.default_backend() == "cpu" else 16


def _describe(row: Row) -> str:
    mean = row["test"]["mean"]
    return ", ".join(f"{title} {mean[name]:.3f}" for name, title in _COLUMNS.items())


def _folder_name(name: str) -> str:
    """Replaces characters in a fold's name that may not be safe in a folder's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _summarize(study: Study) -> dict[str, Any]:
    """Writes the files of the cross-validation and returns its scores."""
    folders = [study.folder(fold) for fold in study.variants]
    scores = [read_json(folder / "metrics.json")["test"] for folder in folders]
    class_names = list(scores[0]["per_class"])
    if any(list(fold_scores["per_class"]) != class_names for fold_scores in scores):
        raise InputError(
            f"{study.workdir}: the folds have different classes; needed: the same classes"
        )
    rows = [
        {
            "fold": row["variant"],
            "members": row["change"],
            "utterances": fold_scores["utterances"],
            **{name: row["test"]["mean"][name] for name in metrics.SCORE_NAMES},
            **{
                name: fold_scores[entry].get(name)
                for entry, titles in _OTHER_COLUMNS.items()
                if entry in fold_scores
                for name in titles
            },
        }
        for row, fold_scores in zip(study.rows(), scores, strict=True)
    ]
    scored = [row for row in rows if row["utterances"]]
    for row in rows:
        if not row["utterances"]:
            logging.warning(
                "%s is left out of the mean, because no test utterance has a label", row["fold"]
            )
    over_folds = {
        name: metrics.mean_and_deviation([row[name] for row in scored])
        for name in metrics.SCORE_NAMES
    }
    for name in _other_titles(rows):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            over_folds[name] = metrics.mean_and_deviation(values)
    confusion = np.sum([fold_scores["confusion"] for fold_scores in scores], axis=0)
    predicted_rows = _test_rows(study.variants, folders)
    predictions = pool_predictions(predicted_rows, class_names)
    result = {
        "folds": rows,
        "num_seeds": study.variants[0].config.num_seeds,
        "mean": {name: mean for name, (mean, _) in over_folds.items()},
        "deviation": {name: deviation for name, (_, deviation) in over_folds.items()},
        "pooled": {
            **metrics.classification_scores(confusion, class_names),
            **_score_pooled_targets(predicted_rows, predictions),
        },
        "pooled_intervals": _intervals(predictions),
        "interval_unit": _interval_unit(study.variants[0].config, predictions),
        "confusion": confusion.tolist(),
    }
    if jax.process_index() == 0:
        workdir = study.workdir
        write_json(workdir / "crossval.json", result)
        write_text(workdir / "crossval.csv", _csv(rows))
        write_text(workdir / "crossval.md", markdown(result))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predicted_rows)
        write_text(workdir / "predictions.jsonl", lines)
        title = f"all folds, weighted F1 {result['pooled']['weighted_f1']:.3f}"
        plot_confusion({title: confusion}, class_names, workdir / "crossval.png")
    return result


def _test_rows(folds: Sequence[Variant], folders: Sequence[epath.Path]) -> list[dict[str, Any]]:
    """Reads the test predictions of all folds.

    If the folds divide a column other than the dialogue, each row has its value as "group".
    """
    rows = [
        row
        for fold, folder in zip(folds, folders, strict=True)
        for row in read_json_lines(folder / "predictions.jsonl")
        if row["split"] == "test" and row["dataset"] == fold.config.data.name
    ]
    # Test splits also contain other folds' utterances, without labels, as context.
    labeled = [(row["dialogue"], row["utterance"]) for row in rows if row["label"] is not None]
    repeated = len(labeled) - len(set(labeled))
    if repeated:
        logging.warning(
            "%d utterances with the same ids are in the test splits of several folds; the "
            "intervals treat dialogues with the same id as one dialogue",
            repeated,
        )
    config = folds[0].config.data
    if config.get("folds"):
        pooled = load_pooled(config.name, config.data_dir or None, split_list(config.fold_splits))
        groups = fold_groups(pooled, config.folds)
        if groups is not None:
            dialogues = np.repeat(np.array(pooled.dialogue_ids, str), pooled.lengths)
            keys = zip(dialogues.tolist(), pooled.utterance_ids.astype(str).tolist(), strict=True)
            group_of = dict(zip(keys, groups.tolist(), strict=True))
            for row in rows:
                row["group"] = group_of[row["dialogue"], row["utterance"]]
    return rows


def pool_predictions(
    rows: Sequence[Mapping[str, Any]], class_names: Sequence[str]
) -> SplitPredictions:
    """Combines the test predictions of all folds.

    Utterances of one dialogue get the same `dialogue_index`, even if they are tested in two folds.

    Args:
      rows: Rows of `predictions.jsonl`, which may have a "group".
      class_names: Names of the classes.
    """
    index: dict[str | None, int] = {name: number for number, name in enumerate(class_names)}
    index[None] = UNLABELED
    votes_by_row = [row.get("experts", {}) for row in rows]
    # An expert whose modality is missing in all utterances is left out.
    experts = tuple(name for name in EXPERTS if any(votes.get(name) for votes in votes_by_row))
    votes = [
        [NO_VOTE if votes.get(name) is None else index[votes[name]] for name in experts]
        for votes in votes_by_row
    ]
    dialogues, dialogue_index = np.unique([row["dialogue"] for row in rows], return_inverse=True)
    return SplitPredictions(
        dataset=rows[0]["dataset"],
        split="test",
        class_names=tuple(class_names),
        dialogue_ids=tuple(dialogues.tolist()),
        dialogue_index=dialogue_index,
        utterance_ids=np.array([row["utterance"] for row in rows]),
        label=np.array([index[row["label"]] for row in rows]),
        predicted=np.array([index[row["emotion"]] for row in rows]),
        probabilities=np.array([list(row["probabilities"].values()) for row in rows]),
        experts=experts,
        votes=np.array(votes, int).reshape(len(rows), len(experts)),
        gate=None,
        group_index=group_index(rows),
    )


def _score_pooled_targets(
    rows: Sequence[Mapping[str, Any]], predictions: SplitPredictions
) -> dict[str, Any]:
    """Returns the result of `score_other_targets` for the test predictions of all folds."""

    def column(name: str) -> np.ndarray | None:
        """Returns the numbers in a column, NaN if unknown; None if no row has the column."""
        if not any(name in row for row in rows):
            return None
        return np.array([row.get(name) for row in rows], float)

    ratings = None
    if any("ratings" in row for row in rows):
        no_ratings = dict.fromkeys(predictions.class_names, 0)
        counts = [row.get("ratings", no_ratings) for row in rows]
        ratings = np.array([[row[name] for name in predictions.class_names] for row in counts])
    return score_other_targets(
        predictions.class_names,
        predictions.label,
        predictions.probabilities,
        score=column("true_score"),
        predicted_score=column("score"),
        ratings=ratings,
    )


def _other_titles(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the names and titles of the `_OTHER_COLUMNS` that some fold has."""
    return {
        name: title
        for titles in _OTHER_COLUMNS.values()
        for name, title in titles.items()
        if any(name in row for row in rows)
    }


def _interval_unit(config: ConfigDict, predictions: SplitPredictions) -> str:
    column = config.data.get("folds", "").partition(":")[0]
    return "dialogue" if predictions.group_index is None else column


def _intervals(predictions: SplitPredictions) -> dict[str, dict[str, float | None]]:
    """Returns the confidence intervals of the pooled scores; see `confidence_intervals`."""
    scores = DialogueBootstrap(predictions).scores(predictions.predicted)
    return {name: Estimate.from_resamples(*scores[name]).to_json() for name in metrics.SCORE_NAMES}


def markdown(result: Mapping[str, Any]) -> str:
    """Returns Markdown tables with the scores of each fold, and of all folds.

    Scores of `score_other_targets` are in a second table. Notes below say which scores are those of
    the ensemble of several seeds, and what the intervals resample.
    """
    lines = [
        f"| fold | utterances | {' | '.join(_COLUMNS.values())} |",
        f"|---|---{'|---' * len(_COLUMNS)}|",
    ]
    for row in result["folds"]:
        cells = (f"{row[name]:.3f}" for name in _COLUMNS)
        lines.append(f"| {row['fold']} | {row['utterances']} | {' | '.join(cells)} |")
    cells = (f"{result['mean'][name]:.3f} ± {result['deviation'][name]:.3f}" for name in _COLUMNS)
    lines.append(f"| mean ± deviation | | {' | '.join(cells)} |")
    cells = (_interval_cell(result["pooled_intervals"][name]) for name in _COLUMNS)
    utterances = result["pooled"]["utterances"]
    lines.append(f"| pooled | {utterances} | {' | '.join(cells)} |")
    other = _other_titles(result["folds"])
    if other:
        lines += ["", f"| fold | {' | '.join(other.values())} |", f"|---{'|---' * len(other)}|"]
        for row in result["folds"]:
            lines.append(
                f"| {row['fold']} | {' | '.join(_cell(row.get(name)) for name in other)} |"
            )
        mean, deviation = (
            [result[key].get(name) for name in other] for key in ("mean", "deviation")
        )
        cells = (f"{_cell(a)} ± {_cell(b)}" for a, b in zip(mean, deviation, strict=True))
        lines.append(f"| mean ± deviation | {' | '.join(cells)} |")
        pooled = {**result["pooled"].get("regression", {}), **result["pooled"].get("raters", {})}
        lines.append(f"| pooled | {' | '.join(_cell(pooled.get(name)) for name in other)} |")
    notes = [f"The intervals of the pooled scores are resampled by {result['interval_unit']}."]
    if result["num_seeds"] > 1:
        notes.append(
            f"Scores of folds are means of {result['num_seeds']} seeds. Pooled scores"
            f"{', and all scores in the second table,' if other else ''} are those of the ensemble."
        )
    lines += ["", " ".join(notes)]
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval_cell(estimate: Mapping[str, float | None]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = (*metrics.SCORE_NAMES, *_other_titles(rows))
    writer.writerow(["fold", "members", "utterances", *names])
    for row in rows:
        scores = [row.get(name) for name in names]
        writer.writerow([row["fold"], row["members"], row["utterances"], *scores])
    return file.getvalue()
