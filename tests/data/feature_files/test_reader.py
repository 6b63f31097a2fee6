"""Feature files of all supported projects give the same utterances, labels and splits.

The files are small and have the structure that the data loaders of the projects expect.
"""

import copy
import json
import pickle
import re

import numpy as np
import pytest

from mister_jax.data import load_features, read_features, write_features
from mister_jax.data.feature_files import is_feature_file, summarize_file
from mister_jax.data.feature_files.class_order import TEST_COUNTS
from mister_jax.errors import InputError

LENGTHS = {
    "Ses01F_impro01": 3,
    "Ses01M_script01_1": 2,
    "Ses02F_impro01": 4,
    "Ses05F_impro01": 2,
    "Ses05M_impro02": 3,
}
TRAIN, TEST = list(LENGTHS)[:3], list(LENGTHS)[3:]
SIX = ("happy", "sad", "neutral", "angry", "excited", "frustrated")


def features(dim, seed):
    generator = np.random.default_rng(seed)
    return {name: list(generator.normal(size=(count, dim))) for name, count in LENGTHS.items()}


LABELS = {
    name: [(index * 2 + 5 - i) % 6 for i in range(n)]
    for index, (name, n) in enumerate(LENGTHS.items())
}
SPEAKERS = {name: ["M", "F", "M", "F"][:count] for name, count in LENGTHS.items()}
SENTENCES = {name: [f"Sentence {i} of {name}." for i in range(n)] for name, n in LENGTHS.items()}
IDS = {name: [f"{name}_F{index:03}" for index in range(n)] for name, n in LENGTHS.items()}
TEXT, SPEECH, VISUAL = features(5, 0), features(4, 1), features(3, 2)
LAYERS = [features(5, seed) for seed in range(10, 14)]
SENTIMENT = {name: [label % 3 for label in labels] for name, labels in LABELS.items()}

IEMOCAP = (IDS, SPEAKERS, LABELS, TEXT, SPEECH, VISUAL, SENTENCES, set(TRAIN), TEST)
COSMIC = [SPEAKERS, LABELS, *LAYERS, SENTENCES, TRAIN[:2], TEST, TRAIN[2:]]
# Layout, content, text fields and speech field.
TUPLES = {
    "MMGCN": ("DialogueRNN, DialogueGCN, MMGCN, MM-DFN (IEMOCAP)", IEMOCAP, [TEXT], SPEECH),
    "MMGCN_MELD": ("MMGCN, MM-DFN (MELD)", (*IEMOCAP, {}), [TEXT], SPEECH),
    "DialogueRNN_MELD": (
        "DialogueRNN, DialogueGCN (MELD)",
        (IDS, SPEAKERS, LABELS, TEXT, SPEECH, SENTENCES, TRAIN, TEST, SENTIMENT),
        [TEXT],
        SPEECH,
    ),
    "COSMIC": ("COSMIC (IEMOCAP, DailyDialog, EmoryNLP)", COSMIC, LAYERS, None),
    "COSMIC_MELD": ("COSMIC (MELD)", [*COSMIC[:2], SENTIMENT, *COSMIC[2:]], LAYERS, None),
    "SDT": (
        "SDT, GraphSmile (IEMOCAP)",
        (*IEMOCAP[:3], *LAYERS, SPEECH, VISUAL, SENTENCES, TRAIN, TEST),
        LAYERS[:1],
        SPEECH,
    ),
    "SDT_MELD": (
        "SDT (MELD)",
        (*IEMOCAP[:3], *LAYERS, SPEECH, VISUAL, SENTENCES, TRAIN, TEST, {}),
        LAYERS[:1],
        SPEECH,
    ),
    "GraphSmile": (
        "GraphSmile (MELD)",
        (*IEMOCAP[:3], SENTIMENT, *LAYERS, SPEECH, VISUAL, SENTENCES, TRAIN, TEST, {}),
        LAYERS[:1],
        SPEECH,
    ),
    "DailyDialog": (
        "MMGCN (DailyDialog)",
        (SPEAKERS, TEXT, SENTIMENT, LABELS, TRAIN[:2], TEST, TRAIN[2:]),
        [TEXT],
        None,
    ),
    "names": (
        "fields by name",
        {
            **{"videoIDs": IDS, "videoSpeakers": SPEAKERS, "videoLabels": LABELS},
            **{"videoText0": TEXT, "videoText2": LAYERS[0], "videoAudio": SPEECH},
            **{"videoVisual": VISUAL, "videoSentence": SENTENCES, "videoSentiments": SENTIMENT},
            **{"trainVid": TRAIN[:2], "devVid": TRAIN[2:], "testVid": TEST, "sourcePath": "x"},
        },
        [TEXT],
        SPEECH,
    ),
}


