"""The command `mister-jax prepare`."""

import json
import pathlib
import pickle

import h5py
import numpy as np
import pytest

from mister_jax.data import load_features
from mister_jax.data.audio import encode_wav
from mister_jax.data.corpora import mosi
from mister_jax.data.dialogues import DialogueDataset
from tests.helpers.commands import run_commands


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> pathlib.Path:
    """Folder with valid and invalid corpora.

    The manifest `calls.jsonl` has four training dialogues with 12 recordings, one of which is
    longer than a second, and a test dialogue with two recordings, one of which is broken.
    """
    folder = tmp_path_factory.mktemp("corpora")
    rows = []
    for dialogue in range(5):
        for turn in range(3):
            row = {"dialogue": f"d{dialogue}", "utterance": turn, "order": turn}
            row |= {
                "split": "train" if dialogue < 4 else "test",
                "label": ("joy", "anger")[turn % 2],
            }
            row |= {"text": f"Words of {dialogue} and {turn}."}
            if dialogue < 4 or turn < 2:
                row["audio"] = f"{dialogue}_{turn}.wav"
                sound = np.arange(3200 if (dialogue, turn) != (1, 1) else 24_000, dtype=np.int16)
                encode_wav(folder / row["audio"], sound)
            rows.append(row)
    (folder / "4_1.wav").write_bytes(b"no sound")
    (folder / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [json.dumps({("path" if k == "audio" else k): row[k] for k in row}) for row in rows]
    (folder / "paths.jsonl").write_text("\n".join(lines))
    labels = {f"d{dialogue}": [0, 1] for dialogue in range(5)}
    vectors = {name: np.full((2, 3), index + 0.5) for index, name in enumerate(labels)}
    (folder / "other.pkl").write_bytes(pickle.dumps((labels, vectors, vectors)))
    (folder / "evil.pkl").write_bytes(b"cposix\nsystem\n(Vtrue\ntR.")
    (folder / "meld").mkdir()
    for name in ("train", "dev", "test"):
        (folder / "meld" / f"{name}_sent_emo.csv").write_text('"Sr No.,Utterance\n')
    (folder / "mosi" / mosi.TRANSCRIPTS).mkdir(parents=True)
    with h5py.File(folder / "mosi" / mosi.LABELS, "w") as file:
        file["Opinion Segment Labels/data/03bSnISJMiM"] = [0.0]
    (folder / "wav").mkdir()
    emobox = {"train": [], "test": []}
    for number in range(12):
        name = f"{number:02}a01{'WTN'[number % 3]}a"
        encode_wav(folder / "wav" / f"{name}.wav", np.arange(3200, dtype=np.int16))
        row = {
            "key": f"emodb-{name}",
            "wav": f"downloads/emodb/wav/{name}.mp3",
            "emo": "NST"[number % 3],
        }
        emobox["test" if number < 3 else "train"].append(json.dumps(row))
    (folder / "wav" / "._00a01Wa.wav").write_bytes(b"\0\5")
    (folder / "emodb/fold_2").mkdir(parents=True)
    for part, lines in emobox.items():
        (folder / f"emodb/fold_2/emodb_{part}_fold_2.jsonl").write_text("\n".join(lines))
    (folder / "emodb/label_map.json").write_text('{"N": "Neutral", "S": "Sad", "T": "Angray"}')
    return folder


SUCCESSES = {
    "manifest": "--corpus=manifest --source=DIR/calls.jsonl --data_dir=DIR/data --labels=joy,anger "
    "--num_workers=2 --max_seconds=1 --partial",
    "no_audio": "--corpus=manifest --source=DIR/paths.jsonl --data_dir=DIR/data --num_workers=0",
    "inspect": "--inspect=manifest/calls --data_dir=DIR/data",
    "synthetic": "--corpus=synthetic --data_dir=DIR/data --num_dialogues=2,1,1 --num_workers=1",
    "again": "--corpus=synthetic --data_dir=DIR/data --num_dialogues=2,1,1 --name=again "
    "--source=DIR/data/synthetic_recordings --num_workers=0",
    "features": "--corpus=synthetic_features --name=made_up --data_dir=DIR/data",
    "pickle": "--corpus=features --source=DIR/other.pkl --name=other --data_dir=DIR/data "
    "--fields=text=2 --labels=calm,angry",
    "inspect_pickle": "--inspect=DIR/other.pkl --fields=text=2,speech=1 --labels=calm,angry",
    "folder": "--corpus=folder --source=DIR/wav --pattern=emodb --map_labels=anger=angry "
    "--group_by=speaker --data_dir=DIR/data --num_workers=0",
    "emobox": "--corpus=emobox --source=DIR/emodb --audio_root=DIR/wav --data_dir=DIR/data "
    "--num_workers=0",
}


# A part of the error message of each invalid command.
WRONG_USES = {
    "--corpus=tv": "--corpus=tv; allowed: iemocap, meld, mosi, mosei, emorynlp, manifest, transc",
    "--corpus=features": "--source is needed with --corpus=features: an npz file",
    "--corpus=features --source=DIR/other.pkl": (
        "DIR/other.pkl: which fields have the text or speech features? Set --fields=text=1,...; "
    ),
    "--corpus=features --source=DIR/evil.pkl": "DIR/evil.pkl: wants to run posix.system; allowed",
    "--corpus=features --source=DIR/other.pkl --fields=text": "--fields=text; allowed: ROLE=FIELD",
    "--inspect=DIR/other.pkl --config=six": "--config cannot be used with --inspect=",
    "--corpus=features --config=six --labels=a,b": (
        "--config cannot be used with --corpus=features; allowed: --corpus, --source, --name,"
    ),
    "--corpus=meld --name=x": "--name cannot be used with --corpus=meld; allowed: --corpus, ",
    "--corpus=meld --labels=a": "--labels cannot be used with --corpus=meld",
    "--corpus=synthetic_features --source=x": "--source cannot be used with --corpus=synth",
    "--corpus=synthetic --labels=a": "--labels cannot be used with --corpus=synthetic;",
    "--corpus=manifest --num_dialogues=1,1,1": "--num_dialogues cannot be used with --corpus=",
    "--inspect=x --corpus=meld": "--corpus cannot be used with --inspect=x; allowed: --inspect",
    "--corpus=synthetic --num_dialogues=1,x,2": "--num_dialogues=1,x,2; allowed: three numbers",
    "--corpus=synthetic_features --num_dialogues=0,0,0": "allowed: numbers for train, validation",
    "--corpus=manifest --source=DIR/calls.jsonl --max_seconds=nan": "max_seconds=nan; allowed: fin",
    "--corpus=manifest --source=DIR/calls.jsonl --beam_options=[]": "--beam_options=[]; allowed: a",
    "--corpus=manifest --source=DIR/calls.jsonl --num_workers=0": (
        "calls: test: 1 of 2 recordings cannot be used, for example DIR/4_1.wav: not a format"
    ),
    "--corpus=meld --config=text --source=DIR/meld": "train_sent_emo.csv: line 1: not CSV (unexp",
    "--corpus=folder --source=DIR/wav": "--pattern=; allowed: nemo, emodb, ravdess, cremad, or a",
    "--corpus=folder --source=DIR/wav --fold=1": "--fold cannot be used with --corpus=folder; al",
    "--corpus=emobox": "--source is needed with --corpus=emobox: a corpus's folder in EmoBox/data",
    "--corpus=emobox --source=DIR/emodb --fold=1": "DIR/emodb has no such fold; allowed: 2",
    "--corpus=emobox --source=DIR/emodb --audio_root=DIR/mosi": (
        "emobox/emodb fold 2: train: 6 of 6 recordings are missing or empty, for example "
    ),
    "--corpus=emorynlp --source=DIR/wav": "DIR/wav: no emotion-detection-trn.json; needed: a fol",
    "--corpus=mosei --source=DIR/mosi": "DIR/mosi: no CMU_MOSEI_Labels.csd; needed: a folder th",
    "--corpus=mosi --source=DIR/mosi": "03bSnISJMiM: not a group; needed: a group with features",
}


@pytest.fixture(scope="module")
def results(corpora) -> dict[str, tuple[int, str, str]]:
    """Exit status, output and errors of each of the commands."""
    uses = {**SUCCESSES, **{use: f"{use} --data_dir=DIR/unwritten" for use in WRONG_USES}}
    return dict(
        zip(
            uses,
            run_commands([f"prepare {flags}" for flags in uses.values()], corpora),
            strict=True,
        )
    )


@pytest.fixture(scope="module")
def successes(results) -> dict[str, str]:
    """Output of each command that succeeds."""
    for name in SUCCESSES:
        status, _, errors = results[name]
        assert status == 0, errors
    return {name: results[name][1] for name in SUCCESSES}


def table_row(output: str, name: str) -> list[str]:
    """Returns the last three columns of the table row that begins with a name."""
    (line,) = (line for line in output.splitlines() if line.split()[:1] == [name])
    return line.split()[-3:]


def test_the_output_describes_the_dataset(successes, corpora):
    output = successes["manifest"]
    assert table_row(output, "train") == ["train", "validation", "test"]
    assert table_row(output, "dialogues") == ["4", "0", "1"]
    assert table_row(output, "utterances") == ["12", "0", "3"]
    assert table_row(output, "joy") == ["8", "0", "2"]
    assert table_row(output, "anger") == ["4", "0", "1"]
    assert f"missing: d4/1: {corpora}/4_1.wav: not a format that FFmpeg reads" in output
    assert f"capped: d1/1: {corpora}/1_1.wav: 1.5 s\n" in output
    assert "recordings: 1 missing, 1 capped, 12 fast_text\n" in output
    assert "WARNING: no utterances in validation; training needs the splits" in output
    assert output.endswith(f"written to {corpora}/data/manifest/calls/1.0.0\n")


def test_a_manifest_without_recordings_gets_a_hint(successes):
    output = successes["no_audio"]
    assert "note: columns kept as metadata, which no model reads: path\n" in output
    hint = "recordings: none; the manifest has no paths of recordings in the column audio\n"
    assert hint in output


def test_a_folder_is_split_by_speaker(successes, corpora):
    output = successes["folder"]
    assert table_row(output, "dialogues") == ["10", "1", "1"]
    assert sum(map(int, table_row(output, "angry"))) == 4
    assert "note: dialogues split at random, seed 0, in 12 groups that share no speaker\n" in output
    assert output.endswith(f"written to {corpora}/data/manifest/wav/1.0.0\n")


def test_a_fold_of_emobox_is_written_with_its_metadata(successes, corpora):
    output = successes["emobox"]
    assert table_row(output, "utterances") == ["6", "3", "3"]
    assert table_row(output, "Angry")[2] == "1"
    assert "note: 12 recordings have another extension than in the metadata, for exa" in output
    assert "recordings: all usable, none changed\n" in output
    assert output.endswith(f"written to {corpora}/data/emobox/emodb_fold_2/1.0.0\n")
    dataset = DialogueDataset("emobox/emodb_fold_2", corpora / "data")
    (utterance,) = next(dataset.dialogues("test")).utterances
    assert utterance.metadata == {"speaker": "00", "emobox": "emodb", "fold": "2"}


def test_an_inspection_writes_a_figure_and_prints_the_first_dialogue(successes, corpora):
    picture = corpora / "data/manifest/calls/1.0.0/inspection.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert successes["inspect"].splitlines() == [
        "first dialogue of manifest/calls:",
        "  d0/0  joy  0.20 s  Words of 0 and 0.",
        "  d0/1  anger  0.20 s  Words of 0 and 1.",
        "  d0/2  joy  0.20 s  Words of 0 and 2.",
        f"picture: {picture}",
    ]


