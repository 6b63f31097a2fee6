"""The reader of CMU-MOSEI: labels by time, context, splits, and broken files."""

import h5py
import pytest

from mister_jax.data.corpora import mosei
from mister_jax.data.corpora.cmu_sdk import read_standard_folds
from mister_jax.errors import InputError

FOLDS = """
standard_train_fold=['hh04W3xXa5s', '81406']

standard_test_fold=['7l3BNtSE0xc']

standard_valid_fold=['188343']
"""
# Labels of each video: start, end, sentiment.
LABELS = {
    "hh04W3xXa5s": [(7.0, 12.5, -1.0), (0.25, 3.0, 0.0), (90.0, 95.0, 3.0)],
    "81406": [(0.0, 5.0, 1 / 3)],
    "7l3BNtSE0xc": [(-0.5, 4.0, -3.0)],
    "188343": [(0.0, 5.0, 2.0)],
    "unknown": [(0.0, 5.0, 2.0)],
}
TRANSCRIPT = b"""\
hh04W3xXa5s___2___12.5___14.0___Context.
hh04W3xXa5s___0___0.2___3.0___caf\xe9 ___ first

hh04W3xXa5s___1___7.01___12.5___Second.
hh04W3xXa5s___3___20.0___20.0___Of no length.
"""


def write_labels(path, labels, num_columns=7):
    with h5py.File(path, "w") as file:
        for video, rows in labels.items():
            data = file.require_group(f"All Labels/data/{video}")
            data["features"] = [[score, *[0.5] * (num_columns - 1)] for *_, score in rows]
            data["intervals"] = [[start, end] for start, end, _ in rows]


@pytest.fixture
def mosei_folder(tmp_path):
    transcripts = tmp_path / mosei.TRANSCRIPTS
    transcripts.mkdir(parents=True)
    (transcripts / "hh04W3xXa5s.txt").write_bytes(TRANSCRIPT)
    for video in ("81406", "188343"):
        (transcripts / f"{video}.txt").write_text(f"{video}___0___0.0___5.0___Text.\n")
    (transcripts / "._81406.txt").write_bytes(b"\0\5\x16\7\xff")
    (tmp_path / "csd").mkdir()
    write_labels(tmp_path / "csd" / mosei.LABELS, LABELS)
    (tmp_path / mosei.FOLDS).write_text(FOLDS)
    return tmp_path


def test_labels_and_segments_are_joined_by_time(mosei_folder):
    corpus = mosei.read_mosei(mosei_folder)
    assert corpus.sizes() == {"train": (2, 5), "validation": (1, 1), "test": (1, 1)}
    assert corpus.scored and corpus.class_names == ("negative", "non_negative")
    _, dialogue = corpus.splits["train"]
    assert [(turn.id, turn.text, turn.label, turn.score) for turn in dialogue.utterances] == [
        ("hh04W3xXa5s_0", "caf\u00e9 ___ first", "non_negative", 0.0),
        ("hh04W3xXa5s_1", "Second.", "negative", -1.0),
        ("hh04W3xXa5s_2", "Context.", None, None),
        ("hh04W3xXa5s_label3", "", "non_negative", 3.0),
    ]
    first = dialogue.utterances[0]
    assert (first.recording.start, first.recording.end) == (first.start, first.end) == (0.25, 3.0)
    assert first.recording.source == str(mosei_folder / mosei.AUDIO / "hh04W3xXa5s.wav")
    assert first.metadata == dict.fromkeys(mosei.EMOTIONS, "0.5")
    (test,) = corpus.splits["test"]
    assert (test.utterances[0].start, test.utterances[0].text) == (0.0, "")
    assert corpus.notes == (
        "labels without text, because no segment has their times: 2",
        "segments of no length, left out: 1",
        "segments without a label, kept as context: 1",
        "transcripts that are not UTF-8, read as cp1252: 1",
        "videos with labels that are in no split, left out: 1",
        "videos without a transcript: 1",
    )


def test_the_splits_are_found_in_a_copy_of_the_sdk(mosei_folder):
    path = mosei_folder / "CMU-MultimodalSDK" / mosei._SDK_FOLDER / mosei.FOLDS
    path.parent.mkdir(parents=True)
    (mosei_folder / mosei.FOLDS).rename(path)
    assert mosei.read_mosei(mosei_folder).sizes()["train"] == (2, 5)
    path.unlink()
    with pytest.raises(InputError, match=r"no cmu_mosei_std_folds\.py; needed: a folder that con"):
        mosei.read_mosei(mosei_folder)


def test_missing_labels_are_an_error_unless_a_partial_corpus_is_allowed(mosei_folder):
    write_labels(mosei_folder / "csd" / mosei.LABELS, {"81406": LABELS["81406"]})
    with pytest.raises(
        InputError, match="train: 1 of 2 videos have no labels; --partial allows it"
    ):
        mosei.read_mosei(mosei_folder)
    corpus = mosei.read_mosei(mosei_folder, partial=True)
    assert "test: 1 of 1 videos have no labels" in corpus.notes


def test_the_file_of_splits_is_not_executed(mosei_folder):
    path = mosei_folder / mosei.FOLDS
    for text, message in [
        ("standard_train_fold = open('x')", "not the SDK's file of splits; needed: standard_train"),
        ("standard_train_fold = [", "not the SDK's file of splits"),
        ("standard_train_fold = [1]", "no standard_train_fold; needed"),
        ("import os\n", "no standard_train_fold; needed"),
        (FOLDS.replace("188343", "81406"), "video '81406' in train and validation"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_standard_folds(path)


def test_errors_name_the_bad_file_and_segment(mosei_folder):
    path = mosei_folder / mosei.TRANSCRIPTS / "81406.txt"
    for line, message in [
        ("81406___0___5.0___Text", r"line 1: '81406___0___5\.0___Text'; needed: video___number___"),
        ("81406___0___1.2.3___5___Text", "needed: times in seconds"),
        ("a___0___1___2___b\na___0___3___4___c", "line 2: segment 0 is repeated"),
    ]:
        path.write_text(line)
        with pytest.raises(InputError, match=message):
            mosei.read_mosei(mosei_folder)
    path.write_text("")
    labels = mosei_folder / "csd" / mosei.LABELS
    for rows, message in [
        ([(0.0, 1.0, 9.0)], "81406: label 1: score 9; allowed: -3 to 3"),
        ([(1.0, 1.0, 0.0)], "81406: label 1: interval 1 to 1"),
    ]:
        write_labels(labels, {"81406": rows})
        with pytest.raises(InputError, match=message):
            mosei.read_mosei(mosei_folder)
    write_labels(labels, LABELS, num_columns=1)
    with pytest.raises(
        InputError, match=r"features \(1, 1\), intervals \(1, 2\); needed: \[n, 7\]"
    ):
        mosei.read_mosei(mosei_folder)
    labels.unlink()
    with pytest.raises(InputError, match=r"no CMU_MOSEI_Labels\.csd; needed"):
        mosei.read_mosei(mosei_folder)
