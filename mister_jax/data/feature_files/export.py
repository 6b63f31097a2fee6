"""Writes feature datasets to npz, CSV and Parquet files for other programs."""

import contextlib
import csv
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mister_jax.data.schema import MODALITIES, UNLABELED, DialogueFeatures
from mister_jax.errors import InputError

FILE_TYPES = (".npz", ".csv", ".parquet")

_ROWS_PER_CHUNK = 256

_RATINGS = "ratings_"  # Prefix of the columns with the number of raters per class.

Columns = dict[str, np.ndarray]
"""Arrays by name, with one row per utterance."""


def check_output_file(path: pathlib.Path, *, overwrite: bool = False) -> None:
    """Checks that a feature file can be written, before its features are computed.

    Raises:
        InputError: The file exists and `overwrite` is false, its type is unknown, its folder does
            not exist, or a package is missing.
    """
    if path.suffix not in FILE_TYPES:
        raise InputError(f"{path}: unknown file type; allowed: {', '.join(FILE_TYPES)}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{path}: Parquet files need pyarrow; install it with pip install pyarrow")
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such folder: {path.parent}")
    if path.exists() and (path.is_dir() or not overwrite):
        raise InputError(f"{path}: file exists; allowed: another --output, or --overwrite")


def write_feature_file(
    path: pathlib.Path,
    splits: Mapping[str, DialogueFeatures],
    extra: Mapping[str, Mapping[tuple[str, str], Any]] | None = None,
) -> None:
    """Writes the splits of a feature dataset to one file, atomically.

    An npz file has the arrays that `read_npz` reads. CSV and Parquet files have the columns
    utterance, dialogue, position, split, label (a class name), `text_present`, `speech_present`,
    and one column per feature: `text_0`, `speech_0` and so on. For an utterance that lacks a
    modality, the modality's features are empty in CSV files and NaN in Parquet files. In CSV
    and Parquet files, scores are in a column `score`, and ratings in columns `ratings_CLASS`.
    All file types have a column for each entry of the utterances' metadata. A modality that no
    utterance has is left out. If an utterance id occurs in several splits, all utterance ids get
    the prefix `SPLIT/`. The same applies to dialogue ids.

    Args:
        path: File to write, with an extension from `FILE_TYPES`.
        splits: Splits of a dataset by name.
        extra: Additional columns by name. A column maps pairs (split, utterance id) to values.

    Raises:
        InputError: The file cannot be written.
    """
    columns, features, class_names = _columns(splits, extra or {})
    try:
        with _atomic(path) as temporary:
            if path.suffix == ".npz":
                _write_npz(temporary, columns, features, class_names)
            elif path.suffix == ".csv":
                _write_csv(temporary, columns, features, class_names)
            else:
                _write_parquet(temporary, columns, features, class_names)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def _atomic(path: pathlib.Path) -> Iterator[pathlib.Path]:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _columns(
    splits: Mapping[str, DialogueFeatures],
    extra: Mapping[str, Mapping[tuple[str, str], Any]],
) -> tuple[Columns, Columns, Sequence[str]]:
    """Returns columns other than features, the features [N, D] by modality, and class names."""
    parts = list(splits.values())
    names = np.repeat([part.split for part in parts], [len(part.label) for part in parts])
    dialogue = [np.repeat(part.dialogue_ids, part.lengths) for part in parts]
    columns: Columns = {
        "utterance": _unique([part.utterance_ids for part in parts], names),
        "dialogue": _unique(dialogue, names),
        "position": np.concatenate([np.arange(size) for part in parts for size in part.lengths]),
        "split": names,
        "label": np.concatenate([part.label for part in parts]),
    }
    if parts[0].score is not None:
        columns["score"] = np.concatenate([part.score for part in parts if part.score is not None])
    if parts[0].ratings is not None:
        ratings = np.concatenate([part.ratings for part in parts if part.ratings is not None])
        names_and_columns = zip(parts[0].class_names, ratings.T, strict=True)
        columns |= {f"{_RATINGS}{name}": column for name, column in names_and_columns}
    features: Columns = {}
    for modality in MODALITIES:
        present = np.concatenate([getattr(part, f"{modality}_present") for part in parts])
        if present.any():
            columns[f"{modality}_present"] = present
            features[modality] = np.concatenate([getattr(part, modality) for part in parts])
    reserved = {*columns, *features, "class_names"}
    for name, values in _metadata(parts).items():
        columns[f"metadata_{name}" if name in reserved else name] = values
    for name, by_id in extra.items():
        keys = [(part.split, id_) for part in parts for id_ in part.utterance_ids.tolist()]
        columns.setdefault(name, np.array([by_id.get(key, np.nan) for key in keys]))
    return columns, features, parts[0].class_names


