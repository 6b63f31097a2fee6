"""The reader of MELD: dialogues, clips, downloads, and broken files."""

import json
import os
import pathlib
import time
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
from etils import epath

from mister_jax.data.corpora import meld
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
from mister_jax.errors import InputError
from tests.data.corpora import MELD, MELD_COLUMNS, write_meld_csv


def prepare(source, data_dir, config="clips", **changes):
    return prepare_corpus(
        PrepareOptions("meld", source, data_dir, config, decoding=DecodingOptions(0), **changes)
    )


@pytest.mark.parametrize("config", ["clips", "corrected_test_clips"])
def test_dialogues_match_the_rows_of_the_csv_files(meld_folder, tmp_path, config):
    report = prepare(meld_folder, tmp_path, config, partial=True)
    dataset = DialogueDataset(f"meld/{config}", tmp_path)
    assert dataset.class_names == meld.CLASS_NAMES
    actual = {
        split: {
            dialogue.id: [
                (turn.id, turn.text, dataset.class_names[turn.label], turn.speech_present)
                for turn in dialogue.utterances
            ]
            for dialogue in dataset.dialogues(split)
        }
        for split in dataset.splits
    }
    assert actual == {
        "train": {
            "train_dia59": [("train_dia59_utt0", "Alone \u2013 café.", "fear", True)],
            "train_dia61": [
                ("train_dia61_utt0", "It\u2019s first.", "neutral", True),
                ("train_dia61_utt3", "Third.", "joy", True),
            ],
            "train_dia125": [("train_dia125_utt3", "Unreadable.", "anger", False)],
        },
        "validation": {
            "validation_dia110": [
                ("validation_dia110_utt7", "Absent.", "sadness", False),
                ("validation_dia110_utt8", "There.", "surprise", True),
            ]
        },
        "test": {
            "test_dia38": [
                ("test_dia38_utt4", "Very long.", "disgust", True),
                ("test_dia38_utt5", "Alone \u2013 café.", "neutral", True),
            ],
            "test_dia220": [("test_dia220_utt0", "Very short.", "joy", True)],
        },
    }
    assert list(actual["train"]) == ["train_dia59", "train_dia61", "train_dia125"]
    assert list(actual["test"]) == ["test_dia38", "test_dia220"]
    assert [entry["utterance"] for entry in report["missing"]] == [
        "train_dia125_utt3",
        "validation_dia110_utt7",
    ]
    assert report["missing"][1]["reason"] == "no such file"
    assert [entry["utterance"] for entry in report["capped"]] == ["test_dia38_utt4"]
    (mismatch,) = report["length_mismatch"]
    assert (mismatch["utterance"], mismatch["annotated_seconds"]) == ("test_dia38_utt4", 0.75)
    assert report["capped"][0]["seconds"] == pytest.approx(305, abs=0.1)
    assert report["splits"]["test"]["train_text_overlap"] == 1
    assert any("1 clips without a row" in note for note in report["notes"])
    long, corrected, short = [
        turn for dialogue in dataset.dialogues("test") for turn in dialogue.utterances
    ]
    assert len(long.audio) == 60 * 16_000
    # AAC pads to whole frames of 1,024 samples at 48 kHz.
    assert 0 < len(short.audio) <= 0.064 * 16_000 + 2 * 342
    seconds = 1.5 if config == "corrected_test_clips" else 0.5
    assert len(corrected.audio) / 16_000 == pytest.approx(seconds, abs=0.05)
    assert (long.start, long.end) == (1.5, 2.25)
    six_channels = next(iter(list(dataset.dialogues("train"))[1:])).utterances[0].audio
    spectrum = np.abs(np.fft.rfft(six_channels.astype(float)))
    assert np.argmax(spectrum) * 16_000 / len(six_channels) == pytest.approx(220, abs=4)


def test_the_dataset_does_not_contain_speakers(meld_folder, tmp_path):
    prepare(meld_folder, tmp_path, partial=True)
    fields = (tmp_path / "meld/clips/1.0.0/features.json").read_text().lower()
    assert "speaker" not in fields and "utterance" in fields


def test_the_text_config_needs_no_clips(tmp_path):
    source = tmp_path / "csv"
    source.mkdir()
    write_meld_csv(source, MELD)
    prepare(source, tmp_path, "text", partial=True)
    dataset = DialogueDataset("meld/text", tmp_path)
    turns = [turn for dialogue in dataset.dialogues("train") for turn in dialogue.utterances]
    assert not any(turn.speech_present or len(turn.audio) for turn in turns)
    assert all(turn.text_present for turn in turns)


def test_an_incomplete_corpus_is_rejected(meld_folder, tmp_path):
    with pytest.raises(InputError, match=r"train 3 dialogues, 4 utterances instead of 1038, 9989"):
        prepare(meld_folder, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("train", 1, 0, "a", "boredom"), "line 2: Emotion 'boredom'; allowed: neutral, joy"),
        (("train", "one", 0, "a", "joy"), "line 2: Dialogue_ID 'one'|Dialogue_ID: 'one'"),
    ],
)
def test_an_error_names_the_bad_row(tmp_path, row, message):
    write_meld_csv(tmp_path, [row])
    with pytest.raises(InputError, match=message):
        meld.read_meld(tmp_path, clips=False)


