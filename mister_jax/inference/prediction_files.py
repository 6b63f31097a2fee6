"""Writes predictions to JSON Lines or CSV files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mister_jax.errors import InputError
from mister_jax.io import flatten, write_text

Row = Mapping[str, Any]


def write_predictions(path: epath.PathLike, rows: Sequence[Row]) -> None:
    """Writes one row per utterance, atomically, in the format of the path's extension.

    In a CSV file, nested values have their own columns, such as `probabilities.anger`, and lists
    are joined by semicolons.

    Raises:
      InputError: See `check_predictions_path`.
    """
    check_predictions_path(path)
    write_text(path, FORMATS[epath.Path(path).suffix](rows))


def check_predictions_path(path: epath.PathLike) -> None:
    """Checks that predictions can be written to a path.

    Raises:
      InputError: The extension is not one of `FORMATS`, the path is a folder, or its parent folder
        does not exist.
    """
    path = epath.Path(path)
    if path.suffix not in FORMATS:
        raise InputError(
            f"{path}: output with extension {path.suffix or '(none)'}; allowed: "
            f"{', '.join(FORMATS)}"
        )
    absolute = path.absolute()
    if absolute.is_dir() or not absolute.parent.is_dir():
        raise InputError(f"{path}; needed: a file in an existing folder")


def _to_json_lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _to_csv(rows: Sequence[Row]) -> str:
    flat_rows = [
        {
            name: "; ".join(value) if isinstance(value, list) else value
            for name, value in flatten(row).items()
        }
        for row in rows
    ]
    columns = dict.fromkeys(column for row in flat_rows for column in row)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat_rows)
    return file.getvalue()


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {".jsonl": _to_json_lines, ".csv": _to_csv}
"""Formatter of each file extension."""