def write(folder, content, protocol=2):
    path = folder / "features.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def joined(field, dialogues):
    return np.concatenate([np.asarray(field[name]) for name in dialogues])


def notes(splits):
    return "\n".join(splits["train"].metadata["notes"])


@pytest.mark.parametrize("name", TUPLES)
def test_the_layouts_of_published_projects_are_recognized(tmp_path, name):
    layout, content, text, speech = TUPLES[name]
    path = write(tmp_path, content)
    splits = read_features(path)
    assert list(splits) == ["train", "validation", "test"]
    assert summarize_file(path).layout == layout
    test = splits["test"]
    assert test.class_names == SIX and test.dialogue_ids == tuple(TEST)
    assert test.lengths.tolist() == [2, 3]
    np.testing.assert_array_equal(test.label, joined(LABELS, TEST))
    expected = np.mean([joined(part, TEST).astype(np.float32) for part in text], axis=0)
    np.testing.assert_allclose(test.text, expected, rtol=1e-6)
    assert test.text_present.all() and test.text.dtype == np.float32
    assert test.speech_present.all() == (speech is not None)
    if speech is not None:
        np.testing.assert_array_equal(test.speech, joined(speech, TEST).astype(np.float32))
    names = splits["train"].dialogue_ids + splits["validation"].dialogue_ids
    assert sorted(names) == sorted(TRAIN) and len(splits["validation"].dialogue_ids) == 1
    metadata = json.loads(test.utterance_metadata[0])
    assert metadata["speaker_in_dialogue"] == "M"
    assert metadata.get("text") == (None if name == "DailyDialog" else SENTENCES[TEST[0]][0])
    has_ids = name not in ("COSMIC", "COSMIC_MELD", "DailyDialog")
    assert test.utterance_ids[1] == ("Ses05F_impro01_F001" if has_ids else "Ses05F_impro01_1")


def test_a_field_with_the_name_of_a_role_is_preferred(tmp_path):
    content = {
        **{"roberta": LAYERS[0], "text": TEXT, "emotion": SENTIMENT, "label": LABELS},
        **{"utterances": IDS, "sentence": SENTENCES},
    }
    fields = summarize_file(write(tmp_path, content)).fields
    uses = {row[0]: row[-1] for row in fields if row[-1] != "not used"}
    assert uses == {role: role for role in ("text", "label", "sentence")}


def test_two_files_of_one_corpus_are_joined(tmp_path):
    """As in M3NET, text and validation split are from COSMIC's file, and speech is from MMGCN's."""
    second = write(tmp_path, COSMIC).rename(tmp_path / "roberta.pkl")
    first = write(tmp_path, IEMOCAP)
    splits = read_features([first, second])
    test = splits["test"]
    np.testing.assert_array_equal(test.speech, joined(SPEECH, TEST).astype(np.float32))
    expected = np.mean([joined(layer, TEST).astype(np.float32) for layer in LAYERS], axis=0)
    np.testing.assert_allclose(test.text, expected, rtol=1e-6)
    assert test.utterance_ids[1] == "Ses05F_impro01_F001"
    assert splits["validation"].dialogue_ids == (TRAIN[2],)
    chosen = read_features([first, second], fields={"text": "2:3", "speech": ""})["test"]
    np.testing.assert_array_equal(chosen.text, joined(LAYERS[1], TEST).astype(np.float32))
    assert ("2:2", "text") in [(row[0], row[-1]) for row in summarize_file([first, second]).fields]
    first.write_bytes(pickle.dumps(mmsa()))
    with pytest.raises(InputError, match=r"layouts MMSA and COSMIC .* cannot be joined"):
        read_features([first, second])