def test_existing_synthetic_recordings_are_reused(successes, corpora):
    assert table_row(successes["synthetic"], "dialogues") == ["2", "1", "1"]
    assert "note" not in successes["synthetic"]
    note = f"note: {corpora}/data/synthetic_recordings: reusing the recordings, which were made"
    assert note in successes["again"]
    assert table_row(successes["again"], "utterances") == table_row(
        successes["synthetic"], "utterances"
    )


def test_a_feature_file_of_another_project_becomes_a_dataset(successes, corpora):
    output = successes["pickle"]
    assert table_row(output, "dialogues") == ["3", "1", "1"]
    assert "note: layout unknown, 3 fields: label from 0, text from 2" in output
    assert load_features("other", "train", corpora / "data").class_names == ("calm", "angry")


def test_inspecting_a_feature_file_shows_its_fields_and_their_use(successes):
    output = successes["inspect_pickle"]
    for row in ("0 integers 5 dialogues d0: 0 label", "2 features 5 dialogues 3 d0: [3] text"):
        assert row in [" ".join(line.split()) for line in output.splitlines()]
    assert table_row(output, "calm") == ["3", "1", "1"]


def test_the_output_describes_a_feature_dataset(successes, corpora):
    assert f"written to {corpora}/data/made_up/1.0.0" in successes["features"]
    for split in ("train", "validation", "test"):
        assert (
            str(len(load_features("made_up", split, corpora / "data").label))
            in successes["features"]
        )


