"""The reader of EmoBox: folds, label maps, validation by speaker, and broken files."""

import collections
import json
import pathlib
import re

import pytest

from mister_jax.data.corpora.emobox import SPEAKERS, read_emobox
from mister_jax.errors import InputError

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "real"

LABELS = {"A": "Angray", "H": "Joy", "N": "neutral", "Surprised": "Superise"}


def make_rows(speakers, texts=5, labels=("A", "H", "N")):
    """Returns metadata in the format of URDU for all combinations of speaker, label and text."""
    return [
        {
            "key": f"urdu-{speaker}_F{text}_{label}{text}",
            "wav": f"downloads/urdu/{label}/{speaker}_F{text}_{label}{text}.wav",
            "length": 2.0,
            "emo": label,
            "channel": 1,
        }
        for speaker in speakers
        for label in labels
        for text in range(1, texts + 1)
    ]


def write_part(path, rows, formats=("json", "jsonl")):
    path.parent.mkdir(parents=True, exist_ok=True)
    if "json" in formats:
        objects = {row["key"]: {k: v for k, v in row.items() if k != "key"} for row in rows}
        path.with_suffix(".json").write_text(json.dumps(objects))
    if "jsonl" in formats:
        lines = "".join(f"{json.dumps(row)}\n\n" for row in rows)  # The file also has empty lines.
        path.with_suffix(".jsonl").write_text(f"\n{lines}")


