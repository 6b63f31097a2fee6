"""Feature datasets are written to npz, CSV and Parquet files that other programs read."""

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest

from mister_jax.data import DialogueFeatures, read_npz
from mister_jax.data.feature_files import check_output_file, write_feature_file
from mister_jax.errors import InputError


def make_splits(*, dtype=np.float32, same_ids=False):
    """Returns splits of 3 and 2 utterances. In each, one has no speech and one has no label."""
    generator = np.random.default_rng(0)
    splits = {}
    for split, lengths in {"train": [1, 2], "test": [2]}.items():
        total = sum(lengths)
        prefix = "" if same_ids else split
        present = np.arange(total) != 1
        splits[split] = DialogueFeatures(
            name="calls",
            split=split,
            class_names=("calm", "très triste"),
            dialogue_ids=tuple(f"{prefix}d{index}" for index in range(len(lengths))),
            lengths=np.array(lengths),
            utterance_ids=np.array([f"{prefix}u{index}" for index in range(total)]),
            speech=(generator.normal(size=(total, 2)) * present[:, None]).astype(dtype),
            text=generator.normal(size=(total, 3)).astype(dtype),
            speech_present=present,
            text_present=np.ones(total, bool),
            label=np.arange(total, dtype=np.int32) % 3 - 1,
            score=np.array([np.nan, 0.5, -3.0][:total], np.float32),
            utterance_metadata=np.array(
                [json.dumps({"speaker": "Ann", "text": "one, two"})] * (total - 1) + ["{}"]
            ),
        )
    return splits


TIMES = {"start": {("train", "trainu0"): 1.5, ("test", "testu1"): 2.25}}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_read_npz_reads_the_same_features(tmp_path, dtype):
    splits = make_splits(dtype=dtype)
    write_feature_file(tmp_path / "calls.npz", splits, TIMES)
    read = read_npz(tmp_path / "calls.npz")
    assert list(read) == list(splits)
    for split, features in splits.items():
        for field in dataclasses.fields(features):
            expected, actual = getattr(features, field.name), getattr(read[split], field.name)
            if field.name == "metadata":
                continue
            if field.name == "utterance_metadata":
                rows = zip(map(json.loads, actual), map(json.loads, expected), strict=True)
                # Utterances without a value have empty cells. `start` comes from `TIMES`.
                for row, expected_row in rows:
                    given = {name: text for name, text in row.items() if text and name != "start"}
                    assert given == expected_row
                continue
            if isinstance(expected, np.ndarray):
                np.testing.assert_array_equal(actual, expected, err_msg=field.name)
                assert expected.dtype.kind == "U" or actual.dtype == expected.dtype, field.name
            else:
                assert actual == expected, field.name
    with np.load(tmp_path / "calls.npz") as archive:
        assert archive["speaker"].tolist() == ["Ann", "Ann", "", "Ann", ""]
        assert archive["metadata_text"][0] == "one, two"
        np.testing.assert_array_equal(archive["start"], [1.5, np.nan, np.nan, np.nan, 2.25])


def test_columns_of_a_csv_file(tmp_path):
    splits = make_splits()
    write_feature_file(tmp_path / "calls.csv", splits, TIMES)
    with (tmp_path / "calls.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == (
        "utterance,dialogue,position,split,label,score,speech_present,text_present,speaker,"
        "metadata_text,start,speech_0,speech_1,text_0,text_1,text_2"
    )
    assert [row["label"] for row in rows] == ["", "calm", "très triste", "", "calm"]
    assert [row["position"] for row in rows] == ["0", "0", "1", "0", "1"]
    assert [row["score"] for row in rows] == ["", "0.5", "-3.0", "", "0.5"]
    assert rows[1]["speech_0"] == "" and rows[1]["speech_present"] == "False"
    assert [row["start"] for row in rows] == ["1.5", "", "", "", "2.25"]
    assert rows[3]["dialogue"] == "testd0" and rows[3]["metadata_text"] == "one, two"
    read = np.array([[row[f"text_{index}"] for index in range(3)] for row in rows], np.float32)
    expected = np.concatenate([split.text for split in splits.values()])
    np.testing.assert_array_equal(read, expected)


def test_columns_of_a_parquet_file(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    splits = make_splits()
    write_feature_file(tmp_path / "calls.parquet", splits)
    table = parquet.read_table(tmp_path / "calls.parquet")
    assert table.column_names[-5:] == ["speech_0", "speech_1", "text_0", "text_1", "text_2"]
    assert table["label"].to_pylist() == ["", "calm", "très triste", "", "calm"]
    assert np.isnan(table["speech_1"].to_pylist()[1])
    expected = np.concatenate([split.text for split in splits.values()])[:, 2]
    np.testing.assert_array_equal(table["text_2"].to_numpy(), expected)
    assert json.loads(table.schema.metadata[b"class_names"]) == ["calm", "très triste"]


def test_ids_that_two_splits_share_are_made_unique(tmp_path):
    write_feature_file(tmp_path / "calls.npz", make_splits(same_ids=True))
    assert read_npz(tmp_path / "calls.npz")["test"].utterance_ids.tolist() == ["test/u0", "test/u1"]


def test_a_modality_that_no_utterance_has_is_left_out(tmp_path):
    splits = {
        name: dataclasses.replace(
            split, speech=np.zeros((len(split.label), 1)), speech_present=split.label > 9
        )
        for name, split in make_splits().items()
    }
    write_feature_file(tmp_path / "calls.npz", splits)
    with np.load(tmp_path / "calls.npz") as archive:
        assert "speech" not in archive.files and "speech_present" not in archive.files
    assert not read_npz(tmp_path / "calls.npz")["train"].speech_present.any()


def test_an_output_that_cannot_be_written_is_refused_early(tmp_path, monkeypatch):
    (tmp_path / "old.csv").write_text("")
    check_output_file(tmp_path / "old.csv", overwrite=True)
    check_output_file(tmp_path / "new.npz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, message in {
        "old.csv": "file exists; allowed: another --output, or --overwrite",
        "x.xlsx": r"unknown file type; allowed: \.npz, \.csv, \.parquet",
        "absent/x.csv": "no such folder",
        "x.parquet": "Parquet files need pyarrow; install it with pip install pyarrow",
    }.items():
        with pytest.raises(InputError, match=message):
            check_output_file(tmp_path / name)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "calls.npz"
    path.write_text("old")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(InputError, match=r"cannot be written \(disk full\)"):
        write_feature_file(path, make_splits())
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["calls.npz"]
