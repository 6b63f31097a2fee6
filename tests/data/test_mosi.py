"""CMU-MOSI's released layout, with its traps."""

import h5py
import numpy as np
import pytest

from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.mosi import reader
from mister_jax.data.prepare import Decoding, Preparation, prepare_corpus
from mister_jax.errors import InputError

# A video of each split; more than nine segments, so that 10 comes after 2.
SCORES = {
    "03bSnISJMiM": [2.4, 0.0, -0.8, 1.0, -3.0, 3.0, 0.2, -0.2, 1.8, -1.2, 0.6],
    "_dI--eQ6qVU": [0.0],
    "tStelxIAHjw": [-1.0, 1.0],
}


def write_labels(path, scores, group="Opinion Segment Labels"):
    with h5py.File(path, "w") as file:
        data = file.create_group(f"{group}/data")
        file.create_group(f"{group}/metadata")
        for video, values in scores.items():
            starts = np.arange(len(values), dtype=float)
            data[f"{video}/features"] = np.array(values)[:, None]
            data[f"{video}/intervals"] = np.stack([starts, starts + 0.9], axis=1)


@pytest.fixture
def tree(tmp_path, write_wav):
    root = tmp_path / "CMU-MOSI"
    for video, scores in SCORES.items():
        numbers = range(1, len(scores) + 1)
        for number in numbers:
            if (video, number) != ("tStelxIAHjw", 2):
                write_wav(root / reader.AUDIO / f"{video}_{number}.wav", 0.2)
        transcript = root / reader.TRANSCRIPTS / f"{video}.annotprocessed"
        transcript.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{number}_DELIM_SEGMENT {number}" for number in numbers]
        transcript.write_text("\n".join(lines) + "\n")
    write_labels(root / reader.LABELS, SCORES)
    return root


def test_segments_come_in_their_order_with_scores(tree, tmp_path):
    report = prepare_corpus(Preparation("mosi", tree, tmp_path, decoding=Decoding(0), partial=True))
    dataset = DialogueDataset("mosi/binary", tmp_path)
    assert dataset.scored and dataset.class_names == ("negative", "non_negative")
    (dialogue,) = dataset.dialogues("train")
    assert [turn.id for turn in dialogue.utterances] == [f"03bSnISJMiM_{n}" for n in range(1, 12)]
    np.testing.assert_allclose(
        [turn.score for turn in dialogue.utterances], SCORES["03bSnISJMiM"], atol=1e-6
    )
    assert [turn.label for turn in dialogue.utterances] == [1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1]
    assert dialogue.utterances[9].text == "SEGMENT 10"
    assert [entry["utterance"] for entry in report["missing"]] == ["tStelxIAHjw_2"]
    (monologue,) = dataset.dialogues("test")
    assert [turn.speech_present for turn in monologue.utterances] == [True, False]


def test_the_standard_split_has_its_published_sizes():
    splits = list(reader.VIDEOS.values())
    counts = {split: splits.count(split) for split in ("train", "validation", "test")}
    assert counts == {split: videos for split, (videos, _) in reader.RELEASED.items()}


def test_a_part_of_the_corpus_is_refused(tree):
    with pytest.raises(InputError, match="train 1 dialogues, 11 utterances in place of 52, 1284"):
        reader.read(tree)


def test_bad_input_is_named(tree):
    path = tree / reader.TRANSCRIPTS / "tStelxIAHjw.annotprocessed"
    path.write_text("1_DELIM_A\n")
    with pytest.raises(InputError, match=r"segments \[1\]; needed: 1 to 2"):
        reader.read(tree)
    path.write_text("1_DELIM_A\n2 B\n")
    with pytest.raises(InputError, match="line 2: '2 B'; needed: number_DELIM_text"):
        reader.read(tree)
    path.write_text("1_DELIM_A\n1_DELIM_A\n")
    with pytest.raises(InputError, match="line 2: segment 1 repeated"):
        reader.read(tree)
    path.write_text("1_DELIM_A\n2_DELIM_B\n")
    write_labels(tree / reader.LABELS, SCORES | {"tStelxIAHjw": [0.0, 9.0]})
    with pytest.raises(InputError, match=r"tStelxIAHjw: segment 2: score 9\.0"):
        reader.read(tree)
    write_labels(tree / reader.LABELS, {"unheard_of": [0.0]})
    with pytest.raises(InputError, match="video 'unheard_of' is in no split"):
        reader.read(tree)
    for changed, message in [
        ({"data/tStelxIAHjw": [0.0]}, "tStelxIAHjw: no group; needed: one of features"),
        ({"data": [0.0]}, "0 tables; needed: one, with `data` in it"),
        ({"data/tStelxIAHjw/features": [[0.0]]}, "not the SDK's labels, or damaged"),
        ({"data/tStelxIAHjw/features": [["good"]], "data/tStelxIAHjw/intervals": [[0, 1]]}, "dam"),
        (
            {"data/tStelxIAHjw/features": [0.0], "data/tStelxIAHjw/intervals": [[0, 1]]},
            r"tStelxIAHjw: features \(1,\), intervals \(1, 2\); needed",
        ),
    ]:
        with h5py.File(tree / reader.LABELS, "w") as file:
            for name, values in changed.items():
                file[f"Opinion Segment Labels/{name}"] = values
        with pytest.raises(InputError, match=message):
            reader.read(tree)
    (tree / reader.LABELS).write_bytes(b"not HDF5")
    with pytest.raises(InputError, match="not the SDK's labels, or damaged"):
        reader.read(tree)
    (tree / reader.LABELS).unlink()
    with pytest.raises(InputError, match=r"no CMU_MOSI_Opinion_Labels\.csd; needed"):
        reader.read(tree)
