"""Reads utterance features from files of other projects, and describes such files."""

import collections
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mister_jax.data.feature_files.class_order import published_classes
from mister_jax.data.feature_files.dialogue_fields import DialogueFields, open_dialogue_fields
from mister_jax.data.feature_files.mmsa import open_mmsa
from mister_jax.data.feature_files.npz import read_npz
from mister_jax.data.feature_files.padded_arrays import open_padded_arrays
from mister_jax.data.feature_files.records import (
    open_records,
    open_split_folder,
    read_json,
    split_files,
)
from mister_jax.data.feature_files.source import Columns, FeatureSource, Roles, shorten
from mister_jax.data.feature_files.table import OPTIONAL, REQUIRED, FeatureTable
from mister_jax.data.feature_files.unpickling import load_pickle
from mister_jax.data.schema import MODALITIES, UNLABELED, DialogueFeatures
from mister_jax.data.splits import random_splits
from mister_jax.errors import InputError

_VALIDATION_FRACTIONS = (0.9, 0.1, 0)

_LAYOUTS = (
    "dicts of dialogues as in DialogueRNN, MMGCN, COSMIC, SDT and GraphSmile, padded arrays of the "
    "contextual LSTM, splits of MMSA, or lists of dialogues of DAG-ERC"
)


def read_features(
    path: epath.PathLike | Sequence[epath.PathLike],
    *,
    group_by: str = "",
    seed: int = 0,
    fields: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
) -> dict[str, DialogueFeatures]:
    """Reads and checks the utterance features of an npz file, a pickle or JSON files.

    Pickles are read without executing their code. A pickle's layout is recognized from its
    structure; the modules of this package describe the layouts.

    Args:
        path: Path of an npz file (see `read_npz`), a pickle, a JSON file, or a folder with one JSON
            file per split. Alternatively, paths of several pickles that contain the same dialogues:
            the features of later pickles replace the features of earlier pickles, and the field
            keys of later pickles have a prefix ("2:3" is field 3 of the second pickle).
        group_by: Name of an array in an npz file, or "speaker". A random split puts all dialogues
            with the same value into one split.
        seed: Seed of a random split. If a pickle or JSON file has splits but no validation split,
            validation dialogues are drawn from the training split with this seed.
        fields: Keys of the fields to use by role, such as `{"text": "3", "speech": "4"}`. These
            keys replace the layout's default keys.
        labels: Class names in the order of their indices. Needed if the file contains only indices
            and is not a published file whose classes are recognized.

    Returns:
        The nonempty splits. The metadata contains `notes` for the user.

    Raises:
        InputError: The file cannot be used, or a required choice (`fields` or `labels`) is missing.
    """
    paths = _as_paths(path)
    if is_npz(paths[0]):
        if fields or labels:
            flag = "--fields" if fields else "--labels"
            raise InputError(
                f"{paths[0]}: {flag} is not used with an npz file, which names its arrays"
            )
        return read_npz(paths[0], group_by=group_by, seed=seed)
    source = _open_sources(paths)
    return _import(source, source.assign(fields or {}), labels, group_by, seed)


def _import(
    source: FeatureSource, roles: Roles, labels: Sequence[str], group_by: str, seed: int
) -> dict[str, DialogueFeatures]:
    with _unexpected_values(source.path, source.layout):
        columns = source.columns(roles)
    notes = [_field_note(source, roles), *columns.notes]
    class_names, label = _class_names(source, columns, labels, notes)
    arrays: dict[str, np.ndarray] = {
        "utterance": np.array(columns.utterance),
        "dialogue": np.array(columns.dialogue),
        "position": np.array(columns.position),
        "label": label,
        "class_names": np.array(class_names),
    }
    for modality, (values, present) in columns.features.items():
        arrays[modality], arrays[f"{modality}_present"] = values, present
    if columns.score is not None:
        arrays["score"] = columns.score
    if columns.split is not None:
        arrays["split"] = np.array(_with_validation(columns, seed, notes))
    if group_by:
        if group_by not in columns.metadata:
            allowed = ", ".join(columns.metadata) or "none in this file"
            source.fail(f"--group_by={group_by}; allowed: {allowed}")
        arrays[group_by] = np.array(columns.metadata[group_by])
    return FeatureTable(source.path, arrays).splits(
        group_by=group_by, seed=seed, notes=notes, utterance_metadata=_metadata(columns)
    )