@pytest.mark.parametrize("use", WRONG_USES)
def test_a_wrong_use_exits_with_status_2_and_one_line(results, corpora, use):
    status, output, errors = results[use]
    assert WRONG_USES[use].replace("DIR", str(corpora)) in errors
    assert (status, output, errors.count("\n"), errors[:7]) == (2, "", 1, "error: ")
    assert not list(corpora.glob("unwritten/*"))


@pytest.mark.parity
def test_beam_accepts_its_options_and_rejects_others(corpora):
    pytest.importorskip("apache_beam")
    use = "prepare --corpus=manifest --source=DIR/calls.jsonl --data_dir=DIR/beam --partial"
    wrong = {
        '{"runner":"nosuch"}': "--beam_options: runner 'nosuch': Unexpected pipeline runner",
        '{"runner":"direct","direct_num_wrokers":2}': "--beam_options: direct_num_wrokers: unknown",
        '{"direct_num_workers":"many"}': "--beam_options: argument --direct_num_workers: invalid",
    }
    uses = [f"{use} --beam_options={options}" for options in (*wrong, '{"runner":"direct"}')]
    *failed, succeeded = run_commands(uses, corpora)
    for (status, output, errors), message in zip(failed, wrong.values(), strict=True):
        assert message in errors
        assert (status, output, errors.count("\n"), errors[:7]) == (2, "", 1, "error: ")
    status, output, errors = succeeded
    assert status == 0, errors
    assert table_row(output, "utterances") == ["12", "0", "3"]
    assert f"missing: d4/1: {corpora}/4_1.wav: not a format that FFmpeg reads" in output
    assert output.endswith(f"written to {corpora}/beam/manifest/calls/1.0.0\n")
