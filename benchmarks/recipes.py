"""Compares recipes of MiSTER-E by cross-validation on the training and validation dialogues.

    mister-jax benchmark --workdir=DIR --set=meld_dev_features@dialogue:5
        --set=urdu_voices@speaker:5 --recipe=default --recipe="wide: model.context_dim=256"
        --recipe="released: paper train.epochs=40 optimizer.learning_rate=1e-4" --num_seeds=3

A recipe is a name, a colon, and the variants of configs/fusion.py and config fields that differ
from the default. A set is a feature dataset with its folds; see `mister-jax crossval`. Only sets of
the form DATASET@test read a dataset's test split; use such a set to confirm the choice of a recipe.
On such a set, every model trains on the training split, selects its epoch on the validation split,
and is scored on the test split.

On any other set, such as DATASET@dialogue:5, each recipe trains one model per fold. This model
trains on the dialogues of all other folds, for the full number of epochs, without validation, and
predicts the dialogues of its fold. The predictions of all folds are scored together. In addition to
the recipes, the table has each expert of the first recipe, and logistic regression on the features
of an utterance and its neighbors. The number of neighbors and the strength of the regularization
are selected on the validation dialogues of each fold. The difference from the first recipe has a
95% confidence interval from a paired bootstrap over dialogues, or over the values of the folds'
column, such as speakers.

If the best of many recipes is chosen by its score, this score is biased upward. The table therefore
states how many recipes were tried. Confirm the choice on a test split. With several seeds, the
scores are the ensemble's scores, and a column has the mean and standard deviation of the single
seeds. Run the command again to resume, or to add sets and recipes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from rich.table import Table

from mister_jax import data
from mister_jax.configs import fusion
from mister_jax.data.features import load_features
from mister_jax.data.folds import load_pooled, make_folds, select_fold
from mister_jax.data.schema import MODALITIES, DialogueFeatures
from mister_jax.data.standardizer import Standardizer
from mister_jax.errors import InputError
from mister_jax.evaluation.comparison import compare_predictions
from mister_jax.evaluation.cross_validation import (
    cross_validate,
    folds_of_dataset,
    folds_of_datasets,
    pool_predictions,
)
from mister_jax.evaluation.split_predictions import NO_VOTE, SplitPredictions
from mister_jax.evaluation.sweep import parse_grid
from mister_jax.evaluation.variants import Variant
from mister_jax.io import read_json, read_json_lines, write_json, write_text
from mister_jax.metrics import mean_and_deviation

SPLITS = ("train", "validation")
"""Splits whose dialogues are divided into folds."""

WINDOWS = (0, 1, 2, 3)
"""Numbers of neighbors on each side that logistic regression chooses from."""

REGULARIZATION = (1e-3, 1e-2, 1e-1, 1.0)
"""Values of scikit-learn's `C` that logistic regression chooses from."""

FILES = ("recipes.json", "recipes.md")
"""Files that `compare_recipes` writes."""

_TEST = "test"
_REGRESSION = "logistic regression"
_SCORES = ("weighted_f1", "macro_f1", "uar")


@dataclasses.dataclass(frozen=True)
class FoldedSet:
    """A feature dataset and its folds.

    Attributes:
      name: Name of the dataset.
      folds: Folds in the notation of `data.folds.Folds`, or "test" for the dataset's own splits.
    """

    name: str
    folds: str

    @property
    def uses_test_split(self) -> bool:
        """Whether the recipes are scored on the dataset's test split."""
        return self.folds == _TEST

    @property
    def folder(self) -> str:
        """Name of the set's folder in the work directory."""
        return f"{self.name}_test" if self.uses_test_split else self.name

    @classmethod
    def parse(cls, text: str) -> FoldedSet:
        """Parses "DATASET@FOLDS", such as "meld_dev_features@dialogue:5"."""
        name, at, folds = text.partition("@")
        if not (name and at and folds):
            raise InputError(
                f"--set={text}; needed: DATASET@FOLDS, such as meld_dev_features@dialogue:5, or "
                "DATASET@test"
            )
        return cls(name, folds)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Changes to the default config.

    Attributes:
      name: Name of the recipe, and of its folders.
      variants: Variants of configs/fusion.py, in order.
      values: "FIELD=VALUE" for each config field that differs.
    """

    name: str
    variants: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Parses "NAME" or "NAME: VARIANT FIELD=VALUE ...", with the changes in any order."""
        name, _, changes = (part.strip() for part in text.partition(":"))
        if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
            raise InputError(
                f"--recipe={text}: the name {name!r}; allowed: letters, digits, '-', '_' and '.'"
            )
        parts = changes.split()
        return cls(
            name,
            tuple(part for part in parts if "=" not in part),
            tuple(part for part in parts if "=" in part),
        )

    def config(self, of: FoldedSet, data_dir: str, num_seeds: int) -> ConfigDict:
        """Returns the recipe's config for a set.

        Raises:
          InputError: A variant, field or value does not exist.
        """
        config = fusion.get_config(",".join((of.name, *self.variants)))
        for text in self.values:
            try:
                axis = parse_grid(config, text)
            except InputError as error:
                message = str(error).removeprefix("--grid=")
                raise InputError(f"recipe {self.name}: {message}") from error
            if len(axis.values) != 1:
                raise InputError(f"recipe {self.name}: {text}; allowed: one value per field")
            section: Any = config
            *path, field = axis.field.split(".")
            for part in path:
                section = section[part]
            section[field] = axis.values[0]
        config.num_seeds = num_seeds
        config.data.data_dir = data_dir
        if of.uses_test_split:
            return config
        config.data.fold_splits = ",".join(SPLITS)
        # Nothing is chosen on validation, so models also train on the validation dialogues.
        config.data.validate_on_train = True
        config.train.select_by = "last"
        return config


