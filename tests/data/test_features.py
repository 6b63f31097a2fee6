"""Feature datasets: npz archives are checked, stored with TFDS and loaded again."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mister_jax.data import DialogueFeatures, load_features, read_npz, write_features
from mister_jax.data.lazy import tfds
from mister_jax.errors import InputError


def prepare(source, name, data_dir, **options):
    """Does what `mister-jax prepare --corpus=features` does."""
    return write_features(read_npz(source), name, data_dir, **options)


ARRAYS = ("utterance_ids", "speech", "text", "speech_present", "text_present", "label", "lengths")


def archive() -> dict[str, np.ndarray]:
    """Returns valid rows of four dialogues, out of order."""
    generator = np.random.default_rng(0)
    return {
        "utterance": np.array(["b2", "a1", "b1", "c1", "a2", "d1", "a3"]),
        "dialogue": np.array(["b", "a", "b", "c", "a", "d", "a"]),
        "position": np.array([5.5, 0, 1, 0, 10, 3, 2]),
        "split": np.array(["train", "train", "train", "test", "train", "validation", "train"]),
        "label": np.array([0, 1, -1, 1, 2, 0, 0]),
        "class_names": np.array(["joy", "anger", "très triste"]),
        "speech": generator.normal(size=(7, 3)).astype(np.float16),
        "text": generator.normal(size=(7, 4)),
    }


def save(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> pathlib.Path:
    path = folder / "features.npz"
    np.savez(path, **arrays)
    return path


def assert_features_equal(actual: DialogueFeatures, expected: DialogueFeatures) -> None:
    for field in ARRAYS:
        array, expected_array = getattr(actual, field), getattr(expected, field)
        np.testing.assert_array_equal(array, expected_array, err_msg=field)
        assert array.dtype == expected_array.dtype, field
    assert (actual.score is None) == (expected.score is None)
    if actual.score is not None:
        np.testing.assert_array_equal(actual.score, expected.score)
    assert actual.dialogue_ids == expected.dialogue_ids
    assert actual.class_names == expected.class_names
    assert actual.metadata == expected.metadata


def test_dialogues_are_in_order_of_their_first_rows_and_utterances_of_position(tmp_path):
    splits = read_npz(save(tmp_path, archive()))
    assert list(splits) == ["train", "validation", "test"]
    train = splits["train"]
    assert train.dialogue_ids == ("b", "a")
    assert train.utterance_ids.tolist() == ["b1", "b2", "a1", "a3", "a2"]
    assert train.lengths.tolist() == [2, 3]
    assert train.offsets.tolist() == [0, 2, 5]
    assert train.label.tolist() == [-1, 0, 1, 0, 2]
    np.testing.assert_array_equal(train.speech, archive()["speech"][[2, 0, 1, 6, 4]])
    assert train.speech.dtype == np.float16
    assert train.text.dtype == np.float32
    assert train.class_counts.tolist() == [2, 1, 1]


@pytest.mark.parametrize("with_score", [False, True])
def test_a_stored_dataset_loads_unchanged(tmp_path, with_score):
    arrays = archive()
    if with_score:
        arrays["score"] = np.array([0.5, np.nan, -3, 1, 2, 0, 0], np.float32)
    arrays["speech_present"] = np.array([1, 0, 1, 1, 1, 1, 0], bool)
    source = save(tmp_path, arrays)
    prepare(source, "round_trip", tmp_path / "store")
    for split, features in read_npz(source).items():
        loaded = load_features("round_trip", split, tmp_path / "store")
        assert_features_equal(loaded, features)
        assert loaded.name == "round_trip"
        assert loaded.metadata["source"] == "features.npz"
        assert len(loaded.metadata["sha256"]) == 64
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["round_trip"]


def test_features_of_an_absent_modality_are_ignored_and_zero(tmp_path):
    arrays = archive()
    arrays["speech"][1] = np.nan
    arrays["speech_present"] = np.arange(7) != 1
    arrays["text_present"] = (np.arange(7) > 1).astype(np.int8)
    train = read_npz(save(tmp_path, arrays))["train"]
    assert train.utterance_ids[~train.speech_present].tolist() == ["a1"]
    assert train.utterance_ids[~train.text_present].tolist() == ["b2", "a1"]
    assert not train.speech[~train.speech_present].any()
    assert not train.text[~train.text_present].any()


def test_ids_may_be_integers_or_bytes(tmp_path):
    arrays = archive()
    arrays["dialogue"] = np.array([12, 7, 12, 3, 7, 4, 7])
    arrays["utterance"] = arrays["utterance"].astype("S")
    train = read_npz(save(tmp_path, arrays))["train"]
    assert train.dialogue_ids == ("12", "7")
    assert train.utterance_ids[0] == "b1"


def changed(name: str, row: int, value: object) -> dict[str, np.ndarray]:
    arrays = archive()
    arrays[name] = arrays[name].copy()
    arrays[name][row] = value
    return arrays


INVALID_ARCHIVES = {
    "no array speech or text": {k: v for k, v in archive().items() if k not in ("speech", "text")},
    "speech: 1 dimensions": {**archive(), "speech": np.zeros(7)},
    "text: 6 rows": {**archive(), "text": np.zeros((6, 4))},
    "text: no columns": {**archive(), "text": np.zeros((7, 0))},
    "text: type int64; allowed: floats": {**archive(), "text": np.zeros((7, 4), int)},
    "speech: row 3 (utterance c1)": changed("speech", 3, np.nan),
    "text: row 2 (utterance b1): inf": changed("text", 2, 1e300),
    "label: type float64; allowed: integers": {**archive(), "label": np.zeros(7)},
    "label: row 5 (utterance d1): 3: allowed: -1 (unlabeled) and 0 to 2": changed("label", 5, 3),
    "label: row 0 (utterance b2): -2": changed("label", 0, -2),
    "position: row 2 (utterance b1): 5.5: repeated": changed("position", 2, 5.5),
    "position: row 1 (utterance a1): nan": changed("position", 1, np.nan),
    "position: type <U1; allowed: numbers": {**archive(), "position": np.array(list("1234567"))},
    "in its dialogue": {**archive(), "position": np.zeros(7)},
    "split: row 0 (utterance b2): test: another row of its dialogue": changed("split", 0, "test"),
    "split: row 1 (utterance a1): de v: allowed:": changed("split", 1, "de\nv"),
    "allowed: train, validation, test": changed("split", 0, "dev"),
    "utterance: row 4 (utterance a1)": changed("utterance", 4, "a1"),
    "utterance: no rows": {**archive(), "utterance": np.array([], str)},
    "class_names: 'joy' repeated": changed("class_names", 1, "joy"),
    "class_names: 'a\\nb'": changed("class_names", 1, "a\nb"),
    "class_names: empty": {**archive(), "class_names": np.array([], str)},
    "dialogue: damaged, or an array of Python objects": {
        **archive(),
        "dialogue": np.array(list("babcada"), object),
    },
    "score: row 6 (utterance a3)": {**archive(), "score": np.array([0.0] * 6 + [np.inf])},
    "score: row 6 (utterance a3): 3.5: allowed: -3 to 3, or NaN": {
        **archive(),
        "score": np.array([0.0] * 6 + [3.5]),
    },
    "text: row 2 (utterance b1): 1e+30: allowed: finite float32 of at most 1e+15": (
        changed("text", 2, 1e30)
    ),
    "class_names: 'Joy' is 'joy' spelled differently; allowed: one class 'joy'": {
        **archive(),
        "class_names": np.array(["joy", "anger", "Joy"]),
    },
    "text_present: row 0 (utterance b2): 2": {**archive(), "text_present": np.arange(7) + 2},
}


@pytest.mark.parametrize("message", INVALID_ARCHIVES)
def test_an_invalid_archive_is_rejected_in_one_line_and_writes_nothing(tmp_path, message):
    source = save(tmp_path, INVALID_ARCHIVES[message])
    with pytest.raises(InputError) as error:
        prepare(source, "bad", tmp_path / "store")
    assert str(error.value).startswith(f"{source}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("modality", "other"), [("speech", "text"), ("text", "speech")])
def test_one_modality_is_enough(tmp_path, modality, other):
    arrays = archive()
    del arrays[other]
    train = read_npz(save(tmp_path, arrays))["train"]
    assert getattr(train, f"{modality}_present").all()
    assert not getattr(train, f"{other}_present").any()
    assert getattr(train, other).shape == (5, 1)
    prepare(tmp_path / "features.npz", "alone", tmp_path / "store")
    assert_features_equal(load_features("alone", "train", tmp_path / "store"), train)


def speakers_without_splits(num_speakers: int, num_dialogues: int) -> dict[str, np.ndarray]:
    """Returns arrays of single-utterance dialogues; each speaker has several dialogues."""
    number = np.arange(num_dialogues)
    return {
        "utterance": number,
        "dialogue": number,
        "position": number,
        "label": number % 2,
        "class_names": np.array(["calm", "angry"]),
        "speech": np.zeros((num_dialogues, 2), np.float32),
        "speaker": number % num_speakers,
    }


def test_random_splits_keep_speakers_apart_and_are_repeatable(tmp_path):
    source = save(tmp_path, speakers_without_splits(20, 200))
    splits = read_npz(source)
    speakers = [{int(name) % 20 for name in split.utterance_ids} for split in splits.values()]
    assert [len(split.label) for split in splits.values()] == [160, 20, 20]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 20
    assert "in 20 groups that share no speaker" in splits["train"].metadata["notes"][0]
    # The speakers are kept as a column, because folds of a cross-validation need them.
    column = [json.loads(row)["speaker"] for row in splits["train"].utterance_metadata]
    assert column == [str(int(name) % 20) for name in splits["train"].utterance_ids]
    assert_features_equal(read_npz(source)["test"], splits["test"])
    assert read_npz(source, seed=1)["test"].dialogue_ids != splits["test"].dialogue_ids


def test_a_random_split_of_single_utterances_without_speakers_warns(tmp_path):
    arrays = speakers_without_splits(20, 200)
    del arrays["speaker"]
    note = read_npz(save(tmp_path, arrays))["train"].metadata["notes"][0]
    assert note.startswith("WARNING: ") and "add a column speaker" in note


def test_group_by_keeps_the_values_of_another_array_apart(tmp_path):
    arrays = speakers_without_splits(20, 200) | {"session": np.arange(200) % 5}
    splits = read_npz(save(tmp_path, arrays), group_by="session")
    sessions = [{int(name) % 5 for name in split.utterance_ids} for split in splits.values()]
    assert sum(map(len, sessions)) == 5
    with pytest.raises(InputError, match="no array room"):
        read_npz(tmp_path / "features.npz", group_by="room")
    with pytest.raises(InputError, match=r"share a session form 2 groups; needed .*: at least 3"):
        read_npz(save(tmp_path, arrays | {"session": np.arange(200) % 2}), group_by="session")


def test_other_arrays_are_kept_as_metadata_or_named_in_a_note(tmp_path):
    arrays = archive() | {
        "session": np.array([1, 1, 2, 2, 1, 3, 1]),
        "metadata_text": np.array([b"a", b"b", b"c", b"d", b"e", b"f", b"g"]),
        "start": np.array([0.5, np.nan, 2, 3, 4, 5, 6]),
        "face": np.zeros((7, 3)),
        "names": np.array(["x"] * 8),
        "objects": np.array([None] * 7),
        "date": np.zeros(7, "datetime64[D]"),
        "latin": np.array([b"\xe9"] * 7),
        "metadata_session": np.array(["x"] * 7),
    }
    splits = read_npz(save(tmp_path, arrays))
    rows = {
        utterance: json.loads(row)
        for split in splits.values()
        for utterance, row in zip(split.utterance_ids, split.utterance_metadata, strict=True)
    }
    names = archive()["utterance"]
    assert rows[names[0]] == {"session": "1", "text": "a", "start": "0.5"}
    assert rows[names[1]] == {"session": "1", "text": "b", "start": ""}
    assert splits["train"].metadata["notes"] == [
        "arrays kept as metadata: session, start, metadata_text",
        "arrays ignored: face, names, objects, date, latin, metadata_session",
    ]


def test_speakers_in_training_and_test_give_a_warning(tmp_path):
    arrays = archive() | {"speaker": np.array(["x", "x", "x", "x", "x", "y", "x"])}
    (note,) = read_npz(save(tmp_path, arrays))["test"].metadata["notes"]
    assert note == "WARNING: 1 of 2 values of speaker are in training and in another split"


def test_a_file_that_is_no_archive_is_rejected(tmp_path):
    path = tmp_path / "features.npz"
    with pytest.raises(InputError, match="no such file"):
        read_npz(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"not an npz file.*utterance, dialogue.*speech or text"):
        read_npz(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="a single array"):
        read_npz(path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_rejected_or_reads_the_same(tmp_path, data):
    path = save(tmp_path, archive())
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        del content[data.draw(st.integers(0, len(content) - 1), label="length") :]
    else:
        index = data.draw(st.integers(0, len(content) - 1), label="byte")
        content[index] ^= data.draw(st.integers(1, 255), label="change")
    path.write_bytes(bytes(content))
    try:
        splits = read_npz(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert splits["train"].utterance_ids.tolist() == ["b1", "b2", "a1", "a3", "a2"]


def test_an_existing_dataset_is_replaced_only_with_overwrite(tmp_path):
    source = save(tmp_path, archive())
    store = tmp_path / "store"
    prepare(source, "twice", store)
    save(tmp_path, changed("label", 0, 2))
    with pytest.raises(InputError, match="exists"):
        prepare(source, "twice", store)
    assert load_features("twice", "train", store).label[1] == 0
    prepare(source, "twice", store, overwrite=True)
    assert load_features("twice", "train", store).label[1] == 2
    assert [path.name for path in store.iterdir()] == ["twice"]


def test_a_failure_while_writing_keeps_the_old_dataset(tmp_path):
    splits = read_npz(save(tmp_path, archive()))
    store = tmp_path / "store"
    write_features(splits, "kept", store)
    with pytest.raises(TypeError):
        write_features(splits, "kept", store, metadata={"not": {"json"}}, overwrite=True)
    assert_features_equal(load_features("kept", "train", store), splits["train"])
    assert [path.name for path in store.iterdir()] == ["kept"]


def test_loaded_metadata_merges_dataset_and_split(tmp_path):
    splits = read_npz(save(tmp_path, archive()))
    write_features(splits, "described", tmp_path, metadata={"encoder": "base"})
    metadata = load_features("described", "test", tmp_path).metadata
    assert metadata == {"encoder": "base", **splits["test"].metadata}


@pytest.mark.parametrize("name", ["", "Upper", "9lives", "a-b", "../up", "a/b", "a\n"])
def test_an_invalid_dataset_name_is_rejected(tmp_path, name):
    with pytest.raises(InputError, match="lower-case"):
        prepare(save(tmp_path, archive()), name, tmp_path)


def test_an_unwritable_directory_is_rejected(tmp_path):
    source = save(tmp_path, archive())
    with pytest.raises(InputError, match="cannot be written"):
        prepare(source, "name", source)


def test_errors_name_the_available_datasets_and_splits(tmp_path):
    arrays = {key: value[:3] if key != "class_names" else value for key, value in archive().items()}
    prepare(save(tmp_path, arrays), "only_train", tmp_path)
    with pytest.raises(InputError, match="no dataset 'absent'; available: only_train"):
        load_features("absent", "train", tmp_path)
    with pytest.raises(InputError, match="available: none"):
        load_features("absent", "train", tmp_path / "empty")
    with pytest.raises(InputError, match="no split 'test'; allowed: train"):
        load_features("only_train", "test", tmp_path)


def test_a_dataset_without_features_is_rejected(tmp_path):
    tfds.dataset_builders.store_as_tfds_dataset(
        name="numbers",
        version="1.0.0",
        features=tfds.features.FeaturesDict({"number": np.int64}),
        split_datasets={"train": [(0, {"number": 1})]},
        data_dir=tmp_path,
    )
    with pytest.raises(InputError, match="a dataset without features; needed: a dataset that"):
        load_features("numbers", "train", tmp_path)