def test_errors_name_the_bad_file_and_line(tmp_path):
    with pytest.raises(InputError, match=r"no train_sent_emo.csv; needed: MELD.Raw"):
        meld.read_meld(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        meld.read_meld(tmp_path / "nowhere")
    write_meld_csv(tmp_path, MELD)
    with pytest.raises(InputError, match=r"no folder train_splits.*--config=text"):
        meld.read_meld(tmp_path)
    write_meld_csv(tmp_path, [MELD[0], MELD[0]])
    with pytest.raises(InputError, match="line 3: dialogue 61, utterance 3 is repeated"):
        meld.read_meld(tmp_path, clips=False)
    write_meld_csv(tmp_path, MELD, start="noon")
    with pytest.raises(InputError, match="line 2: StartTime: 'noon'"):
        meld.read_meld(tmp_path, clips=False)
    (tmp_path / "train_sent_emo.csv").write_text("Utterance,Emotion\n")
    with pytest.raises(InputError, match="no column Dialogue_ID"):
        meld.read_meld(tmp_path, clips=False)
    header = ",".join(MELD_COLUMNS)
    num_columns = len(MELD_COLUMNS)
    for fields in (["1"], ["1"] * (num_columns + 2)):
        (tmp_path / "train_sent_emo.csv").write_text(f"{header}\n{','.join(fields)}\n")
        with pytest.raises(
            InputError, match=f"line 2: {len(fields)} fields; needed: {num_columns}"
        ):
            meld.read_meld(tmp_path, clips=False)
    for text in ('"Sr No.,Utterance\n', header + '\n1,"never closed\n'):
        (tmp_path / "train_sent_emo.csv").write_text(text)
        with pytest.raises(InputError, match=r"line \d: not CSV \(unexpected end of data\)"):
            meld.read_meld(tmp_path, clips=False)
    (tmp_path / "train_sent_emo.csv").write_bytes(b"Utterance\n\xff\n")
    with pytest.raises(InputError, match="line 2: not UTF-8"):
        meld.read_meld(tmp_path, clips=False)


@pytest.fixture
def downloads(tmp_path):
    """A fake download manager whose files contain their own names.

    During the download, a folder for an unfinished file exists.
    """

    def download(urls):
        unfinished = tmp_path / "meld" / "train.csv.tmp.abc"
        unfinished.mkdir(parents=True)
        for name, url in urls.items():
            assert url.endswith(f"/MELD/{name}")
            (tmp_path / f"cached_{name}").write_text(name)
        unfinished.rmdir()
        return {name: epath.Path(tmp_path / f"cached_{name}") for name in urls}

    return types.SimpleNamespace(download_dir=tmp_path, download=download)


def test_csv_files_are_downloaded_once(downloads, monkeypatch):
    monkeypatch.setattr(meld, "_check_reachable", lambda url: None)
    folder = meld.download_csv(downloads)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        name: name for name in meld.CSV_FILES.values()
    }
    downloads.download = None
    assert meld.download_csv(downloads) == folder


def refuse(*_, **__):
    raise urllib.error.URLError("Name or service not known")


def hang(*_, **__):
    time.sleep(5)


@pytest.mark.parametrize(
    ("answer", "reason"), [(refuse, "Name or service not known"), (hang, "no answer within 0.1 s")]
)
def test_without_a_network_the_error_comes_soon_and_names_the_alternative(
    downloads, monkeypatch, answer, reason
):
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    monkeypatch.setattr(meld, "_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(InputError, match=rf"{reason}.*; --source=DIR reads train_sent_emo\.csv"):
        meld.download_csv(downloads)
    assert not list(downloads.download_dir.iterdir())


def test_a_failed_download_leaves_no_unfinished_files(downloads, monkeypatch):
    def failing(urls):
        (downloads.download_dir / "meld" / "train.csv.tmp.abc").mkdir(parents=True)
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(meld, "_check_reachable", lambda url: None)
    downloads.download = failing
    with pytest.raises(InputError, match=r"cannot be downloaded \(reset by peer\)"):
        meld.download_csv(downloads)
    assert not list(downloads.download_dir.rglob("*.tmp.*"))


TRANSCRIPTS = os.environ.get("MELD_TRANSCRIPTS", "../shared/data/meld_transcripts.jsonl")


@pytest.mark.skipif(not pathlib.Path(TRANSCRIPTS).exists(), reason="needs MELD's transcripts")
def test_the_complete_corpus_has_the_published_sizes(tmp_path):
    fields = ("split", "dialogue", "utterance", "text", "emotion")
    lines = pathlib.Path(TRANSCRIPTS).read_text(encoding="utf-8").splitlines()
    rows = [tuple(json.loads(line)[field] for field in fields) for line in lines]
    write_meld_csv(tmp_path, rows)
    report = prepare(tmp_path, tmp_path / "data", "text")
    sizes = {
        split: (values["dialogues"], values["utterances"], values["train_text_overlap"])
        for split, values in report["splits"].items()
    }
    assert sizes == {
        "train": (1038, 9989, 0),
        "validation": (114, 1109, 135),
        "test": (280, 2610, 331),
    }
    order = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")
    classes = {split: values["classes"] for split, values in report["splits"].items()}
    assert classes == {
        "train": dict(zip(order, (4710, 1743, 1205, 1109, 683, 271, 268), strict=True)),
        "validation": dict(zip(order, (470, 163, 150, 153, 111, 22, 40), strict=True)),
        "test": dict(zip(order, (1256, 402, 281, 345, 208, 68, 50), strict=True)),
    }
