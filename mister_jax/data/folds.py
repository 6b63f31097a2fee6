"""Cross-validation folds: splits of a feature dataset that replace its own.

A fold's test split has the dialogues of one group, such as a session or a speaker. Its validation
split has the dialogues of the next groups, and its training split all other dialogues.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mister_jax.data.features import load_features, split_names
from mister_jax.data.schema import MODALITIES, SPLITS, UNLABELED, DialogueFeatures
from mister_jax.data.split_guard import all_splits_allowed, check_split_allowed
from mister_jax.errors import InputError

DIALOGUE = "dialogue"
"""Column of the dialogue ids, which every dataset has."""

FOLD = "fold"
"""Key of the test fold's name in the metadata of a fold's splits."""

_SPEC = re.compile(r"(?P<column>[^:]+)(?::(?P<count>[1-9]\d*))?")

# Session and speaker in IEMOCAP's ids, such as Ses01F_impro01_M003: speaker M of session 01.
_IEMOCAP_ID = re.compile(r"Ses(\d\d)[FM]_.+_([FM])(?:XX)?\d+")
_IEMOCAP_COLUMNS = ("session", "speaker")

# One in this many folds is used for validation, but at least one.
_VALIDATION_SHARE = 8


@dataclasses.dataclass(frozen=True)
class Folds:
    """Assignment of a dataset's utterances to folds.

    Attributes:
        spec: "COLUMN", one fold per value; or "COLUMN:K", K folds in which the classes are about
            equally frequent. A column is "dialogue", a column of the utterances' metadata, or for
            IEMOCAP "session" or "speaker".
        names: Names of the F folds: their values, or "1" to "K".
        members: Values in each fold.
        index: Fold of each utterance of the pooled splits, [N] int.
    """

    spec: str
    names: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    index: np.ndarray


def load_pooled(name: str, data_dir: epath.PathLike | None = None) -> DialogueFeatures:
    """Loads all splits of a feature dataset as one.

    Raises:
        InputError: The dataset does not exist, or it is not a feature dataset.
    """
    with all_splits_allowed():
        splits = [load_features(name, split, data_dir) for split in split_names(name, data_dir)]
    # Some corpora number the dialogues of each split from 0.
    ids = [dialogue for features in splits for dialogue in features.dialogue_ids]
    if len(set(ids)) < len(ids):
        ids = [
            f"{features.split}/{dialogue}"
            for features in splits
            for dialogue in features.dialogue_ids
        ]
    arrays: dict[str, Any] = {
        field: np.concatenate([getattr(features, field) for features in splits])
        for field in _utterance_fields(splits[0])
    }
    return dataclasses.replace(
        splits[0],
        split="all",
        dialogue_ids=tuple(ids),
        lengths=np.concatenate([features.lengths for features in splits]),
        **arrays,
    )


def make_folds(features: DialogueFeatures, spec: str, seed: int = 0) -> Folds:
    """Assigns the utterances of a dataset to folds.

    Args:
        features: All splits of the dataset; see `load_pooled`.
        spec: See `Folds`.
        seed: Seed that decides between equally good assignments of "COLUMN:K".

    Raises:
        InputError: The specification is unknown, or there are too few values for its folds.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise InputError(f"folds {spec!r}; allowed: COLUMN or COLUMN:NUMBER_OF_FOLDS")
    values = _column(features, match["column"])
    distinct, index = np.unique(values, return_inverse=True)
    if match["count"] is None:
        names: Sequence[str] = distinct.tolist()
        members: Sequence[Sequence[str]] = [(value,) for value in names]
    else:
        count = int(match["count"])
        if count > len(distinct):
            raise InputError(
                f"folds {spec!r}: dataset {features.name} has only {len(distinct)} values of "
                f"{match['column']}; allowed: at most as many folds"
            )
        assigned = _balanced_assignment(features, index, len(distinct), count, seed)
        index = assigned[index]
        names = [str(number + 1) for number in range(count)]
        members = [tuple(distinct[assigned == number].tolist()) for number in range(count)]
    if len(names) < len(SPLITS):
        raise InputError(
            f"folds {spec!r}: {len(names)} folds; needed: at least 3, because training, validation "
            "and test have different ones"
        )
    return Folds(spec, tuple(names), tuple(tuple(member) for member in members), index)


def load_fold(
    name: str,
    split: str,
    spec: str,
    fold: int,
    data_dir: epath.PathLike | None = None,
    *,
    seed: int = 0,
    validate_on_train: bool = False,
) -> DialogueFeatures:
    """Loads a split of a fold of a feature dataset.

    Args:
        name: Name of the dataset.
        split: "train", "validation" or "test".
        spec: See `Folds`.
        fold: Index of the test fold, from 0.
        data_dir: Directory of the datasets.
        seed: See `make_folds`.
        validate_on_train: Whether the training split has the dialogues of the validation split
            too, for trainings that do not choose anything on validation.

    Returns:
        The dialogues of the split. In the test split, utterances outside the fold are unlabeled
        context, for example those of the other speaker if the folds are speakers. No dialogue with
        an utterance in the test fold is in the other splits.

    Raises:
        InputError: The dataset, specification or fold does not exist, or no dialogue remains for
            the split.
        RuntimeError: The test split is opened during training.
    """
    check_split_allowed(split)
    pooled = load_pooled(name, data_dir)
    folds = make_folds(pooled, spec, seed)
    return select_fold(pooled, folds, fold, split, validate_on_train=validate_on_train)