def _unique(ids: Sequence[np.ndarray], split: np.ndarray) -> np.ndarray:
    """Returns the ids of all splits [N], with the split as a prefix if two splits share an id."""
    distinct = [set(part.tolist()) for part in ids]
    joined = np.concatenate([part.astype(str) for part in ids])
    if sum(map(len, distinct)) == len(set().union(*distinct)):
        return joined
    return np.array([f"{name}/{id_}" for name, id_ in zip(split, joined, strict=True)])


def _metadata(parts: Sequence[DialogueFeatures]) -> Columns:
    """Returns the utterances' metadata as columns of text, [N] str."""
    rows: list[dict[str, Any]] = []
    for part in parts:
        metadata = part.utterance_metadata
        rows += [{}] * len(part.label) if metadata is None else map(json.loads, metadata.tolist())
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([str(row.get(name, "")) for row in rows]) for name in names}


def _write_npz(
    path: pathlib.Path, columns: Columns, features: Columns, class_names: Sequence[str]
) -> None:
    with path.open("wb") as file:
        arrays: dict[str, Any] = {**columns, **features, "class_names": np.array(class_names)}
        ratings = [arrays.pop(f"{_RATINGS}{name}", None) for name in class_names]
        if ratings[0] is not None:
            arrays["ratings"] = np.stack(ratings, axis=1)
        np.savez(file, **arrays)


def _label_names(columns: Columns, class_names: Sequence[str]) -> np.ndarray:
    names = np.array([*class_names, ""])
    assert UNLABELED == -1
    return names[columns["label"]]


def _write_csv(
    path: pathlib.Path, columns: Columns, features: Columns, class_names: Sequence[str]
) -> None:
    columns = columns | {"label": _label_names(columns, class_names)}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *_feature_names(features)])
        for start in range(0, len(columns["label"]), _ROWS_PER_CHUNK):
            rows = slice(start, start + _ROWS_PER_CHUNK)
            # NumPy writes the fewest digits that read back as the same float.
            cells = [_without_nan(values[rows])[:, None] for values in columns.values()]
            for name, values in features.items():
                present = columns[f"{name}_present"][rows, None]
                cells.append(np.where(present, values[rows].astype(str), ""))
            writer.writerows(np.concatenate(cells, axis=1).tolist())


def _without_nan(values: np.ndarray) -> np.ndarray:
    """Returns values as text, empty for NaN."""
    text = values.astype(str)
    return np.where(np.isnan(values), "", text) if values.dtype.kind == "f" else text


def _feature_names(features: Columns) -> list[str]:
    dims = {name: values.shape[1] for name, values in features.items()}
    return [f"{name}_{index}" for name, dim in dims.items() for index in range(dim)]


def _write_parquet(
    path: pathlib.Path, columns: Columns, features: Columns, class_names: Sequence[str]
) -> None:
    import pyarrow
    import pyarrow.parquet

    arrays = columns | {"label": _label_names(columns, class_names)}
    for name, values in features.items():
        present = columns[f"{name}_present"][:, None]
        values = np.where(present, values, values.dtype.type(np.nan))
        arrays |= {f"{name}_{index}": column for index, column in enumerate(values.T)}
    table = pyarrow.table({name: pyarrow.array(values) for name, values in arrays.items()})
    classes = json.dumps(list(class_names), ensure_ascii=False)
    table = table.replace_schema_metadata({"class_names": classes})
    pyarrow.parquet.write_table(table, path)
