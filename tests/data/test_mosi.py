"""The reader of CMU-MOSI: segments, scores, and broken files."""

import h5py
import numpy as np
import pytest

from mister_jax.data.corpora import mosi
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
from mister_jax.errors import InputError
from tests.data.corpora import MOSI, write_mosi, write_mosi_labels


@pytest.fixture
def mosi_folder(tmp_path, write_wav):
    write_mosi(tmp_path / "CMU-MOSI", write_wav)
    return tmp_path / "CMU-MOSI"


def test_segments_are_in_order_and_have_scores(mosi_folder, tmp_path):
    report = prepare_corpus(
        PrepareOptions("mosi", mosi_folder, tmp_path, decoding=DecodingOptions(0), partial=True)
    )
    dataset = DialogueDataset("mosi/binary", tmp_path)
    assert dataset.scored and dataset.class_names == ("negative", "non_negative")
    (dialogue,) = dataset.dialogues("train")
    assert [turn.id for turn in dialogue.utterances] == [f"03bSnISJMiM_{n}" for n in range(1, 12)]
    np.testing.assert_allclose(
        [turn.score for turn in dialogue.utterances], MOSI["03bSnISJMiM"], atol=1e-6
    )
    assert [turn.label for turn in dialogue.utterances] == [1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1]
    assert dialogue.utterances[9].text == "SEGMENT 10"
    assert [entry["utterance"] for entry in report["missing"]] == ["tStelxIAHjw_2"]
    (monologue,) = dataset.dialogues("test")
    assert [turn.speech_present for turn in monologue.utterances] == [True, False]


def test_the_standard_split_has_the_published_sizes():
    splits = list(mosi.VIDEOS.values())
    counts = {split: splits.count(split) for split in ("train", "validation", "test")}
    assert counts == {split: videos for split, (videos, _) in mosi.RELEASED.items()}


def test_an_incomplete_corpus_is_rejected(mosi_folder):
    with pytest.raises(InputError, match="train 1 dialogues, 11 utterances instead of 52, 1284"):
        mosi.read_mosi(mosi_folder)


def test_errors_name_the_bad_file_and_segment(mosi_folder):
    path = mosi_folder / mosi.TRANSCRIPTS / "tStelxIAHjw.annotprocessed"
    path.write_text("1_DELIM_A\n")
    with pytest.raises(InputError, match=r"segments \[1\]; needed: 1 to 2"):
        mosi.read_mosi(mosi_folder)
    path.write_text("1_DELIM_A\n2 B\n")
    with pytest.raises(InputError, match="line 2: '2 B'; needed: number_DELIM_text"):
        mosi.read_mosi(mosi_folder)
    path.write_text("1_DELIM_A\n1_DELIM_A\n")
    with pytest.raises(InputError, match="line 2: segment 1 is repeated"):
        mosi.read_mosi(mosi_folder)
    path.write_text("1_DELIM_A\n2_DELIM_B\n")
    write_mosi_labels(mosi_folder / mosi.LABELS, MOSI | {"tStelxIAHjw": [0.0, 9.0]})
    with pytest.raises(InputError, match=r"tStelxIAHjw: segment 2: score 9\.0"):
        mosi.read_mosi(mosi_folder)
    write_mosi_labels(mosi_folder / mosi.LABELS, {"unheard_of": [0.0]})
    with pytest.raises(InputError, match="video 'unheard_of' is in no split"):
        mosi.read_mosi(mosi_folder)
    for changed, message in [
        ({"data/tStelxIAHjw": [0.0]}, "tStelxIAHjw: not a group; needed: a group with features"),
        ({"data": [0.0]}, "0 tables; needed: one that contains `data`"),
        ({"data/tStelxIAHjw/features": [[0.0]]}, "not a label file of the SDK, or damaged"),
        ({"data/tStelxIAHjw/features": [["good"]], "data/tStelxIAHjw/intervals": [[0, 1]]}, "dam"),
        (
            {"data/tStelxIAHjw/features": [0.0], "data/tStelxIAHjw/intervals": [[0, 1]]},
            r"tStelxIAHjw: features \(1,\), intervals \(1, 2\); needed",
        ),
    ]:
        with h5py.File(mosi_folder / mosi.LABELS, "w") as file:
            for name, values in changed.items():
                file[f"Opinion Segment Labels/{name}"] = values
        with pytest.raises(InputError, match=message):
            mosi.read_mosi(mosi_folder)
    (mosi_folder / mosi.LABELS).write_bytes(b"not HDF5")
    with pytest.raises(InputError, match="not a label file of the SDK, or damaged"):
        mosi.read_mosi(mosi_folder)
    (mosi_folder / mosi.LABELS).unlink()
    with pytest.raises(InputError, match=r"no CMU_MOSI_Opinion_Labels\.csd; needed"):
        mosi.read_mosi(mosi_folder)
