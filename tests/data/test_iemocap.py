"""IEMOCAP's released layout, with its traps."""

import pytest

from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.iemocap import reader
from mister_jax.data.prepare import Decoding, Preparation, prepare_corpus
from mister_jax.errors import InputError

HEADER = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
# Dialogue -> turns: start, end, what stands after the dialogue's name, label. Not in time order.
DIALOGUES = {
    "Ses01F_impro01": [(6.0, 7.0, "M000", "fru"), (1.5, 3.0, "F000", "neu")],
    "Ses01M_impro01": [(0.5, 1.0, "F000", "hap")],
    "Ses02F_script01_1": [
        (9.0, 10.0, "F001", "exc"),
        (2.0, 4.0, "M001", "xxx"),
        (4.0, 5.0, "MXX0", "neu"),
        (5.0, 6.0, "F000", "ang"),
    ],
    "Ses03M_impro05a": [
        (1.0, 2.0, "F003", "sad"),
        (3.0, 4.0, "M002", "oth"),
        (5.0, 6.0, "M003", "sur"),
        (7.0, 8.0, "M004", "fea"),
        (9.0, 9.5, "M005", "dis"),
    ],
    "Ses04F_impro07": [(0.0, 1.0, "M000", "exc")],
    "Ses05F_script03_2": [(12.5, 13.0, "M010", "hap"), (3.25, 4.0, "F002", "ang")],
}


@pytest.fixture(scope="session")
def tree(tmp_path_factory, write_wav):
    root = tmp_path_factory.mktemp("iemocap") / "IEMOCAP_full_release"
    for name, turns in DIALOGUES.items():
        session = root / f"Session{name[4]}"
        annotation = session / "dialog/EmoEvaluation" / f"{name}.txt"
        transcript = session / "dialog/transcriptions" / f"{name}.txt"
        for path in (annotation, transcript):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f"._{name}.txt").write_bytes(b"\0\5\x16\7\xff")
        blocks = [
            f"[{start:.4f} - {end:.4f}]\t{name}_{turn}\t{label}\t[2.5, 2.5, 2.5]\n"
            "C-E1:\tNeutral;\t()\nA-E1:\tval 3; act 3; dom 3;\t()\n"
            for start, end, turn, label in turns
        ]
        annotation.write_text(HEADER + "\n".join(blocks))
        lines = [
            f"{name}_{turn} [{start:08.4f}-{end:08.4f}]: Words of {turn}."
            for start, end, turn, _ in turns
        ]
        transcript.write_text("\n".join([*lines, "M: (laughs)"]) + "\n")
        for _, _, turn, _ in turns:
            wav = session / "sentences/wav" / name / f"{name}_{turn}.wav"
            if turn != "M002":  # a missing recording
                write_wav(wav)
            wav.with_name(f"._{wav.name}").write_bytes(b"\0\5")
    (root / "Session4/sentences/wav/Ses04F_impro07/Ses04F_impro07_M000.wav").write_bytes(b"")
    return root


def prepare(source, data_dir, config):
    return prepare_corpus(
        Preparation("iemocap", source, data_dir, config, decoding=Decoding(0), partial=True)
    )


def turns_of(dataset, split):
    def label(turn):
        return None if turn.label < 0 else dataset.class_names[turn.label]

    return [
        (turn.id, label(turn), turn.speech_present)
        for dialogue in dataset.dialogues(split)
        for turn in dialogue.utterances
    ]


TEST = [("Ses05F_script03_2_F002", "angry", True), ("Ses05F_script03_2_M010", "happy", True)]
SESSION1 = [
    ("Ses01F_impro01_F000", "neutral", True),
    ("Ses01F_impro01_M000", "frustrated", True),
    ("Ses01M_impro01_F000", "happy", True),
]
SESSION2 = [
    ("Ses02F_script01_1_M001", None, True),
    ("Ses02F_script01_1_F000", "angry", True),
    ("Ses02F_script01_1_F001", "excited", True),
]
SESSION3 = [
    ("Ses03M_impro05a_F003", "sad", True),
    ("Ses03M_impro05a_M002", None, False),
    ("Ses03M_impro05a_M003", None, True),
    ("Ses03M_impro05a_M004", None, True),
    ("Ses03M_impro05a_M005", None, True),
]
SESSION4 = [("Ses04F_impro07_M000", "excited", False)]


def test_sessions_are_the_splits(tree, tmp_path):
    report = prepare(tree, tmp_path, "six_session1")
    dataset = DialogueDataset("iemocap/six_session1", tmp_path)
    assert turns_of(dataset, "train") == SESSION2 + SESSION3 + SESSION4
    assert turns_of(dataset, "validation") == SESSION1
    assert turns_of(dataset, "test") == TEST
    turn = next(dataset.dialogues("test")).utterances[0]
    assert (turn.start, turn.end, turn.text) == (3.25, 4.0, "Words of F002.")
    assert [(entry["utterance"], entry["reason"]) for entry in report["missing"]] == [
        ("Ses03M_impro05a_M002", "no such file"),
        ("Ses04F_impro07_M000", "empty file"),
    ]