def compare_recipes(
    sets: Sequence[FoldedSet],
    recipes: Sequence[Recipe],
    workdir: epath.PathLike,
    *,
    data_dir: str = "",
    num_seeds: int = 1,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Cross-validates every recipe on every set, and writes `FILES`.

    Args:
      sets: Datasets with their folds.
      recipes: Recipes. All others are compared with the first recipe.
      workdir: Work directory, created if it does not exist. Complete folds in it are not repeated.
      data_dir: Directory of the datasets; by default, TFDS's default directory.
      num_seeds: Number of seeds of each model.
      quiet: Whether to hide progress.

    Returns:
      The content of `recipes.json`: the names of the "recipes", and the "sets". Each set has "rows"
      with the scores, the difference from the first recipe with its interval, and the seconds of
      the cross-validation. None if SIGTERM interrupted the training.

    Raises:
      InputError: A dataset, fold or recipe does not exist, or a name is repeated.
    """
    for names in ([of.folder for of in sets], [recipe.name for recipe in recipes]):
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise InputError(f"{', '.join(repeated)} repeated; needed: each set and recipe once")
    workdir = epath.Path(workdir)
    configs = {
        (of, recipe): recipe.config(of, data_dir, num_seeds) for of in sets for recipe in recipes
    }
    folds = {
        (of, recipe): (
            folds_of_datasets(config, [of.name])
            if of.uses_test_split
            else folds_of_dataset(config, of.folds)
        )
        for (of, recipe), config in configs.items()
    }
    result: dict[str, Any] = {"recipes": [recipe.name for recipe in recipes], "sets": {}}
    for of in sets:
        predictions: dict[str, SplitPredictions] = {}
        details: dict[str, dict[str, Any]] = {}
        for recipe in recipes:
            folder = workdir / of.folder / recipe.name
            started = time.perf_counter()
            scores = cross_validate(folds[of, recipe], folder, quiet=quiet)
            if scores is None:
                return None
            # A repeated command only reads the results, so do not replace the stored run time.
            if not (folder / "seconds.json").exists():
                write_json(folder / "seconds.json", {"seconds": time.perf_counter() - started})
            predictions[recipe.name] = _read_predictions(folder / "predictions.jsonl")
            details[recipe.name] = {
                "mean_over_folds": scores["mean"]["weighted_f1"],
                "single_seeds": _single_seeds(folder, folds[of, recipe]),
                **read_json(folder / "seconds.json"),
            }
        first = predictions[recipes[0].name]
        # If the model has only one expert, the expert's predictions are the model's predictions.
        for name in first.experts if len(first.experts) > 1 else ():
            predictions[f"{recipes[0].name}, {name} expert"] = _of_expert(first, name)
        parts = _parts(of, data_dir or None, configs[of, recipes[0]].data.fold_seed)
        print(f"{of.folder}: {_REGRESSION}, which can take minutes", flush=True)
        predictions[_REGRESSION] = _align(predict_by_regression(parts), first)
        result["sets"][of.folder] = {
            "dataset": of.name,
            "folds": of.folds,
            "rows": [
                _row(name, predicted, first) | details.get(name, {})
                for name, predicted in predictions.items()
            ],
        }
        write_json(workdir / "recipes.json", result)
        write_text(workdir / "recipes.md", markdown(result))
    return result


def _row(name: str, predicted: SplitPredictions, first: SplitPredictions) -> dict[str, Any]:
    # An expert may predict only some utterances, so score the first recipe on the same utterances.
    same = np.where(predicted.predicted >= 0, first.predicted, NO_VOTE)
    compared = compare_predictions(dataclasses.replace(first, predicted=same), predicted)["scores"]
    row: dict[str, Any] = {"name": name, **{score: compared[score]["second"] for score in _SCORES}}
    if predicted is not first:
        row["difference"] = compared["weighted_f1"]["difference"]
    return row


def _single_seeds(workdir: epath.Path, folds: Sequence[Variant]) -> list[float]:
    """Returns the weighted F1 of each seed, as the mean over the folds."""
    rows = [read_json(workdir / fold.name / "fold.json")["test"]["of_each"] for fold in folds]
    return [float(np.mean([row[seed]["weighted_f1"] for row in rows])) for seed in rows[0]]


def _read_predictions(path: epath.Path) -> SplitPredictions:
    """Reads the labeled predictions of a cross-validation."""
    rows = [row for row in read_json_lines(path) if row["label"] is not None]
    return pool_predictions(rows, tuple(rows[0]["probabilities"]))


def _of_expert(predictions: SplitPredictions, name: str) -> SplitPredictions:
    """Returns the predictions of one expert instead of the mixture."""
    votes = predictions.votes[:, predictions.experts.index(name)]
    return dataclasses.replace(predictions, predicted=votes)


def _align(predicted: Mapping[tuple[str, str], int], like: SplitPredictions) -> SplitPredictions:
    """Arranges predictions, given by dialogue and utterance id, in the order of `like`."""
    dialogues = [like.dialogue_ids[index] for index in like.dialogue_index]
    keys = zip(dialogues, like.utterance_ids.tolist(), strict=True)
    return dataclasses.replace(like, predicted=np.array([predicted[key] for key in keys]))


@dataclasses.dataclass(frozen=True)
class Parts:
    """The dialogues of one fold.

    Attributes:
      train: Dialogues for training.
      validation: Dialogues for choosing hyperparameters.
      fit: Dialogues on which the chosen model is fitted.
      test: Dialogues that are predicted.
    """

    train: DialogueFeatures
    validation: DialogueFeatures
    fit: DialogueFeatures
    test: DialogueFeatures


def _parts(of: FoldedSet, data_dir: str | None, fold_seed: int) -> list[Parts]:
    """Returns the parts of each fold of a set; the recipes use the same parts."""
    if of.uses_test_split:
        train, validation, test = (load_features(of.name, split, data_dir) for split in data.SPLITS)
        return [Parts(train=train, validation=validation, fit=train, test=test)]
    pooled = load_pooled(of.name, data_dir, SPLITS)
    folds = make_folds(pooled, of.folds, fold_seed)
    return [
        Parts(
            train=select_fold(pooled, folds, fold, "train"),
            validation=select_fold(pooled, folds, fold, "validation"),
            fit=select_fold(pooled, folds, fold, "train", validate_on_train=True),
            test=select_fold(pooled, folds, fold, "test"),
        )
        for fold in range(len(folds.names))
    ]


def predict_by_regression(parts_of_folds: Sequence[Parts]) -> dict[tuple[str, str], int]:
    """Predicts every labeled test utterance by logistic regression.

    Returns:
      Predicted class by dialogue id and utterance id.
    """
    predicted = {}
    for parts in parts_of_folds:
        window, strength = _choose_regression(parts.train, parts.validation)
        model = _Regression(parts.fit, window, strength)
        test = parts.test
        dialogues = np.repeat(np.array(test.dialogue_ids, object), test.lengths)
        for dialogue, utterance, label, value in zip(
            dialogues, test.utterance_ids, test.label, model.predict(test), strict=True
        ):
            if label >= 0:
                predicted[dialogue, str(utterance)] = int(value)
    return predicted


def _choose_regression(train: DialogueFeatures, validation: DialogueFeatures) -> tuple[int, float]:
    """Returns the window and the regularization with the lowest validation cross-entropy."""
    # If all dialogues have one utterance, there are no neighbors.
    windows = WINDOWS if train.lengths.max() > 1 else WINDOWS[:1]
    losses: dict[tuple[int, float], float] = {}
    for window in windows:
        lowest = np.inf
        # Try the strongest regularization first and stop when the loss rises, because training
        # with weak regularization converges slowly.
        for strength in REGULARIZATION:
            loss = _Regression(train, window, strength).cross_entropy(validation)
            losses[window, strength] = loss
            if loss > lowest:
                break
            lowest = loss
    return min(losses, key=losses.__getitem__)


class _Regression:
    """Logistic regression on the standardized features of an utterance and its neighbors."""

    def __init__(self, features: DialogueFeatures, window: int, strength: float):
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise InputError(
                "logistic regression needs scikit-learn: pip install scikit-learn"
            ) from error

        self._window = window
        self._standardizers = {
            name: Standardizer.fit(getattr(features, name)[present])
            for name in MODALITIES
            if (present := getattr(features, f"{name}_present")).any()
        }
        labeled = features.label >= 0
        self._model = LogisticRegression(C=strength, max_iter=300)
        self._model.fit(self._inputs(features)[labeled], features.label[labeled])

    def predict(self, features: DialogueFeatures) -> np.ndarray:
        """Returns the most probable class of each utterance, [N] int."""
        return self._model.predict(self._inputs(features))

    def cross_entropy(self, features: DialogueFeatures) -> float:
        """Returns the mean cross-entropy of the labels."""
        labeled = features.label >= 0
        probabilities = self._model.predict_proba(self._inputs(features)[labeled])
        classes = {label: index for index, label in enumerate(self._model.classes_.tolist())}
        # A class without training utterances has probability 0.
        values = [
            probabilities[row, classes[label]] if label in classes else 0.0
            for row, label in enumerate(features.label[labeled].tolist())
        ]
        return float(-np.log(np.maximum(values, 1e-9)).mean())

    def _inputs(self, features: DialogueFeatures) -> np.ndarray:
        """Returns the vectors of each utterance and its neighbors; missing neighbors are zeros."""
        vectors = np.concatenate(
            [
                np.where(
                    getattr(features, f"{name}_present")[:, None],
                    standardizer(getattr(features, name)),
                    0,
                )
                for name, standardizer in self._standardizers.items()
            ],
            axis=1,
        )
        dialogue = np.repeat(np.arange(len(features.lengths)), features.lengths)
        rows = np.arange(len(vectors))
        shifted = []
        for offset in range(-self._window, self._window + 1):
            source = np.clip(rows + offset, 0, len(rows) - 1)
            is_neighbor = (source == rows + offset) & (dialogue[source] == dialogue)
            shifted.append(np.where(is_neighbor[:, None], vectors[source], 0))
        return np.concatenate(shifted, axis=1)


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the results as Markdown."""
    count = len(result["recipes"])
    lines = [f"{count} recipe{'s' if count > 1 else ''} tried: {', '.join(result['recipes'])}.", ""]
    for of in result["sets"].values():
        lines += [f"{_title(of)}:", "", "|".join(["", *_COLUMNS, ""])]
        lines += ["|---" * len(_COLUMNS) + "|"]
        lines += ["|".join(["", *_cells(row), ""]) for row in of["rows"]]
        lines += [""]
    return "\n".join(lines)


_COLUMNS = (
    "",
    "weighted F1",
    "difference (95% interval)",
    "macro F1",
    "UAR",
    "single seeds",
    "seconds",
)


def _title(of: Mapping[str, Any]) -> str:
    return f"{of['dataset']}, {'test split' if of['folds'] == _TEST else 'folds ' + of['folds']}"


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Returns the results as one table per set."""
    result_tables = []
    for of in result["sets"].values():
        table = Table(*_COLUMNS, title=_title(of))
        for row in of["rows"]:
            table.add_row(*_cells(row))
        result_tables.append(table)
    return result_tables


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    difference = row.get("difference")
    cell = ""
    if difference is not None:
        cell = f"{difference['value']:+.3f}"
        if difference["low"] is not None:
            cell += f" ({difference['low']:+.3f} to {difference['high']:+.3f})"
    scores = {score: f"{row[score]:.3f}" for score in _SCORES}
    seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
    seeds = ""
    if len(row.get("single_seeds", ())) > 1:
        mean, deviation = mean_and_deviation(row["single_seeds"])
        seeds = f"{mean:.3f} ± {deviation:.3f}"
    return row["name"], scores["weighted_f1"], cell, *list(scores.values())[1:], seeds, seconds
