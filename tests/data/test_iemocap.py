"""The reader of IEMOCAP: splits, labels, order, and broken files."""

import pytest

from mister_jax.data.corpora import iemocap
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
from mister_jax.errors import InputError
from tests.data.corpora import IEMOCAP_HEADER


def prepare(source, data_dir, config):
    return prepare_corpus(
        PrepareOptions(
            "iemocap", source, data_dir, config, decoding=DecodingOptions(0), partial=True
        )
    )


def dialogues_of(dataset, split):
    """Returns the turns of each dialogue: suffix of the id, label, presence of speech."""

    def label(turn):
        return None if turn.label < 0 else dataset.class_names[turn.label]

    return {
        dialogue.id: [
            (turn.id.removeprefix(f"{dialogue.id}_"), label(turn), turn.speech_present)
            for turn in dialogue.utterances
        ]
        for dialogue in dataset.dialogues(split)
    }


SESSION1 = {
    "Ses01F_impro01": [("F000", "neutral", True), ("M000", "frustrated", True)],
    "Ses01M_impro01": [("F000", "happy", True)],
}
SESSION2 = {
    "Ses02F_script01_1": [
        ("M001", None, True),
        ("F000", "angry", True),
        ("F001", "excited", True),
    ]
}
SESSION3 = {
    "Ses03M_impro05a": [
        ("F003", "sad", True),
        ("M002", None, False),
        ("M003", None, True),
        ("M004", None, True),
        ("M005", None, True),
    ]
}
SESSION4 = {"Ses04F_impro07": [("M000", "excited", False)]}
TEST = {"Ses05F_script03_2": [("F002", "angry", True), ("M010", "happy", True)]}


def test_splits_are_sessions(iemocap_folder, tmp_path):
    report = prepare(iemocap_folder, tmp_path, "six_session1")
    dataset = DialogueDataset("iemocap/six_session1", tmp_path)
    assert dialogues_of(dataset, "train") == SESSION2 | SESSION3 | SESSION4
    assert dialogues_of(dataset, "validation") == SESSION1
    assert dialogues_of(dataset, "test") == TEST
    turn = next(dataset.dialogues("test")).utterances[0]
    assert (turn.start, turn.end, turn.text) == (3.25, 4.0, "Words of F002.")
    assert [(entry["utterance"], entry["reason"]) for entry in report["missing"]] == [
        ("Ses03M_impro05a_M002", "no such file"),
        ("Ses04F_impro07_M000", "empty file"),
    ]


def test_cosmic12_selects_the_validation_dialogues_of_cosmic(iemocap_folder, tmp_path):
    assert len(iemocap.COSMIC12) == 12
    prepare(iemocap_folder, tmp_path, "six_cosmic12")
    dataset = DialogueDataset("iemocap/six_cosmic12", tmp_path)
    train_session1 = dict(SESSION1)
    validation = {"Ses01M_impro01": train_session1.pop("Ses01M_impro01")}
    assert dialogues_of(dataset, "validation") == validation | SESSION4
    assert dialogues_of(dataset, "train") == train_session1 | SESSION2 | SESSION3
    assert dialogues_of(dataset, "test") == TEST


def test_four_classes_merge_excited_and_drop_the_label_of_frustrated(iemocap_folder, tmp_path):
    prepare(iemocap_folder, tmp_path, "four_session1")
    dataset = DialogueDataset("iemocap/four_session1", tmp_path)
    assert dataset.class_names == ("happy", "sad", "neutral", "angry")
    assert dialogues_of(dataset, "train")["Ses02F_script01_1"][2] == ("F001", "happy", True)
    assert dialogues_of(dataset, "validation")["Ses01F_impro01"][1] == ("M000", None, True)


def test_an_incomplete_corpus_is_rejected(iemocap_folder):
    with pytest.raises(InputError, match="6 dialogues, 14 utterances instead of 151, 10039"):
        iemocap.read_iemocap(iemocap_folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1 - 2]\tSes01F_x_F000\tbored\t[1, 1, 1]", "line 3: label 'bored'; allowed: hap"),
        (
            "[1 - 2]\tSes01F_y_F000\tneu\t[1, 1, 1]",
            "belongs to another dialogue; needed: Ses01F_x_",
        ),
        ("[1 - 2] Ses01F_x_F000 neu", "line 3: .*separated by tabs"),
        ("[1.2.3 - 2]\tSes01F_x_F000\tneu\t[1, 1, 1]", r"line 3: time '1\.2\.3'"),
        ("nothing", "no turns"),
        ("[5 - 2]\tSes01F_x_F000\tneu\t[1, 1, 1]", r"line 3: \[5 - 2\]; needed: end >= start"),
        (
            "[1 - 2]\tSes01F_x_F000\tneu\t[1, 1, 1]\n[3 - 4]\tSes01F_x_F000\tsad\t[1, 1, 1]",
            r"EmoEvaluation/Ses01F_x\.txt: line 4: turn Ses01F_x_F000 is repeated",
        ),
    ],
)
def test_an_error_names_the_bad_line(tmp_path, line, message):
    for folder in ("EmoEvaluation", "transcriptions"):
        path = tmp_path / "Session1/dialog" / folder / "Ses01F_x.txt"
        path.parent.mkdir(parents=True)
        path.write_text(IEMOCAP_HEADER + line + "\n")
    with pytest.raises(InputError, match=message):
        iemocap.read_iemocap(tmp_path, partial=True)


def test_a_turn_with_two_transcripts_is_rejected(tmp_path):
    annotation = tmp_path / "Session1/dialog/EmoEvaluation/Ses01F_x.txt"
    transcript = tmp_path / "Session1/dialog/transcriptions/Ses01F_x.txt"
    for path in (annotation, transcript):
        path.parent.mkdir(parents=True)
    annotation.write_text(IEMOCAP_HEADER + "[1 - 2]\tSes01F_x_F000\tneu\t[1, 1, 1]\n")
    line = "Ses01F_x_F000 [001.0-002.0]: One.\n"
    transcript.write_text(line + "Ses01F_x_MXX0 [1-2]: A.\nSes01F_x_MXX0 [3-4]: B.\n" + line)
    ((_, turn),) = iemocap.read_iemocap(tmp_path, partial=True).utterances()
    assert turn.text == "One."
    transcript.write_text(line + line.replace("One", "Another"))
    with pytest.raises(InputError, match=r"transcriptions/Ses01F_x\.txt: line 2: turn Ses01F_x_F0"):
        iemocap.read_iemocap(tmp_path, partial=True)


def test_errors_name_missing_files_and_unknown_options(tmp_path):
    with pytest.raises(InputError, match="EmoEvaluation: no such folder; needed: IEMOCAP_full"):
        iemocap.read_iemocap(tmp_path)
    with pytest.raises(InputError, match="classes 'five'; allowed: six, four"):
        iemocap.read_iemocap(tmp_path, classes="five")
    annotation = tmp_path / "Session1/dialog/EmoEvaluation/Ses01F_x.txt"
    annotation.parent.mkdir(parents=True)
    annotation.write_text("[1 - 2]\tSes01F_x_F000\tneu\t[1, 1, 1]\n")
    with pytest.raises(InputError, match="each dialogue needs its transcript"):
        iemocap.read_iemocap(tmp_path, partial=True)