def test_an_imported_file_is_stored_and_loaded(tmp_path):
    splits = read_features(write(tmp_path, IEMOCAP))
    write_features(splits, "imported", tmp_path)
    loaded = load_features("imported", "test", tmp_path)
    np.testing.assert_array_equal(loaded.speech, splits["test"].speech)
    assert loaded.utterance_metadata.tolist() == splits["test"].utterance_metadata.tolist()


def test_missing_validation_dialogues_are_drawn_by_seed_and_noted(tmp_path):
    path = write(tmp_path, IEMOCAP)
    drawn = {read_features(path, seed=seed)["validation"].dialogue_ids for seed in range(8)}
    assert drawn <= {(name,) for name in TRAIN}
    assert "1 of 3 training dialogues drawn, seed 3" in notes(read_features(path, seed=3))
    assert "visual features are not used (5)" in notes(read_features(path))
    content = TUPLES["names"][1]
    assert "drawn" not in notes(read_features(write(tmp_path, content)))


def changed(index, value, content=IEMOCAP):
    content = list(copy.deepcopy(content))
    content[index] = value(content[index]) if callable(value) else value
    return tuple(content)


def test_traps_of_published_files(tmp_path):
    """Text and numbers as ids, one-hot speakers, arrays, sets, cp1252 and NaN are read."""
    ids = {name: index for index, name in enumerate(LENGTHS)}

    def renamed(field, convert=int):
        return {convert(ids[name]): value for name, value in field.items()}

    text = {index: np.array(rows) for index, rows in renamed(TEXT, np.int64).items()}
    speech = renamed(copy.deepcopy(SPEECH), str)
    del speech["4"]  # "4" is the last dialogue.
    speech["3"][0] = np.zeros(0)
    speech["3"][1] = np.full(4, np.nan)
    speech["2"][1] = None
    sentences = renamed(SENTENCES, float)
    sentences[3.0] = [b"don\x92t  \n go", "caf\xc3\xa9"]
    content = (
        renamed({name: list(range(count)) for name, count in LENGTHS.items()}),
        renamed({name: np.eye(9, dtype=int)[[2] * count] for name, count in LENGTHS.items()}),
        renamed({name: np.array(labels, np.float64) for name, labels in LABELS.items()}),
        *(text, speech, renamed(VISUAL), sentences),
        *({0, "1", 2, 60}, np.array([3, 4], np.int32)),
    )
    content[2][3][0] = np.nan
    splits = read_features(write(tmp_path, content), labels=SIX)
    test = splits["test"]
    assert test.dialogue_ids == ("3", "4") and test.utterance_ids.tolist()[:2] == ["3_0", "3_1"]
    assert test.label.tolist() == [-1, *joined(LABELS, TEST)[1:]]
    assert not test.speech_present.any() and not test.speech.any()
    np.testing.assert_array_equal(test.text, joined(TEXT, TEST).astype(np.float32))
    metadata = [json.loads(row) for row in test.utterance_metadata[:2]]
    assert [row["text"] for row in metadata] == ["don\u2019t go", "café"]
    assert [row["speaker_in_dialogue"] for row in metadata] == ["2", "2"]
    assert "train: ids without a dialogue are left out: 1, the first is 60" in notes(splits)
    assert "6 utterances lack speech" in notes(splits)
    both = np.concatenate([splits["train"].speech_present, splits["validation"].speech_present])
    assert both.sum() == 8


