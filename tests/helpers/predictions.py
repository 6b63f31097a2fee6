"""Inputs and outputs of predictions."""

import pytest

from tests.helpers.tiny_datasets import write_manifest


def write_call(folder, rows):
    """Writes a manifest of one dialogue; `rows` hold the fields of its utterances."""
    rows = [{"dialogue": "c", "utterance": index, **row} for index, row in enumerate(rows)]
    return write_manifest(folder / "call.jsonl", rows)


def assert_predictions_close(rows, expected):
    """Checks that two lists of rows from `prediction_rows` are equal up to rounding."""
    assert len(rows) == len(expected)
    for row, expected_row in zip(rows, expected, strict=True):
        for field in ("emotion", "experts"):
            assert row[field] == expected_row[field]
        for field in ("probabilities", "gate"):
            # The small models of the tests magnify the rounding errors of the features.
            assert row[field] == pytest.approx(expected_row[field], abs=5e-5)
