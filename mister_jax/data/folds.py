"""Cross-validation folds of a feature dataset, which replace the dataset's splits.

Each utterance belongs to one fold, such as its session or its speaker. The test split contains
all dialogues with an utterance in a chosen fold. The validation split contains the other dialogues
of the next fold or folds, and the training split contains all remaining dialogues.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mister_jax.data.features import load_features, split_names
from mister_jax.data.schema import (
    MODALITIES,
    SPEAKER_IN_DIALOGUE,
    SPLITS,
    UNLABELED,
    DialogueFeatures,
)
from mister_jax.data.split_guard import all_splits_allowed, check_split_allowed
from mister_jax.data.storage import dataset_directory
from mister_jax.errors import InputError

DIALOGUE = "dialogue"
"""Column of the dialogue ids, which every dataset has."""

FOLD = "fold"
"""Metadata key of the splits that `select_fold` returns; its value is the name of the test fold."""

_SPEC = re.compile(r"(?P<column>[^:]+)(?::(?P<count>[1-9]\d*))?")

# Session and speaker in IEMOCAP's ids, such as Ses01F_impro01_M003: speaker M of session 01.
_IEMOCAP_DIALOGUE = re.compile(r"Ses(\d\d)[FM]_")
_IEMOCAP_TURN = re.compile(r"Ses\d\d[FM]_.+_([FM])(?:XX)?\d+")

# One in `_VALIDATION_SHARE` folds, but at least one fold, is used for validation.
_VALIDATION_SHARE = 8


@dataclasses.dataclass(frozen=True)
class Folds:
    """Assignment of a dataset's utterances to folds.

    Attributes:
        spec: "COLUMN" for one fold per value, or "COLUMN:K" for K folds with similar class
            frequencies. COLUMN is "dialogue" or a column of the utterances' metadata. IEMOCAP also
            has "session" and "speaker".
        names: Names of the F folds: the column's values, or "1" to "K".
        members: Values of the column in each fold.
        index: Index of each utterance's fold, [N] int, in the order of `load_pooled`.
    """

    spec: str
    names: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    index: np.ndarray


def load_pooled(
    name: str, data_dir: epath.PathLike | None = None, splits: Sequence[str] = ()
) -> DialogueFeatures:
    """Loads several splits of a feature dataset as one split.

    The result of the last call is cached, because all folds of a cross-validation use it.

    Args:
        name: Name of the dataset.
        data_dir: Directory of the datasets.
        splits: Names of the splits; all splits if empty.

    Raises:
        InputError: The dataset or a split does not exist, or the dataset contains no features.
    """
    info = dataset_directory(name, data_dir) / "dataset_info.json"
    state = info.stat() if info.exists() else None
    # If the dataset is written again, its version changes, so the cached result is not used.
    version = None if state is None else (state.mtime, state.length)
    return _load_pooled(name, data_dir, tuple(splits), version)


@functools.lru_cache(maxsize=1)
def _load_pooled(
    name: str, data_dir: epath.PathLike | None, splits: tuple[str, ...], version: Any
) -> DialogueFeatures:
    with all_splits_allowed():
        names = splits or split_names(name, data_dir)
        parts = [load_features(name, split, data_dir) for split in names]
    # Some corpora number the dialogues of each split from 0, so ids may repeat.
    ids = [dialogue for features in parts for dialogue in features.dialogue_ids]
    if len(set(ids)) < len(ids):
        ids = [
            f"{features.split}/{dialogue}"
            for features in parts
            for dialogue in features.dialogue_ids
        ]
    arrays: dict[str, Any] = {
        field: np.concatenate([getattr(features, field) for features in parts])
        for field in _utterance_fields(parts[0])
    }
    return dataclasses.replace(
        parts[0],
        split="all",
        # Metadata of a single split, such as scores of reference classifiers, are left out.
        metadata={
            name: value
            for name, value in parts[0].metadata.items()
            if all(features.metadata.get(name) == value for features in parts)
        },
        dialogue_ids=tuple(ids),
        lengths=np.concatenate([features.lengths for features in parts]),
        **arrays,
    )


def split_list(text: str) -> tuple[str, ...]:
    """Returns the names of splits in a comma-separated text."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def make_folds(features: DialogueFeatures, spec: str, seed: int = 0) -> Folds:
    """Assigns the utterances of a dataset to folds.

    Args:
        features: All splits of the dataset; see `load_pooled`.
        spec: See `Folds`.
        seed: Seed for breaking ties: "COLUMN:K" assigns values with equally many utterances in
            random order.

    Raises:
        InputError: The specification is invalid, or the column has too few values.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise InputError(f"folds {spec!r}; allowed: COLUMN or COLUMN:NUMBER, such as speaker:5")
    values = _column(features, match["column"], spec)
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
            f"folds {spec!r}: only {len(names)} folds ({', '.join(names)}); needed: at least 3, "
            "because training, validation and test use different folds"
        )
    return Folds(spec, tuple(names), tuple(tuple(member) for member in members), index)


def fold_groups(features: DialogueFeatures, spec: str) -> np.ndarray | None:
    """Returns each utterance's value in the column of the folds, [N] str; None for dialogues.

    Args:
        features: All splits of the dataset; see `load_pooled`.
        spec: See `Folds`.
    """
    column = spec.partition(":")[0]
    return None if column == DIALOGUE else _column(features, column, spec)


def load_fold(
    name: str,
    split: str,
    spec: str,
    fold: int,
    data_dir: epath.PathLike | None = None,
    *,
    seed: int = 0,
    validate_on_train: bool = False,
    pooled_splits: Sequence[str] = (),
) -> DialogueFeatures:
    """Loads one split of one cross-validation fold of a feature dataset.

    Args:
        name: Name of the dataset.
        split: "train", "validation" or "test".
        spec: See `Folds`.
        fold: Index of the test fold, from 0.
        data_dir: Directory of the datasets.
        seed: See `make_folds`.
        validate_on_train: Whether the training split also contains the dialogues of the validation
            split, for training runs that do not select a checkpoint on the validation split.
        pooled_splits: Splits of the dataset whose dialogues are divided into folds; all splits if
            empty.

    Returns:
        The dialogues of the split. In the test split, utterances outside the fold are context
        without labels, scores and ratings. For example, if the folds are speakers, these are the
        utterances of a dialogue's other speakers. No dialogue with an utterance in the test fold is
        in the other splits.

    Raises:
        InputError: The dataset, specification or fold does not exist, or no dialogue remains for
            the split.
        RuntimeError: The test split is opened during training.
    """
    check_split_allowed(split)
    pooled = load_pooled(name, data_dir, pooled_splits)
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
    if not 0 <= fold < len(folds.names):
        raise InputError(f"fold {fold} of {folds.spec!r}; allowed: 0 to {len(folds.names) - 1}")
    splits = _split_dialogues(features, folds, fold)
    chosen = splits[split]
    if validate_on_train and split == "train":
        chosen = chosen | splits["validation"]
    rows = np.repeat(chosen, features.lengths)
    arrays: dict[str, Any] = {
        field: getattr(features, field)[rows] for field in _utterance_fields(features)
    }
    if split == "test":
        is_context = (folds.index != fold)[rows]
        for field, missing in (("label", UNLABELED), ("score", np.nan), ("ratings", 0)):
            if field in arrays:
                arrays[field] = arrays[field].copy()
                arrays[field][is_context] = missing
    return dataclasses.replace(
        features,
        split=split,
        dialogue_ids=tuple(np.array(features.dialogue_ids, object)[chosen]),
        lengths=features.lengths[chosen],
        metadata={**features.metadata, FOLD: folds.names[fold]},
        **arrays,
    )


def check_folds(features: DialogueFeatures, folds: Folds) -> None:
    """Raises InputError if a split of any fold has no dialogue or no labeled utterance."""
    is_labeled = features.label >= 0
    for fold, name in enumerate(folds.names):
        for split, chosen in _split_dialogues(features, folds, fold).items():
            rows = np.repeat(chosen, features.lengths)
            if split == "test":
                rows = rows & (folds.index == fold)
            if not (is_labeled & rows).any():
                raise InputError(
                    f"dataset {features.name}, fold {name} of {folds.spec!r}: no utterance of the "
                    f"{split} split has a label; use fewer folds, such as "
                    f"{folds.spec.partition(':')[0]}:{max(3, len(folds.names) // 2)}"
                )


def _split_dialogues(features: DialogueFeatures, folds: Folds, fold: int) -> dict[str, np.ndarray]:
    """Returns which dialogues are in each split of a fold, [M] bool.

    Raises:
        InputError: A split has no dialogue.
    """
    num_folds = len(folds.names)
    # Whether each dialogue has an utterance in each fold, [F, M].
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
    splits = {"train": ~test & ~validation, "validation": validation, "test": test}
    for split, chosen in splits.items():
        if not chosen.any():
            raise InputError(
                f"dataset {features.name}, fold {folds.names[fold]} of {folds.spec!r}: the {split} "
                "split is empty, because every dialogue has an utterance in a fold of another split"
            )
    return splits


def _column(features: DialogueFeatures, column: str, spec: str) -> np.ndarray:
    """Returns each utterance's value in a column, [N] str."""
    if column == DIALOGUE:
        return np.repeat(np.array(features.dialogue_ids, str), features.lengths)
    columns: list[str] = []
    # Read IEMOCAP's ids first, because the column `speaker` has only M and F in some feature files.
    values = _iemocap_columns(features)
    if column in values:
        return values[column]
    columns += values
    if features.utterance_metadata is not None:
        rows = [json.loads(text) for text in features.utterance_metadata]
        counts = collections.Counter(
            key for row in rows for key, value in row.items() if value is not None
        )
        columns += [name for name in counts if name not in columns]
        if counts[column] == len(rows):
            return np.array([str(row[column]) for row in rows])
        if column in counts:
            raise InputError(
                f"folds {spec!r}: {len(rows) - counts[column]} of {len(rows)} utterances of "
                f"dataset {features.name} have no {column}"
            )
    raise InputError(
        f"folds {spec!r}: dataset {features.name} has no column {column!r}; allowed: "
        f"{', '.join((DIALOGUE, *columns))}"
    )