def test_fields_and_labels_can_be_chosen(tmp_path):
    path = write(tmp_path, TUPLES["SDT"][1])
    chosen = read_features(path, fields={"text": "4+5", "speech": ""}, labels=list("abcdef"))[
        "test"
    ]
    expected = (joined(LAYERS[1], TEST) + joined(LAYERS[2], TEST)) / 2
    np.testing.assert_allclose(chosen.text, expected, rtol=1e-6, atol=1e-7)
    assert not chosen.speech_present.any() and chosen.class_names == tuple("abcdef")
    path = write(tmp_path, TUPLES["DialogueRNN_MELD"][1])
    sentiment = read_features(path, fields={"label": "8"}, labels=["neutral", "pos", "neg"])["test"]
    np.testing.assert_array_equal(sentiment.label, joined(SENTIMENT, TEST))
    one_hot = changed(1, {name: np.eye(6)[LABELS[name]] for name in LENGTHS})
    rows = read_features(write(tmp_path, one_hot), fields={"label": "1", "speaker": ""})["test"]
    np.testing.assert_array_equal(rows.label, joined(LABELS, TEST))
    named = changed(2, {name: [SIX[label] for label in LABELS[name]] for name in LENGTHS})
    choices = {"label": "2", "text": "3", "speech": "4", "train": "7", "test": "8"}
    text_labels = read_features(write(tmp_path, named), fields=choices, labels=SIX)["test"]
    np.testing.assert_array_equal(text_labels.label, joined(LABELS, TEST))
    with pytest.raises(InputError, match=r"label 'angry' is not in --labels=happy,sad"):
        read_features(write(tmp_path, named), fields=choices, labels=SIX[:2])