def test_the_validation_dialogues_of_cosmic_are_the_other_choice(tree, tmp_path):
    assert len(reader.COSMIC12) == 12
    prepare(tree, tmp_path, "six_cosmic12")
    dataset = DialogueDataset("iemocap/six_cosmic12", tmp_path)
    assert turns_of(dataset, "validation") == SESSION1[2:] + SESSION4
    assert turns_of(dataset, "train") == SESSION1[:2] + SESSION2 + SESSION3
    assert turns_of(dataset, "test") == TEST


def test_four_classes_merge_excited_and_leave_frustrated_unlabelled(tree, tmp_path):
    prepare(tree, tmp_path, "four_session1")
    dataset = DialogueDataset("iemocap/four_session1", tmp_path)
    assert dataset.class_names == ("happy", "sad", "neutral", "angry")
    labels = {turn: label for turn, label, _ in turns_of(dataset, "train")}
    assert labels["Ses02F_script01_1_F001"] == "happy"
    validation = {turn: label for turn, label, _ in turns_of(dataset, "validation")}
    assert validation["Ses01F_impro01_M000"] is None


def test_a_part_of_the_corpus_is_refused(tree):
    with pytest.raises(InputError, match="6 dialogues, 14 utterances in place of 151, 10039"):
        reader.read(tree)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1 - 2]\tSes01F_x_F000\tbored\t[1, 1, 1]", "line 3: label 'bored'; allowed: hap"),
        ("[1 - 2]\tSes01F_y_F000\tneu\t[1, 1, 1]", "of another dialogue; needed: Ses01F_x_"),
        ("[1 - 2] Ses01F_x_F000 neu", "line 3: .*tabs between"),
        ("[1.2.3 - 2]\tSes01F_x_F000\tneu\t[1, 1, 1]", r"line 3: time '1\.2\.3'"),
        ("nothing", "no turns"),
        ("[5 - 2]\tSes01F_x_F000\tneu\t[1, 1, 1]", r"line 3: \[5 - 2\]; needed: an end after"),
        (
            "[1 - 2]\tSes01F_x_F000\tneu\t[1, 1, 1]\n[3 - 4]\tSes01F_x_F000\tsad\t[1, 1, 1]",
            r"EmoEvaluation/Ses01F_x\.txt: line 4: turn Ses01F_x_F000 repeated",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    for folder in ("EmoEvaluation", "transcriptions"):
        path = tmp_path / "Session1/dialog" / folder / "Ses01F_x.txt"
        path.parent.mkdir(parents=True)
        path.write_text(HEADER + line + "\n")
    with pytest.raises(InputError, match=message):
        reader.read(tmp_path, partial=True)


def test_a_turn_has_one_transcript(tmp_path):
    annotation = tmp_path / "Session1/dialog/EmoEvaluation/Ses01F_x.txt"
    transcript = tmp_path / "Session1/dialog/transcriptions/Ses01F_x.txt"
    for path in (annotation, transcript):
        path.parent.mkdir(parents=True)
    annotation.write_text(HEADER + "[1 - 2]\tSes01F_x_F000\tneu\t[1, 1, 1]\n")
    line = "Ses01F_x_F000 [001.0-002.0]: One.\n"
    transcript.write_text(line + "Ses01F_x_MXX0 [1-2]: A.\nSes01F_x_MXX0 [3-4]: B.\n" + line)
    ((_, turn),) = reader.read(tmp_path, partial=True).utterances()
    assert turn.text == "One."
    transcript.write_text(line + line.replace("One", "Another"))
    with pytest.raises(InputError, match=r"transcriptions/Ses01F_x\.txt: line 2: turn Ses01F_x_F0"):
        reader.read(tmp_path, partial=True)


def test_missing_files_and_unknown_options_are_named(tmp_path):
    with pytest.raises(InputError, match="EmoEvaluation: no such folder; needed: IEMOCAP_full"):
        reader.read(tmp_path)
    with pytest.raises(InputError, match="classes 'five'; allowed: six, four"):
        reader.read(tmp_path, classes="five")
    annotation = tmp_path / "Session1/dialog/EmoEvaluation/Ses01F_x.txt"
    annotation.parent.mkdir(parents=True)
    annotation.write_text("[1 - 2]\tSes01F_x_F000\tneu\t[1, 1, 1]\n")
    with pytest.raises(InputError, match="each dialogue needs its transcript"):
        reader.read(tmp_path, partial=True)
