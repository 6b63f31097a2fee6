"""Files of predictions, written in the format that the file's ending names."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mister_jax.errors import InputError
from mister_jax.io import write_text

Row = Mapping[str, Any]


def write_rows(path: epath.PathLike, rows: Sequence[Row]) -> None:
    """Writes one row per utterance; the file appears whole or not at all.

    Args:
      path: A file whose ending is one of `FORMATS`. In a CSV file nested values have columns of
        their own, such as `probabilities.anger`, and lists are joined by semicolons.
      rows: JSON values by name.

    Raises:
      InputError: See `check_output`.
    """
    check_output(path)
    write_text(path, FORMATS[epath.Path(path).suffix](rows))


def check_output(path: epath.PathLike) -> None:
    """Checks that predictions can be written to a path.

    Raises:
      InputError: The ending is not one of `FORMATS`, or the path is no file in a folder that
        exists.
    """
    path = epath.Path(path)
    if path.suffix not in FORMATS:
        raise InputError(
            f"{path}: {path.suffix or 'no ending'}; allowed for an output: {', '.join(FORMATS)}"
        )
    absolute = path.absolute()
    if absolute.is_dir() or not absolute.parent.is_dir():
        raise InputError(f"{path}; needed: a file, in a folder that exists")


def _jsonl(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: Sequence[Row]) -> str:
    flat_rows = [_flatten(row) for row in rows]
    columns = dict.fromkeys(column for row in flat_rows for column in row)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat_rows)
    return file.getvalue()


def _flatten(row: Row, prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = "; ".join(value) if isinstance(value, list) else value
    return flat


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {".jsonl": _jsonl, ".csv": _csv}
"""Writers by the ending of a file."""
