"""Cross-validation folds of feature datasets."""

import dataclasses
import json

import numpy as np
import pytest

from mister_jax import data
from mister_jax.data.folds import check_folds, load_fold, load_pooled, make_folds, select_fold
from mister_jax.data.split_guard import training_splits_only
from mister_jax.errors import InputError

SPLITS = ("train", "validation", "test")


def make_features(speakers, dialogues=None, utterance_ids=None):
    """Returns features of utterances with the given speakers; by default, one per dialogue."""
    total = len(speakers)
    dialogues = list(range(total)) if dialogues is None else dialogues
    names, lengths = np.unique(dialogues, return_counts=True)
    random = np.random.default_rng(0)
    return data.DialogueFeatures(
        name="made",
        split="all",
        class_names=("calm", "angry"),
        dialogue_ids=tuple(map(str, names)),
        lengths=lengths,
        utterance_ids=np.array(utterance_ids or [f"u{number}" for number in range(total)]),
        speech=random.normal(size=(total, 3)).astype(np.float32),
        text=random.normal(size=(total, 2)).astype(np.float32),
        speech_present=np.ones(total, bool),
        text_present=np.ones(total, bool),
        label=(np.arange(total) % 3 == 0).astype(np.int32),
        utterance_metadata=np.array([json.dumps({"speaker": name}) for name in speakers]),
    )


def members(features, folds, fold, split):
    return set(select_fold(features, folds, fold, split).utterance_ids.tolist())


def test_each_speaker_is_the_test_fold_once_and_never_in_training():
    speakers = [f"s{number % 5}" for number in range(40)]
    features = make_features(speakers)
    folds = make_folds(features, "speaker")
    assert folds.names == ("s0", "s1", "s2", "s3", "s4")
    tested = []
    for fold, name in enumerate(folds.names):
        splits = {split: members(features, folds, fold, split) for split in SPLITS}
        assert splits["test"] == {f"u{index}" for index in range(40) if speakers[index] == name}
        following = folds.names[(fold + 1) % 5]
        expected = {f"u{index}" for index in range(40) if speakers[index] == following}
        assert splits["validation"] == expected
        assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 40
        tested += splits["test"]
    assert sorted(tested) == sorted(features.utterance_ids.tolist())


def test_groups_of_values_have_about_equal_classes():
    random = np.random.default_rng(1)
    speakers = [f"s{number}" for number in random.zipf(1.3, 600) % 30]
    features = make_features(speakers)
    folds = make_folds(features, "speaker:5")
    counts = np.array(
        [np.bincount(features.label[folds.index == fold], minlength=2) for fold in range(5)]
    )
    largest = max(speakers.count(name) for name in set(speakers))
    assert (counts.sum(1) <= max(largest, 0.3 * 600)).all()
    assert (counts > 0).all()
    values = [set(np.array(speakers)[folds.index == fold]) for fold in range(5)]
    assert sum(map(len, values)) == len(set.union(*values))
    assert [set(names) for names in folds.members] == values
    assert (make_folds(features, "speaker:5").index == folds.index).all()


def test_the_other_speaker_of_a_test_dialogue_is_context_without_labels():
    # Three dialogues of two speakers each.
    features = make_features(["a", "b", "a", "c", "d", "c", "e", "f"], [0, 0, 0, 1, 1, 1, 2, 2])
    folds = make_folds(features, "speaker")
    test = select_fold(features, folds, 0, "test")
    assert test.utterance_ids.tolist() == ["u0", "u1", "u2"]
    assert test.label.tolist() == [features.label[0], -1, features.label[2]]
    # Validation uses speaker c, because every dialogue of speaker b also has the test speaker, a.
    assert members(features, folds, 0, "validation") == {"u3", "u4", "u5"}
    assert members(features, folds, 0, "train") == {"u6", "u7"}


def test_context_has_no_scores_and_ratings():
    features = dataclasses.replace(
        make_features(["a", "b", "a", "b", "c", "c", "d", "d"], [0, 0, 1, 1, 2, 2, 3, 3]),
        score=np.arange(8, dtype=np.float32),
        ratings=np.ones((8, 2), np.float32),
    )
    test = select_fold(features, make_folds(features, "speaker"), 0, "test")
    np.testing.assert_array_equal(test.score, [0, np.nan, 2, np.nan])
    np.testing.assert_array_equal(test.ratings.any(1), [True, False, True, False])
    assert features.score[1] == 1 and features.ratings.all()


@pytest.mark.parametrize("speaker", ["a", "c"])
def test_a_fold_without_labels_is_refused(speaker):
    speakers = ["a", "b", "c", "d"] * 4
    features = make_features(speakers)
    label = np.where(np.array(speakers) == speaker, -1, features.label).astype(np.int32)
    features = dataclasses.replace(features, label=label)
    folds = make_folds(features, "speaker")
    with pytest.raises(InputError, match=r"no utterance of the .* split has a label; use fewer"):
        check_folds(features, folds)
    with pytest.raises(InputError, match=f"fold {speaker} of 'speaker': no utterance of the test"):
        check_folds(features, dataclasses.replace(folds, **reordered(folds, speaker)))


def reordered(folds, first):
    """Returns the fields of folds in which `first` is the first fold."""
    start = folds.names.index(first)
    order = [*range(start, len(folds.names)), *range(start)]
    return {
        "names": tuple(folds.names[index] for index in order),
        "members": tuple(folds.members[index] for index in order),
        "index": np.argsort(order)[folds.index],
    }


