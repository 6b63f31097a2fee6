"""Reads files of the CMU Multimodal SDK: computational sequences (csd) and standard splits."""

import ast
import pathlib

import numpy as np

from mister_jax.data.corpora.text_files import read_any_text
from mister_jax.errors import InputError


def read_sequence(path: pathlib.Path, num_columns: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads a computational sequence, an HDF5 file with one table.

    Args:
        path: Path of the csd file.
        num_columns: Number of features per segment.

    Returns:
        For each video, the features [n, num_columns] and the time intervals [n, 2], in seconds, of
        its n segments.

    Raises:
        InputError: The file cannot be read or has another layout.
    """
    import h5py

    sequences = {}
    try:
        with h5py.File(path, "r") as file:
            tables = [
                group["data"]
                for group in file.values()
                if isinstance(group, h5py.Group) and isinstance(group.get("data"), h5py.Group)
            ]
            if len(tables) != 1:
                raise InputError(f"{path}: {len(tables)} tables; needed: one that contains `data`")
            for video, values in tables[0].items():
                if not isinstance(values, h5py.Group):
                    raise InputError(
                        f"{path}: {video}: not a group; needed: a group with features and intervals"
                    )
                features = np.asarray(values["features"], float)
                intervals = np.asarray(values["intervals"], float)
                if features.shape != (len(intervals), num_columns) or intervals.shape != (
                    len(features),
                    2,
                ):
                    raise InputError(
                        f"{path}: {video}: features {features.shape}, intervals {intervals.shape}; "
                        f"needed: [n, {num_columns}] and [n, 2]"
                    )
                sequences[video] = features, intervals
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a label file of the SDK, or damaged ({error})") from error
    return sequences


def read_standard_folds(path: pathlib.Path) -> dict[str, str]:
    """Reads the split of each video from the SDK's Python file, without executing the file.

    Raises:
        InputError: The file does not define the three splits, or two splits overlap.
    """
    names = {"standard_train_fold": "train", "standard_valid_fold": "validation"}
    names["standard_test_fold"] = "test"
    needed = f"needed: {', '.join(names)}, each a list of video ids"
    try:
        statements = ast.parse(read_any_text(path)[0]).body
        values = {
            target.id: ast.literal_eval(statement.value)
            for statement in statements
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name) and target.id in names
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path}: not the SDK's file of splits; {needed}") from error
    splits: dict[str, str] = {}
    for name, split in names.items():
        videos = values.get(name)
        if not isinstance(videos, list | tuple) or not all(isinstance(it, str) for it in videos):
            raise InputError(f"{path}: no {name}; {needed}")
        for video in videos:
            if splits.setdefault(video, split) != split:
                raise InputError(f"{path}: video {video!r} in {splits[video]} and {split}")
    return splits