def test_an_unknown_layout_asks_for_the_fields(tmp_path):
    path = write(tmp_path, [LABELS, TEXT, SPEECH, TRAIN, TEST])
    message = (
        "which fields have the text or speech features, the splits? Set --fields=text=1,train=3,"
        "...; layout unknown, 5 fields: 0 (integers), 1 (features 5), 2 (features 4), "
        "3 (dialogue ids), 4 (dialogue ids)"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        read_features(path)
    assert message in summarize_file(path).problem
    splits = read_features(path, fields={"speech": "2", "train": "3", "test": "4"})
    np.testing.assert_array_equal(splits["test"].speech, joined(SPEECH, TEST).astype(np.float32))
    # Without splits in the file, all dialogues are split at random.
    splits = read_features(write(tmp_path, [LABELS, TEXT]), fields={"text": "1"})
    assert "dialogues split at random, seed 0" in notes(splits) and len(splits) == 3
    content = {
        "label": LABELS,
        "text": TEXT,
        "speaker": {k: [k[:5]] * n for k, n in LENGTHS.items()},
    }
    grouped = read_features(write(tmp_path, content), group_by="speaker")
    assert sorted(len(split.dialogue_ids) for split in grouped.values()) == [1, 2, 2]


def test_classes_are_recognized_by_the_counts_of_the_test_split(tmp_path):
    (meld, sentiment) = TEST_COUNTS["MELD"]
    order = ("fear", "neutral", "surprise", "sadness", "joy", "disgust", "anger")
    labels = {index: [index % 7, (index + 1) % 7] for index in range(20)}
    labels[1153] = [order.index(name) for name, count in meld.items() for _ in range(count)]
    zeros = {name: np.ones((len(values), 1)) for name, values in labels.items()}
    content = [labels, zeros, list(range(20)), [1153]]
    fields = {"text": "1", "train": "2", "test": "3"}
    splits = read_features(write(tmp_path, content), fields=fields)
    assert splits["test"].class_names == order
    assert splits["test"].class_counts.tolist() == [meld[name] for name in order]
    assert "classes of MELD, recognized by their numbers of test utterances" in notes(splits)
    assert len(set(meld.values())) == 7 and len(set(sentiment.values())) == 3
    labels[1153][0] = 0
    message = "labels are 0 to 6, without names; set --labels=NAME,... with 7 names in this order"
    with pytest.raises(InputError, match=message):
        read_features(write(tmp_path, content), fields=fields)


def test_padded_arrays_of_the_contextual_lstm(tmp_path):
    generator = np.random.default_rng(0)
    train, test = generator.normal(size=(3, 4, 2)), generator.normal(size=(2, 4, 2))
    train_label, test_label = generator.integers(0, 2, (3, 4)), generator.integers(0, 2, (2, 4))
    test[1, 2] = np.nan
    orders = {
        "pairs": (train, train_label * 1.0, test, test_label * 1.0, 4, [4, 2, 1], [3, 4]),
        "kinds": (train, test, train_label, test_label, 4, [4, 2, 1], [3, 4]),
        "one_hot": (
            train,
            np.eye(2)[train_label],
            test,
            np.eye(2)[test_label],
            4,
            [4, 2, 1],
            [3, 4],
        ),
    }
    for name, content in orders.items():
        path = write(tmp_path, content)
        splits = read_features(path, fields={"speech": "0"}, labels=["negative", "positive"])
        features = splits["test"]
        assert features.dialogue_ids == ("test_0", "test_1"), name
        assert features.lengths.tolist() == [3, 4]
        np.testing.assert_array_equal(features.label, [*test_label[0, :3], *test_label[1]])
        expected = np.concatenate([test[0, :3], test[1]])
        np.testing.assert_allclose(features.speech, np.nan_to_num(expected), rtol=1e-6)
        assert features.speech_present.tolist() == [True] * 5 + [False, True]
        assert len(splits["train"].label) + len(splits["validation"].label) == 7
    with pytest.raises(InputError, match=r"text or speech\? Set --fields=text=0 or --fields=sp"):
        read_features(path)
    by_name = {
        **{"text_train": train, "text_test": test, "audio_train": train, "audio_test": test},
        **{"train_label": np.eye(2)[train_label], "test_label": np.eye(2)[test_label]},
        "train_mask": np.arange(4) < np.array([[4], [2], [1]]),
        "test_mask": (np.arange(4) < np.array([[3], [4]])).astype(float),
        **{"video_train": train, "video_test": test},
    }
    named = read_features(write(tmp_path, by_name), labels=["negative", "positive"])["test"]
    np.testing.assert_array_equal(named.speech, features.speech)
    np.testing.assert_array_equal(named.text, features.speech)
    np.testing.assert_array_equal(named.label, features.label)


def mmsa():
    generator = np.random.default_rng(0)
    content = {}
    for index, (split, count) in enumerate({"train": 3, "valid": 1, "test": 2}.items()):
        text = generator.normal(size=(count, 4, 3)).astype(np.float32)
        text[0, 2:] = 0
        audio = generator.normal(size=(count, 5, 2))
        audio[-1, 0, 1] = -np.inf
        content[split] = {
            "id": [f"v{index}_a$_${10 - number}" for number in range(count)],
            "raw_text": np.array([f"SO {number}" for number in range(count)], object),
            "text": text,
            "text_bert": np.ones((count, 3, 4)),
            "audio": audio,
            "audio_lengths": [3] * count,
            "vision": np.zeros((count, 5, 2)),
            "annotations": ["Negative", "Positive", "Neutral"][:count],
            "classification_labels": np.array([0.0, 2, 1])[:count],
            "regression_labels": np.array([-1.5, 2, 0], np.float32)[:count],
        }
    return content


def test_features_of_mmsa_are_pooled_over_valid_steps(tmp_path):
    content = mmsa()
    content["test"]["audio"][0] = 0
    splits = read_features(write(tmp_path, content))
    test, part = splits["test"], content["test"]
    assert test.dialogue_ids == ("v2_a",) and test.utterance_ids.tolist() == [
        "v2_a$_$9",
        "v2_a$_$10",
    ]
    assert test.class_names == ("negative", "non_negative") and test.label.tolist() == [1, 0]
    assert test.score.tolist() == [2, -1.5]
    np.testing.assert_allclose(test.text[0], part["text"][1].mean(0), rtol=1e-6)
    np.testing.assert_allclose(test.text[1], part["text"][0, :2].mean(0), rtol=1e-6)
    np.testing.assert_allclose(test.speech[0], part["audio"][1, 1:3].mean(0), rtol=1e-6)
    assert test.speech_present.tolist() == [True, False]
    assert json.loads(test.utterance_metadata[1]) == {"text": "SO 0"}
    path = tmp_path / "features.pkl"
    classes = read_features(
        path, fields={"label": "classification_labels"}, labels=["neg", "neu", "pos"]
    )
    assert classes["train"].label.tolist() == [1, 2, 0]
    names = read_features(path, fields={"label": "annotations"})["train"]
    assert names.class_names == ("Negative", "Neutral", "Positive")
    assert summarize_file(path).layout == "MMSA"


def test_mmsa_without_text_vectors_and_with_shared_videos(tmp_path):
    content = mmsa()
    for part in content.values():
        part["note"] = None  # A field without a value is ignored.
    for part in content.values():
        del part["text"]
    content["valid"]["id"] = ["v0_a$_$3"]
    splits = read_features(write(tmp_path, content))
    assert not splits["test"].text_present.any()
    assert splits["validation"].dialogue_ids == ("v0_a/validation",)
    assert "WARNING: 1 of 2 videos are in several splits" in notes(splits)
    content["test"]["id"][0] = "v2"
    with pytest.raises(InputError, match=r"id 'v2'; allowed: VIDEO\$_\$NUMBER"):
        read_features(write(tmp_path, content))


def test_a_folder_of_dag_erc(tmp_path):
    for index, split in enumerate(("train", "dev", "test")):
        dialogues = [
            [
                {"text": "I\x92m here", "speaker": "Ross", "cls": [0.5, 1.5], "label": "sad"},
                {"text": "Me.", "speaker": "Joey", "cls": [index, 2.0]},
            ]
        ]
        (tmp_path / f"{split}_data_roberta.json.feature").write_text(json.dumps(dialogues))
    vocabulary = {"stoi": {"happy": 0, "sad": 1}, "itos": ["happy", "sad"]}
    (tmp_path / "label_vocab.pkl").write_bytes(pickle.dumps(vocabulary))
    splits = read_features(tmp_path)
    assert list(splits) == ["train", "validation", "test"]
    test = splits["test"]
    assert test.class_names == ("happy", "sad") and test.label.tolist() == [1, -1]
    assert test.text.tolist() == [[0.5, 1.5], [2, 2]] and not test.speech_present.any()
    assert json.loads(test.utterance_metadata[0]) == {"speaker": "Ross", "text": "I\u2019m here"}
    assert is_feature_file(str(tmp_path)) and not is_feature_file("meld/text")
    with pytest.raises(InputError, match="truncated"):
        (tmp_path / "dev_data_roberta.json.feature").write_text("[[{")
        read_features(tmp_path)
    with pytest.raises(InputError, match="no feature files"):
        (tmp_path / "train_data_roberta.json.feature").unlink()
        read_features(tmp_path)


def test_a_pickle_that_lists_dialogues(tmp_path):
    dialogues = {
        split: [
            {"vid": name, "speakers": SPEAKERS[name], "labels": LABELS[name], "text": TEXT[name]}
            | {"audio": SPEECH[name], "visual": VISUAL[name], "sentence": SENTENCES[name]}
            for name in names
        ]
        for split, names in {"train": TRAIN[:2], "dev": TRAIN[2:], "test": TEST}.items()
    }
    test = read_features(write(tmp_path, dialogues))["test"]
    assert test.dialogue_ids == tuple(TEST) and test.class_names == SIX
    np.testing.assert_array_equal(test.speech, joined(SPEECH, TEST).astype(np.float32))


def replaced(index, dialogue, value):
    return changed(index, lambda field: field | {dialogue: value})


ALL = dict.fromkeys(LENGTHS)
INVALID = {
    "dialogue Ses05F_impro01: 3 utterances in field 4, but 2 labels": (
        replaced(4, TEST[0], SPEECH[TEST[0]][:1] * 3),
        {},
    ),
    "dialogue Ses05F_impro01: 1 utterances in field 6, but 2 labels": (
        replaced(6, TEST[0], ["a"]),
        {},
    ),
    "field 3: dialogue Ses05F_impro01, utterance 1: 4 features; needed: 5, as in earlier rows": (
        replaced(3, TEST[0], [TEXT[TEST[0]][0], np.ones(4)]),
        {},
    ),
    "field 3: dialogue Ses05F_impro01, utterance 0: not a vector of numbers": (
        replaced(3, TEST[0], [["a"] * 5, TEXT[TEST[0]][0]]),
        {},
    ),
    "--fields=label=2: field 2 holds numbers; allowed: integers, text, one-hot rows": (
        replaced(2, TEST[0], [1.5, 2]),
        {"fields": {"label": "2"}},
    ),
    "dialogue Ses05F_impro01 is in train and in test": (changed(7, [*TRAIN, TEST[0]]), {}),
    "label: row 0 (utterance Ses01F_impro01_F000): -7: allowed: -1": (
        replaced(2, TRAIN[0], [-7, 0, 1]),
        {},
    ),
    "text: row 0 (utterance Ses01F_impro01_F000): 1e+20: allowed": (
        replaced(3, TRAIN[0], [[1e20] * 5] * 3),
        {},
    ),
    "--labels: 5 names; needed: 6, because the labels are 0 to 5": (IEMOCAP, {"labels": SIX[:5]}),
    "class_names: 'b' repeated": (IEMOCAP, {"labels": list("abbdef")}),
    "--fields=text=12: no field '12'; allowed: 0 (text), 1 (text), 2 (integers), 3 (fe": (
        IEMOCAP,
        {"fields": {"text": "12"}},
    ),
    "--fields=text=2: field 2 holds integers; allowed: features": (
        IEMOCAP,
        {"fields": {"text": "2"}},
    ),
    "--fields=audio=4; allowed: text, speech, label": (IEMOCAP, {"fields": {"audio": "4"}}),
    "--fields=label=2+3; allowed: one field": (IEMOCAP, {"fields": {"label": "2+3"}}),
    "--fields=text=3+4: dimensions [4, 5] differ": (IEMOCAP, {"fields": {"text": "3+4"}}),
    "--group_by=room; allowed: speaker_in_dialogue, text": (IEMOCAP, {"group_by": "room"}),
    "no text or speech features in the file; layout unknown, 3 fields": (
        [SPEAKERS, LABELS, SENTENCES],
        {},
    ),
    "no labels in the file; layout unknown, 4 fields": (LAYERS, {}),
    "unknown layout, a dict with 5 keys: Ses01F_impro01, ": (SENTENCES, {}),
    "unknown layout, a list of 2 items: int, str; allowed: dicts of dialogues": ([1, "a"], {}),
    "unknown layout, an array [3]": (np.zeros(3), {}),
    "layout MMSA: values of unexpected types or sizes (": (
        {"test": mmsa()["test"] | {"audio_lengths": [None, "x"]}},
        {},
    ),
}


@pytest.mark.parametrize("message", INVALID)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, message):
    content, choices = INVALID[message]
    path = write(tmp_path, content)
    with pytest.raises(InputError) as error:
        read_features(path, **choices)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert message in str(error.value)


def test_more_names_than_labels_give_a_warning(tmp_path):
    splits = read_features(write(tmp_path, IEMOCAP), labels=[*SIX, "fear"])
    assert "WARNING: no utterance has the label fear; check --labels" in notes(splits)


def test_npz_files_take_no_choices(tmp_path):
    with pytest.raises(InputError, match="--labels is not used with an npz file"):
        read_features(tmp_path / "x.npz", labels=["a"])