def _as_paths(path: epath.PathLike | Sequence[epath.PathLike]) -> list[pathlib.Path]:
    if isinstance(path, str) or not isinstance(path, Sequence):
        return [pathlib.Path(path)]
    return [pathlib.Path(part) for part in path]


def _open_sources(paths: Sequence[pathlib.Path]) -> FeatureSource:
    """Opens one file, or several files as one source."""
    first, *others = (open_source(path) for path in paths)
    for other in others:
        if not isinstance(first, DialogueFields) or not isinstance(other, DialogueFields):
            raise InputError(
                f"{other.path}: layouts {first.layout} and {other.layout} cannot be joined; import "
                "each file, and merge the datasets with mister-jax extract"
            )
        first = first.join(other)
    return first


def is_npz(path: pathlib.Path) -> bool:
    """Returns whether a path ends in `.npz`. The file need not exist."""
    return path.suffix.casefold() == ".npz"


def is_feature_file(name: str) -> bool:
    """Returns whether a name refers to a feature file, and not to a dataset."""
    path = pathlib.Path(name)
    # Dataset names do not contain a dot.
    return "." in path.name or path.is_file() or (path.is_dir() and bool(split_files(path)))


def open_source(path: pathlib.Path) -> FeatureSource:
    """Opens a pickle, a JSON file or a folder of JSON files, and recognizes its layout.

    Raises:
        InputError: The file cannot be read, or its layout is unknown.
    """
    if path.is_dir():
        return open_split_folder(path)
    content = read_json(path) if ".json" in path.name else load_pickle(path)
    source: FeatureSource | None
    for open_layout in (open_mmsa, open_padded_arrays, open_records, open_dialogue_fields):
        with _unexpected_values(path, "unknown"):
            source = open_layout(path, content)
        if source is not None:
            return source
    raise InputError(f"{path}: unknown layout, {_describe(content)}; allowed: {_LAYOUTS}")