@pytest.fixture
def urdu(tmp_path):
    """Folder of a corpus with two folds. Some names in fold 1 contain "fold_1", others "fold1"."""
    folder = tmp_path / "EmoBox/data/urdu"
    train, test = make_rows(["SF1", "SF2", "SM1", "SM2", "SM3"]), make_rows(["SM4"])
    for fold, (train_rows, test_rows) in {
        1: (train, test),
        2: (test + train[:60], train[60:]),
    }.items():
        write_part(folder / f"fold_{fold}/urdu_train_fold_{fold}", train_rows)
        write_part(folder / f"fold_{fold}/urdu_test_fold_{fold}", test_rows)
    other_names = [{"audio" if k == "wav" else k: v for k, v in row.items()} for row in train]
    write_part(folder / "fold_1/urdu_train_fold1", other_names)
    write_part(folder / "fold1/urdu_test_fold1", test)
    (folder / "fold_1/._urdu_train_fold_1.jsonl").write_bytes(b"\0\5\x16\7\xff")
    (folder / "._urdu.json").write_bytes(b"\0\5\x16\7\xff")
    (folder / "label_map.json").write_text(json.dumps(LABELS))
    for row in train + test:
        path = tmp_path / "EmoBox" / row["wav"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def speakers(corpus):
    return {
        split: {turn.metadata["speaker"] for dialogue in dialogues for turn in dialogue.utterances}
        for split, dialogues in corpus.splits.items()
    }


def classes(corpus, split):
    turns = (turn for dialogue in corpus.splits[split] for turn in dialogue.utterances)
    return collections.Counter(turn.label for turn in turns)


def test_a_fold_is_read_with_validation_by_speaker(urdu):
    corpus = read_emobox(urdu)
    assert corpus.name == "emobox/urdu fold 1"
    assert corpus.class_names == ("Angry", "Happy", "Neutral")
    assert corpus.sizes() == {"train": (60, 60), "validation": (15, 15), "test": (15, 15)}
    assert classes(corpus, "validation") == dict.fromkeys(corpus.class_names, 5)
    split_speakers = speakers(corpus)
    assert split_speakers["test"] == {"SM4"}
    assert len(split_speakers["train"]) == 4 and len(split_speakers["validation"]) == 1
    assert not split_speakers["train"] & split_speakers["validation"]
    assert corpus.notes == (
        "fold 1 of 2 of EmoBox's urdu",
        "validation: 15 of 75 training utterances, all of 1 speaker, seed 0",
    )
    utterance = corpus.splits["test"][0].utterances[0]
    assert utterance.id == corpus.splits["test"][0].id == "urdu-SM4_F1_A1"
    assert utterance.metadata == {"speaker": "SM4", "emobox": "urdu", "fold": "1"}
    assert (utterance.start, utterance.end) == (0, 2)
    assert utterance.recording.source == str(urdu.parents[1] / "downloads/urdu/A/SM4_F1_A1.wav")


def test_the_seed_chooses_the_speakers_and_another_fold_warns_of_shared_speakers(urdu):
    drawn = {frozenset(speakers(read_emobox(urdu, seed=seed))["validation"]) for seed in range(9)}
    assert len(drawn) > 1
    second = read_emobox(urdu, fold=2)
    assert second.notes[0] == "fold 2 of 2 of EmoBox's urdu"
    assert second.sizes()["test"] == (15, 15)
    assert {turn.metadata["fold"] for _, turn in second.utterances()} == {"2"}


def test_other_extensions_and_layouts_of_the_recordings(urdu, tmp_path):
    (tmp_path / "flat").mkdir()
    for row in make_rows(["SF1", "SF2", "SM1", "SM2", "SM3"]):
        (tmp_path / "flat" / f"{row['key'][5:]}.flac").touch()
    corpus = read_emobox(urdu, audio_root=tmp_path / "flat")
    assert corpus.notes[-1] == (
        "75 recordings have another extension than in the metadata, for example SF1_F1_A1.flac for "
        "SF1_F1_A1.wav"
    )
    sources = [turn.recording.source for _, turn in corpus.utterances()]
    assert sum(source.endswith(".flac") for source in sources) == 75
    # A missing recording keeps the path from the metadata, so that the report can name it.
    missing = [source for source in sources if source.endswith(".wav")]
    assert missing[0] == str(tmp_path / "flat/downloads/urdu/A/SM4_F1_A1.wav")


def test_labels_of_another_case_and_labels_without_an_emotion(urdu):
    (urdu / "label_map.json").unlink()
    labels = {"a": "Angry", "H": "Happy", "N": "Other"}
    (urdu / "label_dict.json").write_text(json.dumps(labels))
    corpus = read_emobox(urdu)
    assert corpus.class_names == ("Angry", "Happy")
    assert corpus.notes[1:3] == (
        "label 'A' read as 'Angry', 30 utterances",
        "30 utterances labeled Other are unlabeled, because Other is not an emotion",
    )
    assert classes(corpus, "test") == {"Angry": 5, "Happy": 5, None: 5}


def test_map_labels_renames_and_removes_classes(urdu):
    corpus = read_emobox(urdu, label_map={"Angry": "anger", "Neutral": ""})
    assert corpus.class_names == ("Happy", "anger")
    with pytest.raises(InputError, match="'Joy' is not a class; allowed: Angry, Happy, Neutral"):
        read_emobox(urdu, label_map={"Joy": "joy"})


def test_without_speakers_a_fifth_of_each_class_is_drawn(urdu, tmp_path):
    folder = urdu.rename(urdu.with_name("aesdd"))
    for path in [*folder.glob("fold*/*fold1*"), *folder.glob("fold1")]:
        path.unlink() if path.is_file() else path.rmdir()
    for path in folder.glob("fold_*/urdu*"):
        path.rename(path.with_name(path.name.replace("urdu", "aesdd")))
    corpus = read_emobox(folder)
    assert corpus.sizes() == {"train": (60, 60), "validation": (15, 15), "test": (15, 15)}
    assert classes(corpus, "validation") == {"Angry": 5, "Happy": 5, "Neutral": 5}
    assert corpus.notes[1] == (
        "WARNING: validation: 15 of 75 training utterances, a fifth of each class at random, "
        "seed 0; the speakers are unknown, so the same speakers may be in training and validation"
    )


def test_two_speakers_are_too_few_to_hold_one_out(urdu):
    write_part(urdu / "fold_3/urdu_train_fold_3", make_rows(["SF1", "SF2"]))
    write_part(urdu / "fold_3/urdu_test_fold_3", make_rows(["SM3"]))
    corpus = read_emobox(urdu, fold=3)
    assert corpus.sizes()["validation"] == (6, 6)
    assert corpus.notes[1].startswith("validation: 6 of 30 training utterances, a fifth of each")
    assert corpus.notes[2] == (
        "WARNING: 2 of 3 values of speaker are in training and in another split"
    )


def test_conversations_keep_their_dialogues_and_their_own_validation(tmp_path):
    folder = tmp_path / "meld"
    for part, split in (("train", "train"), ("valid", "dev"), ("test", "test")):
        rows = [
            {
                "key": f"meld-dia{dialogue}_utt{turn}-{split}",
                "wav": f"{split}/{dialogue}_{turn}.mp4",
            }
            for dialogue, turn in [(0, 10), (0, 9), (7, 0)]
        ]
        write_part(
            folder / f"fold_1/meld_{part}_fold_1",
            [{**row, "emo": "joy"} for row in rows],
            ("jsonl",),
        )
    corpus = read_emobox(folder, audio_root=tmp_path)
    assert corpus.sizes() == dict.fromkeys(corpus.splits, (2, 3))
    first, second = corpus.splits["validation"]
    assert (first.id, second.id) == ("validation_dia0", "validation_dia7")
    assert [turn.id for turn in first.utterances] == ["meld-dia0_utt9-dev", "meld-dia0_utt10-dev"]
    # Without `label_map.json`, the classes are the capitalized labels.
    assert corpus.class_names == ("Joy",)


@pytest.fixture
def iemocap(tmp_path):
    """Metadata of three turns in each session; the ids are not in the spoken order."""
    rows = [
        {
            "key": f"iemocap-Ses0{session}F_impro01_{turn}",
            "wav": f"downloads/iemocap/Session{session}/sentences/wav/Ses0{session}F_impro01/"
            f"Ses0{session}F_impro01_{turn}.wav",
            "emo": "neu",
        }
        for session in range(1, 6)
        for turn in ("F010", "M009", "F000")
    ]
    write_part(tmp_path / "data/iemocap/fold_1/iemocap_train_fold_1", rows[:12])
    write_part(tmp_path / "data/iemocap/fold_1/iemocap_test_fold_1", rows[12:])
    for row in rows:
        (tmp_path / row["wav"]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / row["wav"]).touch()
    return tmp_path


def test_validation_of_iemocap_is_a_session(iemocap):
    corpus = read_emobox(iemocap / "data/iemocap")
    assert corpus.sizes() == {"train": (3, 9), "validation": (1, 3), "test": (1, 3)}
    assert speakers(corpus)["test"] == {"Ses05F", "Ses05M"}
    (dialogue,) = corpus.splits["test"]
    assert [turn.id[-4:] for turn in dialogue.utterances] == ["F000", "M009", "F010"]
    assert "WARNING: the turns of a dialogue are sorted by their numbers, which is not" in str(
        corpus.notes
    )


def test_turns_of_iemocap_are_in_the_spoken_order_if_their_times_are_known(iemocap):
    for session in range(1, 6):
        name = f"Ses0{session}F_impro01"
        folder = iemocap / f"downloads/iemocap/Session{session}/dialog/EmoEvaluation"
        folder.mkdir(parents=True)
        lines = [
            f"[{start} - {start + 0.5}]\t{name}_{turn}\tneu\t[2.5, 2.5, 2.5]\n"
            for start, turn in ((3.0, "F010"), (2.0, "F000"), (2.5, "M009"), (9.0, "M011"))
        ]
        (folder / f"{name}.txt").write_text("".join(lines))
    corpus = read_emobox(iemocap / "data/iemocap")
    for _, dialogue in corpus.dialogues():
        assert [(turn.id[-4:], turn.start, turn.end) for turn in dialogue.utterances] == [
            ("F000", 2.0, 2.5),
            ("M009", 2.5, 3.0),
            ("F010", 3.0, 3.5),
        ]
    assert "EmoBox omits turns that have none of the classes; --corpus=iemocap reads all turns" in (
        corpus.notes
    )


@pytest.mark.parametrize(
    ("name", "wav", "speaker", "group"),
    [
        ("ased", "05Angry/a5-06-02-02-45.wav", "45", "45"),
        ("asvpesd", "Audio/actor_/03-02-13-02-38-116-02-02-02-13.wav", "116", "116"),
        ("cafe", "CaFE_48k/Peur/Fort/12-P-2-5.wav", "12", "12"),
        ("casia", "wangzhe/neutral/239.wav", "wangzhe", "wangzhe"),
        ("cremad", "AudioWAV/1074_IWL_ANG_XX.wav", "1074", "1074"),
        ("emodb", "wav/03a02Wb.wav", "03", "03"),
        ("emovdb", "jenie_Amused/amused_85-94_0089.wav", "jenie", "jenie"),
        ("emovo", "f2/gio-f2-b2.wav", "f2", "f2"),
        ("enterface", "subject 3/surprise/sentence 4/s_3_su_4.avi", "3", "3"),
        ("esd", "0001/Neutral/0001_000001.wav", "0001", "0001"),
        ("iemocap", "Session1/sentences/wav/x/Ses01F_script01_1_M002.wav", "Ses01M", "Ses01"),
        ("jlcorpus", "JL(wav+txt)/female2_concerned_6b_1.wav", "female2", "female2"),
        ("mead", "W019/audio/neutral/level_1/020.m4a", "W019", "W019"),
        ("oreau", "Or\u00e9auFR_02/f/sessj/10a02Ja.wav", "10", "10"),
        ("polish", "m3.s_trzymaj_5.wav", "m3", "m3"),
        ("ravdess", "Actor_18/03-01-05-01-02-01-18.wav", "18", "18"),
        ("savee", "JE_n23.wav", "JE", "JE"),
        ("shemo", "male/M36S02.wav", "M36", "M36"),
        ("subesco", "F_10_FAHMEE_S_6_FEAR_5.wav", "F_10", "F_10"),
        ("tess", "OAF_lid_fear.wav", "OAF", "OAF"),
        ("turevdb", "Sound Source/Calm/1984_sk_eger.wav", "1984", "1984"),
        ("urdu", "Neutral/SM20_F8_N012.wav", "SM20", "SM20"),
    ],
)
def test_the_speaker_is_part_of_the_path(name, wav, speaker, group):
    match = re.search(SPEAKERS[name], f"/downloads/{name}/{wav}")
    assert ("".join(match.groups()), match[1]) == (speaker, group)


def test_a_single_file_is_a_test_set(tmp_path):
    path = tmp_path / "track2/SAVEE_selected_balenced.jsonl"
    path.parent.mkdir()
    rows = [
        {"wav_filename": f"{speaker}/sa0{number}.wav", "label": "sad", "speaker": speaker}
        for speaker in ("JK", "DC")
        for number in (1, 2)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "AudioData/JK").mkdir(parents=True)
    (tmp_path / "AudioData/JK/sa01.wav").touch()
    corpus = read_emobox(path, audio_root=tmp_path / "AudioData")
    assert corpus.sizes() == {"train": (0, 0), "validation": (0, 0), "test": (4, 4)}
    assert corpus.class_names == ("Sad",)
    turns = [turn for _, turn in corpus.utterances()]
    assert [pathlib.Path(turn.recording.source).exists() for turn in turns] == [True] + [False] * 3
    assert turns[0].metadata == {"speaker": "JK", "emobox": "savee_selected_balenced"}
    with pytest.raises(InputError, match=r"no folds; needed: .*, or one file: SAVEE_selected_bal"):
        read_emobox(path.parent)
    with pytest.raises(InputError, match=r"--fold=1: .* is a file; allowed: the folder"):
        read_emobox(path, fold=1)


def test_metadata_in_cp1252_is_read(urdu):
    row = {**make_rows(["SM9"])[0], "key": "é", "wav": "Or\u00e9au/1.wav"}
    path = urdu / "fold_2/urdu_test_fold_2.jsonl"
    path.write_bytes(json.dumps(row, ensure_ascii=False).encode("cp1252"))
    path.with_suffix(".json").unlink()
    corpus = read_emobox(urdu, fold=2)
    assert corpus.splits["test"][0].utterances[0].recording.source.endswith("Or\u00e9au/1.wav")
    assert corpus.notes[1] == f"{path}: read as cp1252, because it is not UTF-8"


def test_errors_say_what_is_allowed(urdu, tmp_path):
    def check(message, **options):
        with pytest.raises(InputError, match=message) as error:
            read_emobox(urdu, **options)
        assert "\n" not in str(error.value)

    with pytest.raises(
        InputError, match=r"data: contains several corpora; needed: one of its folders urdu$"
    ):
        read_emobox(urdu.parent)
    with pytest.raises(InputError, match="no folds; needed: a corpus's folder in EmoBox/data"):
        read_emobox(tmp_path / "EmoBox/downloads")
    with pytest.raises(InputError, match=r"downloads: no such folder; needed: the folder of the "):
        read_emobox(urdu.rename(tmp_path / "urdu"))
    (tmp_path / "urdu").rename(urdu)
    check(r"--fold=3: \S+ has no such fold; allowed: 1, 2", fold=3)
    check("no such folder; needed: the folder of the recordings", audio_root=tmp_path / "nowhere")
    write_part(urdu / "fold1/urdu_test_fold1", make_rows(["SM5"]), ("json",))
    check(r"urdu_test_fold_1\.jsonl and \S+/fold1/urdu_test_fold1\.json: different utterances")
    (urdu / "fold1/urdu_test_fold1.json").unlink()
    path = urdu / "fold_2/urdu_test_fold_2.jsonl"
    path.with_suffix(".json").unlink()
    row = make_rows(["SM9"])[0]
    for rows, message in [
        ([{**row, "emo": "Q"}], r"jsonl: line 2: emo: 'Q'; allowed: A, H, N, Surprised \(\S+map.j"),
        ([{**row, "emo": None}], "line 2: emo: missing; needed: one of emo, label"),
        ([{**row, "wav": 3}], "line 2: wav: 3; allowed: text"),
        ([{**row, "length": "x"}], "line 2: length: 'x'; allowed: a number"),
        ([{**row, "key": ["a"]}], r"line 2: key: \['a'\]; allowed: text"),
        ([row, row], "line 4: key: 'urdu-SM9_F1_A1' is repeated; needed: unique keys"),
        (
            [make_rows(["SF1"])[0]],
            r"urdu-SF1_F1_A1: in both \S+train_fold_2.jsonl and \S+; needed: in only",
        ),
        ([3], "line 2: not an object; needed: EmoBox's metadata"),
        ([], "jsonl: no utterances; needed: EmoBox's metadata"),
    ]:
        write_part(path, rows, ("jsonl",))
        check(message, fold=2)
    path.write_text('\n{"key": ')
    check(r"jsonl: line 2: not JSON \(Expecting value\); needed", fold=2)
    path.unlink()
    check("no test set of this fold", fold=2)
    (urdu / "label_map.json").write_text("[]")
    check("label_map.json: not an object of strings; needed: a JSON object that maps labels to")
    (urdu / "label_map.json").write_text("{")
    check("label_map.json: not JSON; needed: an object that maps labels to class names")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared recordings")
def test_real_folds_have_the_published_counts():
    urdu = read_emobox(SHARED / "emobox/urdu", audio_root=SHARED / "voices/urdu")
    assert urdu.sizes() == {"train": (242, 242), "validation": (58, 58), "test": (100, 100)}
    assert classes(urdu, "test") == dict.fromkeys(("Angry", "Happy", "Neutral", "Sad"), 25)
    assert all(pathlib.Path(turn.recording.source).is_file() for _, turn in urdu.utterances())
    assert not speakers(urdu)["train"] & speakers(urdu)["validation"]
    assert urdu.notes[2].startswith("400 recordings have another extension than in the metadata")
    assert urdu.notes[3].startswith("WARNING: 10 of 29 values of speaker are in training and in")
    for fold, test_speaker in ((1, "m3"), (2, "m2")):
        polish = read_emobox(SHARED / "emobox/polish", audio_root=SHARED / "emobox", fold=fold)
        assert polish.sizes() == {"train": (270, 270), "validation": (90, 90), "test": (90, 90)}
        assert speakers(polish)["test"] == {test_speaker}
        for split, count in (("train", 90), ("validation", 30), ("test", 30)):
            assert classes(polish, split) == {"Angry": count, "Fear": count, "Neutral": count}