def _iemocap_columns(features: DialogueFeatures) -> dict[str, np.ndarray]:
    """Returns IEMOCAP's "session" and "speaker", [N] str, except columns with unknown values."""
    dialogues = [_IEMOCAP_DIALOGUE.match(str(name)) for name in features.dialogue_ids]
    sessions = [match[1] for match in dialogues if match is not None]
    if len(sessions) < len(dialogues):
        return {}
    session = np.repeat(np.array(sessions), features.lengths)
    matches = [_IEMOCAP_TURN.fullmatch(str(name)) for name in features.utterance_ids]
    speakers = [match[1] for match in matches if match is not None]
    if len(speakers) < len(matches) and features.utterance_metadata is not None:
        rows = [json.loads(text) for text in features.utterance_metadata]
        speakers = [row[SPEAKER_IN_DIALOGUE] for row in rows if row.get(SPEAKER_IN_DIALOGUE)]
    if len(speakers) < len(session) or set(speakers) != {"F", "M"}:
        return {"session": session}
    return {"session": session, "speaker": np.char.add(session, speakers)}


def _balanced_assignment(
    features: DialogueFeatures, index: np.ndarray, num_values: int, num_folds: int, seed: int
) -> np.ndarray:
    """Assigns values to folds so that each class is about equally frequent in all folds.

    Values with many utterances are assigned first. Each value is assigned to the fold that keeps
    the class counts of all folds most even.
    """
    num_classes = len(features.class_names)
    labeled = features.label >= 0
    # Unlabeled utterances count as one more class, so that all folds get similarly many of them.
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
    optional = ("score", "ratings", "utterance_metadata")
    return names + [name for name in optional if getattr(features, name) is not None]