@contextlib.contextmanager
def _unexpected_values(path: pathlib.Path, layout: str) -> Iterator[None]:
    """Raises InputError for values that no layout allows, such as numbers in place of vectors."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: layout {layout}: values of unexpected types or sizes ({shorten(error, 100)})"
        ) from error


@dataclasses.dataclass(frozen=True)
class FeatureFileSummary:
    """Description of a feature file.

    Attributes:
        layout: Name of the layout.
        fields: One table row per field: key, kind, count, dimension, example and use.
        splits: Summary of each split by name; empty if the import fails.
        notes: Notes of the import.
        problem: Error message of the import; empty if the import succeeds.
    """

    layout: str
    fields: list[tuple[str, str, str, str, str, str]]
    splits: dict[str, dict[str, str]]
    notes: list[str]
    problem: str


def summarize_file(
    path: epath.PathLike | Sequence[epath.PathLike],
    *,
    seed: int = 0,
    fields: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
) -> FeatureFileSummary:
    """Describes a feature file and the fields that `read_features` would import.

    If the import needs another argument, the summary's `problem` says so.

    Raises:
        InputError: The file cannot be read, its layout is unknown, or a field does not exist.
    """
    paths = _as_paths(path)
    if is_npz(paths[0]):
        splits = read_features(paths, seed=seed, fields=fields, labels=labels)
        layout, rows = "npz", _npz_fields(paths[0])
    else:
        source = _open_sources(paths)
        roles = source.assign(fields or {})
        layout = source.layout
        rows = [
            (*dataclasses.astuple(field)[:5], source.field_note(field.key, roles))
            for field in source.fields
        ]
        try:
            splits = _import(source, roles, labels, "", seed)
        except InputError as error:
            return FeatureFileSummary(layout, rows, {}, [], str(error))
    notes = next(iter(splits.values())).metadata["notes"]
    summaries = {name: features.summary() for name, features in splits.items()}
    return FeatureFileSummary(layout, rows, summaries, notes, "")


def _npz_fields(path: pathlib.Path) -> list[tuple[str, str, str, str, str, str]]:
    rows = []
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            array = archive[name] if name in (*REQUIRED, *MODALITIES, *OPTIONAL) else None
            if array is None:
                rows.append((name, "", "", "", "", "not used"))
            else:
                dims = "".join(str(size) for size in array.shape[1:])
                example = str(list(array.shape)) if array.ndim > 1 else shorten(array[0])
                rows.append((name, str(array.dtype), f"{len(array)} values", dims, example, name))
    return rows


def _field_note(source: FeatureSource, roles: Roles) -> str:
    uses = ", ".join(f"{role} from {'+'.join(keys)}" for role, keys in roles.items())
    visual = [field.key for field in source.fields if field.note == "visual features"]
    note = f"layout {source.layout}: {uses}"
    return f"{note}; visual features are not used ({', '.join(visual)})" if visual else note


def _class_names(
    source: FeatureSource, columns: Columns, labels: Sequence[str], notes: list[str]
) -> tuple[list[str], np.ndarray]:
    """Returns the class names, and the labels as indices [N] int."""
    label = columns.label
    if label.dtype.kind == "U":
        present = sorted(set(label.tolist()) - {""})
        names = list(labels or source.class_names or present)
        unknown = [name for name in present if name not in names]
        if unknown:
            flag = f"--labels={','.join(labels)}" if labels else "label_vocab.pkl"
            source.fail(f"label {unknown[0]!r} is not in {flag}; the file has {', '.join(present)}")
        indices = {name: index for index, name in enumerate(names)} | {"": UNLABELED}
        return names, np.array([indices[name] for name in label.tolist()])
    num_classes = int(label.max(initial=-1)) + 1
    if num_classes == 0:
        source.fail("no utterance has a label")
    if labels:
        if len(labels) < num_classes:
            source.fail(
                f"--labels: {len(labels)} names; needed: {num_classes}, because the labels are "
                f"0 to {num_classes - 1}"
            )
        if len(labels) > num_classes:
            unused = ", ".join(labels[num_classes:])
            notes.append(f"WARNING: no utterance has the label {unused}; check --labels")
        return list(labels), label
    if source.class_names:
        return list(source.class_names), label
    is_test = np.array([split == "test" for split in columns.split or []], bool)
    test = label[is_test] if len(is_test) else label[:0]
    counts = collections.Counter(test[test != UNLABELED].tolist())
    names_by_index, note = published_classes(counts, columns.dialogue, num_classes)
    if not names_by_index:
        source.fail(
            f"labels are 0 to {num_classes - 1}, without names; set --labels=NAME,... with "
            f"{num_classes} names in this order"
        )
    notes.append(note)
    return list(names_by_index), label


def _with_validation(columns: Columns, seed: int, notes: list[str]) -> list[str]:
    """Returns each utterance's split.

    If the file has no validation split, validation dialogues are drawn from the training split,
    unless it has fewer than two dialogues.
    """
    assert columns.split is not None
    labels: dict[str, list[int | str | None]] = collections.defaultdict(list)
    rows = zip(columns.dialogue, columns.split, columns.label.tolist(), strict=True)
    for dialogue, split, label in rows:
        if split == "train":
            labels[dialogue].append(None if label in (UNLABELED, "") else label)
    if "validation" in columns.split or len(labels) < 2:
        return columns.split
    drawn, _ = random_splits(
        labels,
        {},
        name="speaker",
        source="",
        seed=seed,
        fractions=_VALIDATION_FRACTIONS,
    )
    count = sum(split == "validation" for split in drawn.values())
    notes.append(
        f"no validation split in the file: {count} of {len(labels)} training dialogues drawn, "
        f"seed {seed}"
    )
    return [
        drawn.get(dialogue, split) if split == "train" else split
        for dialogue, split in zip(columns.dialogue, columns.split, strict=True)
    ]


def _metadata(columns: Columns) -> np.ndarray | None:
    """Returns the utterances' metadata as JSON, [N] str, or None if there is none."""
    if not columns.metadata:
        return None
    rows = zip(*columns.metadata.values(), strict=True)
    return np.array(
        [
            json.dumps(
                {name: value for name, value in zip(columns.metadata, row, strict=True) if value}
            )
            for row in rows
        ]
    )


def _describe(content: Any) -> str:
    """Describes the outermost container of a file."""
    if isinstance(content, dict):
        keys = ", ".join(shorten(key, 20) for key in list(content)[:8])
        return f"a dict with {len(content)} keys: {keys}{', ...' if len(content) > 8 else ''}"
    if isinstance(content, list | tuple):
        kinds = ", ".join(type(item).__name__ for item in content[:12])
        kind = type(content).__name__
        return f"a {kind} of {len(content)} items: {kinds}{', ...' if len(content) > 12 else ''}"
    if isinstance(content, np.ndarray):
        return f"an array {list(content.shape)}"
    return f"an object of type {type(content).__name__}"