def select_fold(
    features: DialogueFeatures,
    folds: Folds,
    fold: int,
    split: str,
    *,
    validate_on_train: bool = False,
) -> DialogueFeatures:
    """Returns a split of a fold; see `load_fold`."""
    num_folds = len(folds.names)
    if not 0 <= fold < num_folds:
        raise InputError(f"fold {fold} of {folds.spec!r}; allowed: 0 to {num_folds - 1}")
    # Which dialogues have an utterance in each fold, [F, M].
    dialogue = np.repeat(np.arange(len(features.lengths)), features.lengths)
    occurs = np.zeros((num_folds, len(features.lengths)), bool)
    occurs[folds.index, dialogue] = True
    test = occurs[fold]
    validation = np.zeros_like(test)
    num_missing = max(1, round(num_folds / _VALIDATION_SHARE))
    for offset in range(1, num_folds):
        candidate = occurs[(fold + offset) % num_folds] & ~test & ~validation
        if num_missing and candidate.any():
            validation |= candidate
            num_missing -= 1
    train = ~test if validate_on_train else ~test & ~validation
    chosen = {"train": train, "validation": validation, "test": test}[split]
    if not chosen.any():
        raise InputError(
            f"dataset {features.name}, fold {folds.names[fold]} of {folds.spec!r}: no dialogue for "
            f"the {split} split, because all others share a value with the test fold"
        )
    label = features.label
    if split == "test":
        label = np.where(folds.index == fold, label, UNLABELED).astype(label.dtype)
    rows = chosen[dialogue]
    arrays: dict[str, Any] = {
        field: getattr(features, field)[rows] for field in _utterance_fields(features)
    }
    return dataclasses.replace(
        features,
        split=split,
        dialogue_ids=tuple(np.array(features.dialogue_ids, object)[chosen]),
        lengths=features.lengths[chosen],
        metadata={**features.metadata, FOLD: folds.names[fold]},
        **{**arrays, "label": label[rows]},
    )


def _column(features: DialogueFeatures, column: str) -> np.ndarray:
    """Returns each utterance's value in a column, [N] str."""
    if column == DIALOGUE:
        return np.repeat(np.array(features.dialogue_ids, str), features.lengths)
    columns: list[str] = []
    if features.utterance_metadata is not None:
        rows = [json.loads(text) for text in features.utterance_metadata]
        counts = collections.Counter(key for row in rows for key in row)
        columns = list(counts)
        if counts[column] == len(rows):
            return np.array([str(row[column]) for row in rows])
        if column in counts:
            raise InputError(
                f"folds {column!r}: {len(rows) - counts[column]} of {len(rows)} utterances of "
                f"dataset {features.name} have no value"
            )
    matches = [_IEMOCAP_ID.fullmatch(utterance) for utterance in features.utterance_ids]
    sessions = [match for match in matches if match is not None]
    if len(sessions) == len(matches):
        if column == "session":
            return np.array([match[1] for match in sessions])
        if column == "speaker":
            return np.array([match[1] + match[2] for match in sessions])
        columns += [name for name in _IEMOCAP_COLUMNS if name not in columns]
    raise InputError(
        f"folds {column!r}: dataset {features.name} has no such column; allowed: "
        f"{', '.join((DIALOGUE, *columns))}"
    )


def _balanced_assignment(
    features: DialogueFeatures, index: np.ndarray, num_values: int, num_folds: int, seed: int
) -> np.ndarray:
    """Assigns values to folds so that each class is about equally frequent in all folds.

    Large values are assigned first, each to the fold whose class counts then stay closest to an
    even distribution.
    """
    num_classes = len(features.class_names)
    labeled = features.label >= 0
    # Utterances without a label count as one more class, so that the folds have equal sizes.
    cells = index * (num_classes + 1) + np.where(labeled, features.label, num_classes)
    counts = np.bincount(cells, minlength=num_values * (num_classes + 1))
    counts = counts.reshape(num_values, num_classes + 1)
    scale = np.maximum(counts.sum(0), 1)
    shuffled = np.random.default_rng(seed).permutation(num_values)
    order = shuffled[np.argsort(-counts.sum(1)[shuffled], kind="stable")]
    totals = np.zeros((num_folds, num_classes + 1))
    sizes = np.zeros(num_folds)
    assigned = np.zeros(num_values, int)
    for position, value in enumerate(order):
        added = counts[value] / scale
        cost = 2 * totals @ added + (added**2).sum() + sizes * counts[value].sum() / counts.sum()
        # The last values go to the folds that are still empty.
        if num_values - position <= (sizes == 0).sum():
            cost = np.where(sizes == 0, cost, np.inf)
        fold = int(np.argmin(cost))
        assigned[value] = fold
        totals[fold] += added
        sizes[fold] += counts[value].sum() / counts.sum()
    return assigned


def _utterance_fields(features: DialogueFeatures) -> list[str]:
    """Returns the names of the arrays with one row per utterance."""
    names = ["utterance_ids", "label", *MODALITIES, *(f"{name}_present" for name in MODALITIES)]
    optional = ("score", "utterance_metadata")
    return names + [name for name in optional if getattr(features, name) is not None]
