"""Recognizes and converts the values of a dialogue in a feature file."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

FEATURES, ONE_HOT, INTEGERS, NUMBERS, TEXT, IDS, OTHER = (
    *("features", "one-hot rows", "integers", "numbers", "text", "dialogue ids", "other"),
)
"""Kinds of values that a field of a feature file can hold."""

# Maps the control characters U+0080 to U+009F to the characters that cp1252 encodes with the same
# bytes, except for five bytes that are undefined in cp1252.
_WINDOWS = {
    code: character
    for code in range(0x80, 0xA0)
    if (character := bytes([code]).decode("cp1252", errors="ignore"))
}


def identifier(value: Any) -> str | None:
    """Returns an id as text, or None for other values. 7, 7.0, b"7" and "7" are the same id."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return None


def clean_text(value: Any) -> str:
    """Returns a sentence as text, with characters from wrong encodings repaired.

    Pickles of Python 2 contain UTF-8 or cp1252 bytes, which the unpickler decodes as Latin-1.
    """
    text = value.decode("latin1") if isinstance(value, bytes) else str(value)
    if not text.isascii():
        try:
            text = text.encode("latin1").decode("utf-8")
        except UnicodeError:
            text = text.translate(_WINDOWS)
    return " ".join(text.encode("utf-8", "replace").decode().split())


def kind_of(values: Any) -> tuple[str, int] | None:
    """Returns the kind of one dialogue's values, and the vector dimension (0 without vectors).

    Returns None if the dialogue has no values.
    """
    if isinstance(values, np.ndarray):
        if values.ndim == 0:
            return OTHER, 0
        if len(values) == 0:
            return None
        if values.dtype.kind in "biuf" and values.ndim == 2 and values.size:
            return _kind_of_rows(values)
        if values.ndim > 1 and values.dtype.kind in "biuf":
            return OTHER, 0
        values = values.tolist() if values.dtype.kind in "US" else list(values)
    if not isinstance(values, list | tuple):
        return OTHER, 0
    values = [value for value in values if value is not None]
    if not values:
        return None
    if all(isinstance(value, str | bytes) for value in values):
        return TEXT, 0
    if all(is_number(value) for value in values):
        finite = [float(value) for value in values if math.isfinite(value)]
        return (INTEGERS if all(value.is_integer() for value in finite) else NUMBERS), 0
    rows = [row for value in values if (row := vector(value)) is not None and len(row)]
    if not rows:
        return OTHER, 0
    if len({len(row) for row in rows}) > 1:
        return FEATURES, max(len(row) for row in rows)
    return _kind_of_rows(np.stack(rows))


def _kind_of_rows(rows: np.ndarray) -> tuple[str, int]:
    is_one_hot = np.isin(rows, (0, 1)).all() and (rows.sum(axis=1) == 1).all()
    if is_one_hot and rows.shape[1] > 1:
        return ONE_HOT, rows.shape[1]
    # Rows of integers are word indices, not features.
    is_whole = rows.dtype.kind in "biu"
    return (OTHER if is_whole else FEATURES), rows.shape[1]


def is_number(value: Any) -> bool:
    """Returns whether a value is one number."""
    return isinstance(value, int | float | np.number | np.bool_)


def vector(value: Any) -> np.ndarray | None:
    """Returns a value as a vector of numbers [D], or None if the value is not a vector."""
    if isinstance(value, np.ndarray):
        value = value.reshape(-1) if value.ndim == 2 and 1 in value.shape else value
        is_vector = value.ndim == 1 and (value.dtype.kind in "biuf" or not value.size)
        return value if is_vector else None
    if not isinstance(value, list | tuple) or not all(map(is_number, value)):
        return None
    return np.array(value) if value else np.zeros(0)


def stack_features(
    vectors: Iterable[Any], name: Any, dim: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Stacks feature vectors into an array [N, D]. Returns the array and presence flags [N].

    Missing, empty and nonfinite vectors count as absent and are replaced by zeros.

    Args:
        vectors: Vectors [D], or None.
        name: Function from a row index to a description of the vector for error messages.
        dim: Dimension D; if 0, the dimension of the first nonempty vector.

    Raises:
        ValueError: A value is not a vector, or its dimension differs from D.
    """
    rows: list[np.ndarray | None] = []
    for index, value in enumerate(vectors):
        row = None if value is None or _is_nan(value) else vector(value)
        if row is None and not (value is None or _is_nan(value)):
            raise ValueError(f"{name(index)}: not a vector of numbers")
        if row is not None and len(row):
            if dim and len(row) != dim:
                raise ValueError(
                    f"{name(index)}: {len(row)} features; needed: {dim}, as in earlier rows"
                )
            dim = len(row)
        rows.append(row if row is not None and len(row) and np.isfinite(row).all() else None)
    features = np.zeros((len(rows), dim or 1), np.float32)
    present = np.array([row is not None for row in rows], bool)
    with np.errstate(over="ignore"):
        for index, row in enumerate(rows):
            if row is not None:
                features[index] = row
    return features, present


def _is_nan(value: Any) -> bool:
    return isinstance(value, float | np.floating) and math.isnan(value)


def as_labels(values: Sequence[Any]) -> list[Any]:
    """Converts labels to int or text; missing labels (NaN and None) become None.

    Raises:
        ValueError: A value is neither a whole number nor text nor a one-hot vector.
    """
    labels: list[Any] = []
    for value in values:
        if isinstance(value, np.ndarray | list | tuple):
            row = vector(value)
            if row is None or not len(row) or kind_of([row]) != (ONE_HOT, len(row)):
                raise ValueError(f"label {value!r:.40}; allowed: whole numbers or names")
            value = int(np.argmax(row))
        if value is None or _is_nan(value):
            labels.append(None)
        elif isinstance(value, str | bytes):
            labels.append(clean_text(value))
        elif is_number(value) and float(value).is_integer():
            labels.append(int(value))
        else:
            raise ValueError(f"label {value!r:.40}; allowed: whole numbers or names")
    return labels