def test_sessions_and_speakers_of_iemocap_are_read_from_its_ids():
    ids = [
        f"Ses0{session}{first}_{part}_{speaker}00{number}"
        for session in range(1, 6)
        for first in "FM"
        for part in ("impro01", "script02_1")
        for number, speaker in enumerate("FM")
    ]
    dialogues = [name.rpartition("_")[0] for name in ids]
    order = np.argsort(dialogues, kind="stable")
    ids, dialogues = [ids[index] for index in order], [dialogues[index] for index in order]
    # The speaker column has only two values, although there are ten speakers.
    features = make_features([name.rpartition("_")[2][0] for name in ids], dialogues, ids)
    assert make_folds(features, "session").names == ("01", "02", "03", "04", "05")
    speakers = make_folds(features, "speaker")
    assert len(speakers.names) == 10 and speakers.names[:2] == ("01F", "01M")
    test = select_fold(features, speakers, 1, "test")
    assert {name.partition("_")[0][:5] for name in test.utterance_ids} == {"Ses01"}
    assert {name.rpartition("_")[2][0] for name in test.utterance_ids[test.label >= 0]} == {"M"}
    # The next speaker, 02F, is in all dialogues of session 2.
    assert {name[:5] for name in members(features, speakers, 1, "validation")} == {"Ses02"}


def test_speakers_of_iemocap_without_utterance_ids_come_from_their_column():
    dialogues = [f"Ses0{session}F_impro01" for session in range(1, 6) for _ in range(2)]
    features = make_features([""] * 10, dialogues)
    roles = np.array([json.dumps({"speaker_in_dialogue": "MF"[row % 2]}) for row in range(10)])
    features = dataclasses.replace(features, utterance_metadata=roles)
    assert len(make_folds(features, "session").names) == 5
    assert len(make_folds(features, "speaker").names) == 10
    without = dataclasses.replace(features, utterance_metadata=None)
    with pytest.raises(InputError, match="no column 'speaker'; allowed: dialogue, session"):
        make_folds(without, "speaker")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("age:5", "folds 'age:5': dataset made has no column 'age'; allowed: dialogue, speaker"),
        ("speaker:9", "only 2 values of speaker; allowed: at most as many folds"),
        ("speaker", r"only 2 folds \(a, b\); needed: at least 3"),
        ("dialogue:2", r"only 2 folds \(1, 2\); needed: at least 3"),
        ("dialogue:x", "allowed: COLUMN or COLUMN:NUMBER, such as"),
        ("dialogue:0", "allowed: COLUMN or COLUMN:NUMBER, such as"),
    ],
)
def test_unusable_folds_are_refused(spec, message):
    features = make_features(["a", "b"] * 4)
    with pytest.raises(InputError, match=message) as error:
        make_folds(features, spec)
    assert "\n" not in str(error.value)


def test_a_fold_that_leaves_no_training_dialogue_is_refused():
    features = make_features(["a", "b", "b", "c", "a", "c"], [0, 0, 1, 1, 2, 2])
    folds = make_folds(features, "speaker")
    for check in (
        lambda: select_fold(features, folds, 0, "train"),
        lambda: check_folds(features, folds),
    ):
        with pytest.raises(InputError, match=r"the (train|validation) split is empty"):
            check()
    with pytest.raises(InputError, match="fold 3 of 'speaker'; allowed: 0 to 2"):
        select_fold(features, folds, 3, "train")


def test_training_may_include_the_validation_fold_but_never_the_test_fold():
    features = make_features([f"s{number % 4}" for number in range(20)])
    folds = make_folds(features, "speaker")
    train, validation, test = (
        set(select_fold(features, folds, 2, split, validate_on_train=True).utterance_ids)
        for split in SPLITS
    )
    assert validation < train and len(train) == 15 and not train & test


def test_a_column_with_missing_values_is_refused():
    features = make_features(["a", "b", "c"])
    metadata = np.array(['{"speaker": "a"}', '{"speaker": null}', '{"speaker": "c"}'])
    with pytest.raises(InputError, match="1 of 3 utterances of dataset made have no speaker"):
        make_folds(dataclasses.replace(features, utterance_metadata=metadata), "speaker")


def test_folds_of_a_stored_dataset_and_the_guard_of_the_test_split(tiny_data_dir):
    pooled = load_pooled("tiny", tiny_data_dir)
    sizes = [data.load_features("tiny", split, tiny_data_dir).lengths.sum() for split in SPLITS]
    assert pooled.lengths.sum() == sum(sizes) == len(pooled.label)
    parts = [load_fold("tiny", split, "dialogue:4", 2, tiny_data_dir) for split in SPLITS]
    assert [part.split for part in parts] == list(SPLITS)
    ids = [name for part in parts for name in part.dialogue_ids]
    assert sorted(ids) == sorted(pooled.dialogue_ids)
    with training_splits_only():
        load_fold("tiny", "train", "dialogue:4", 2, tiny_data_dir)
        with pytest.raises(RuntimeError, match="training opens split 'test'"):
            load_fold("tiny", "test", "dialogue:4", 2, tiny_data_dir)
        # The split guard is active again after the pooled splits have been read.
        with pytest.raises(RuntimeError, match="training opens split 'test'"):
            data.load_features("tiny", "test", tiny_data_dir)
