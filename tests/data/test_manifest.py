"""Manifests: the right dialogues, or an error that names file, row and field."""

import collections
import csv
import io
import json
import re

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as given_examples
from hypothesis import strategies as st

from mister_jax.data.corpus import Recording
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.manifest import reader
from mister_jax.data.prepare import Decoding, Preparation, prepare_corpus
from mister_jax.errors import InputError

ROWS = [
    {"dialogue": "b", "utterance": 2, "order": 2.5, "text": "Second.", "label": "joy"},
    {"dialogue": "a", "utterance": "x", "start": 3, "end": 4, "audio": "a.wav", "label": "anger"},
    {"dialogue": "b", "utterance": 1, "order": -1, "text": "First.", "audio": "b.wav"},
    {"dialogue": "a", "utterance": "y", "start": 0.5, "text": "Before x.", "label": "joy"},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows, fields=reader.FIELDS):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    return path


def ids(corpus):
    return {
        dialogue.id: [turn.id for turn in dialogue.utterances] for _, dialogue in corpus.dialogues()
    }


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_rows_become_dialogues_in_order(tmp_path, write):
    corpus = reader.read(write(tmp_path / f"m.{write.__name__[6:]}", ROWS))
    assert ids(corpus) == {"b": ["b/1", "b/2"], "a": ["a/y", "a/x"]}
    assert corpus.class_names == ("anger", "joy")
    turns = {turn.id: turn for _, turn in corpus.utterances()}
    assert turns["b/1"].label is None and turns["b/2"].label == "joy"
    assert turns["a/x"].recording.path == str(tmp_path / "a.wav")
    assert (turns["a/x"].start, turns["a/x"].end, turns["a/x"].text) == (3, 4, "")
    assert turns["a/y"].recording is None


def test_given_splits_and_labels_are_kept(tmp_path):
    rows = [row | {"split": "test" if row["dialogue"] == "a" else "train"} for row in ROWS]
    corpus = reader.read(write_jsonl(tmp_path / "m.jsonl", rows), labels=("joy", "calm", "anger"))
    assert corpus.sizes() == {"train": (1, 2), "validation": (0, 0), "test": (1, 2)}
    assert [dialogue.id for dialogue in corpus.splits["test"]] == ["a"]
    assert corpus.class_names == ("joy", "calm", "anger")


def test_random_splits_are_by_dialogue_and_repeatable(tmp_path):
    rows = [
        {"dialogue": dialogue, "utterance": turn, "order": turn, "text": "a", "label": "joy"}
        for dialogue in range(20)
        for turn in range(3)
    ]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    first, again, other = (reader.read(path, seed=seed) for seed in (0, 0, 1))
    assert first.sizes() == {"train": (16, 48), "validation": (2, 6), "test": (2, 6)}
    assert first.splits == again.splits != other.splits
    assert "at random, seed 0" in first.notes[0]
    few = reader.read(write_jsonl(path, rows[:9]))
    assert few.sizes() == {"train": (1, 3), "validation": (1, 3), "test": (1, 3)}


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"speaker": "Ann"}, "'speaker'", "unknown; allowed: dialogue, utterance"),
        ({"text": None}, "audio", "missing, and text too"),
        ({"order": None}, "order", "missing, and start too"),
        ({"order": "soon"}, "order", "'soon'; allowed: a number"),
        ({"order": True}, "order", "True; allowed: a number"),
        ({"start": -1}, "start", "-1.0; allowed: a finite number, 0 to 3.40282e+38"),
        ({"start": 1e300}, "start", "1e+300; allowed: a finite number, 0 to 3.40282e+38"),
        ({"score": 1e300}, "score", "1e+300; allowed: a finite number, -3 to 3"),
        ({"score": -3.1}, "score", "-3.1; allowed: a finite number, -3 to 3"),
        ({"start": 2, "end": 2}, "end", "2; allowed: more than start"),
        ({"audio_end": 2}, "audio", "missing; audio_start and audio_end are places in it"),
        ({"dialogue": ""}, "dialogue", "missing; needed: an id"),
        ({"utterance": 1.5}, "utterance", "1.5; allowed: text"),
        ({"split": "dev"}, "split", "'dev'; allowed: train, validation, test"),
        ({"split": "train"}, "split", "in some rows; allowed: in all or none"),
        ({"label": 3}, "label", "3; allowed: text"),
        ({"text": "a\ud800"}, "text", "allowed: text without null or broken characters"),
        ({"order": -1}, "order", "-1 repeated in its dialogue"),
        ({"utterance": 1, "order": 7}, "utterance", "repeats the row at line 3"),
    ],
)
def test_a_bad_field_is_named_with_file_and_row(tmp_path, row, field, message):
    rows = [ROWS[1], ROWS[3], ROWS[2], ROWS[0] | row]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    with pytest.raises(InputError) as caught:
        reader.read(path)
    assert str(caught.value).startswith(f"{path}: row at line 4: {field}: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", b"", "no rows"),
        ("m.jsonl", b"{}\n", "row at line 1: dialogue: missing"),
        ("m.jsonl", b"\n[1]\n", "row at line 2: not an object"),
        ("m.jsonl", b'{"dialogue": 1', "row at line 1: not JSON"),
        ("m.jsonl", b'{"text": "a", "text": "b"}', "row at line 1: 'text': repeated"),
        ("m.jsonl", b"\xff\xfe", "line 1: not UTF-8"),
        ("m.csv", b"", "empty; needed: a header"),
        ("m.csv", b"dialogue,mood\n", "'mood': unknown column"),
        ("m.csv", b"text,text\n", "text: repeated column"),
        ("m.csv", b"dialogue,utterance\na\n", "row at line 2: 1 fields; needed: 2"),
        ("m.csv", b'dialogue\n"a', "row at line 2: not CSV"),
        ("m.txt", b"", ".txt; allowed: .jsonl, .csv"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        reader.read(path)


def test_a_folder_is_no_manifest(tmp_path):
    with pytest.raises(InputError, match="a folder; needed: a manifest"):
        reader.read(tmp_path)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        ["a", "b", "train", "test", "joy", "1", " ", "\n", "1e999", "nan", [], {}, [1]]
    ),
)
FIELD = st.one_of(st.sampled_from(reader.FIELDS), st.text(max_size=5))


@st.composite
def manifests(draw):
    """Rows, most of them right, and what a careless hand does to them."""
    rows = []
    split = draw(st.sampled_from([None, "given"]))
    for dialogue in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(["order", "start"]))
        part = draw(st.sampled_from(["train", "validation", "test"]))
        for turn in range(draw(st.integers(1, 3))):
            row = {"dialogue": f"d{dialogue}", "utterance": turn, place: turn, "text": "words"}
            if draw(st.booleans()):
                row["label"] = draw(st.sampled_from(["joy", "anger"]))
            if split:
                row["split"] = part
            rows.append(row)
    rows = draw(st.permutations(rows))
    for _ in range(draw(st.integers(0, 2))):
        row = draw(st.integers(0, len(rows) - 1))
        change = draw(st.sampled_from(["set", "set", "drop", "repeat"]))
        if change == "set":
            rows[row] = rows[row] | {draw(FIELD): draw(VALUES)}
        elif change == "drop" and rows[row]:
            field = draw(st.sampled_from(sorted(rows[row])))
            rows[row] = {key: value for key, value in rows[row].items() if key != field}
        elif change == "repeat":
            rows.append(dict(rows[row]))
    return rows


def given(value):
    """Text as it is read; None where nothing is given."""
    return None if value is None else str(value).strip() or None


def number(value):
    return None if given(value) is None else float(value)


def oracle(rows):
    """Ids of each dialogue's utterances in order; plain, for rows that are known to be right."""

    def place(row):
        order = number(row.get("order"))
        return number(row["start"]) if order is None else order

    dialogues = collections.defaultdict(list)
    for row in sorted(rows, key=place):
        dialogues[given(row["dialogue"])].append(utterance_id(row))
    return dict(dialogues)


def utterance_id(row):
    return f"{given(row['dialogue'])}/{given(row['utterance'])}"


def told(row, folder):
    """All that a row says, as `seen` of what is read."""
    recording = None
    if given(row.get("audio")) is not None:
        path = str(folder / given(row["audio"]))
        recording = Recording(path, number(row.get("audio_start")), number(row.get("audio_end")))
    numbers = [number(row.get(field)) for field in ("score", "start", "end")]
    return (
        given(row.get("split")),
        given(row.get("text")),
        given(row.get("label")),
        recording,
        numbers,
    )


def seen(corpus, splits_given):
    return {
        turn.id: (
            split if splits_given else None,
            turn.text or None,
            turn.label,
            turn.recording,
            [turn.score, turn.start, turn.end],
        )
        for split, turn in corpus.utterances()
    }


def names_of(content, as_csv, rows):
    """How an error may call a field of a file: by its name, quoted where there is no such field."""
    known = {field for row in rows for field in row}
    if as_csv:  # The file may end within its header.
        header = next(csv.reader(io.StringIO(content.decode(errors="replace"), newline="")), [])
        known = {name.strip() for name in header}
    return {*reader.FIELDS, *(" ".join(repr(name).split()) for name in known - {*reader.FIELDS})}


# What is wrong with a row or a file, not with a field.
WITHOUT_FIELD = ("not JSON (", "fields; needed: ", "not CSV (", "not UTF-8; ")


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given_examples(rows=manifests(), as_csv=st.booleans(), cut=st.one_of(st.none(), st.floats(0, 1)))
def test_a_careless_manifest_is_read_right_or_refused_with_its_place(tmp_path, rows, as_csv, cut):
    path = tmp_path / ("m.csv" if as_csv else "m.jsonl")
    if as_csv:
        fields = list(dict.fromkeys(field for row in rows for field in row))
        try:
            write_csv(path, rows, fields)
        except (UnicodeEncodeError, csv.Error):
            return
    else:
        write_jsonl(path, rows)
    content = path.read_bytes()
    whole = cut is None or cut == 1
    if not whole:
        content = content[: int(cut * len(content))]
        path.write_bytes(content)
    try:
        corpus = reader.read(path)
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1
        where = re.match(r"(?:row at )?line (\d+): (.*)", message.removeprefix(f"{path}: "))
        if where is None:
            assert re.search(r": (no rows|empty);", message), message
            return
        line, reason = int(where[1]), where[2]
        assert 1 <= line <= 1 + content.count(b"\n") + content.count(b"\r")
        if not any(what in reason for what in WITHOUT_FIELD):
            names = names_of(content, as_csv, rows)
            assert any(reason.startswith(f"{name}: ") for name in names), message
        return
    utterances = [turn for _, turn in corpus.utterances()]
    if whole:
        assert len(utterances) == len(rows)
        assert ids(corpus) == oracle(rows)
        complete = rows
    else:
        # What is left of a cut file is a beginning of it; a row cut in its last value may pass.
        assert 0 < len(utterances) <= len(rows)
        complete = rows[: len(utterances) - 1]
    found = seen(corpus, any(given(row.get("split")) for row in complete))
    for row in complete:
        assert found[utterance_id(row)] == told(row, path.parent)


def test_a_manifest_becomes_a_dataset(tmp_path, write_wav):
    write_wav(tmp_path / "a.wav", 1.0)
    rows = [
        {"dialogue": 1, "utterance": 1, "order": 1, "audio": "a.wav", "label": "joy", "score": 2},
        {"dialogue": 1, "utterance": 2, "order": 2, "text": "Only text."},
        {"dialogue": 1, "utterance": 3, "order": 3, "audio": "b.wav", "text": "No file."},
        {"dialogue": 1, "utterance": 4, "order": 4, "audio": "a.wav"}
        | {"audio_start": 0.25, "audio_end": 0.5},
    ]
    path = write_jsonl(tmp_path / "My-calls.jsonl", [row | {"split": "train"} for row in rows])
    report = prepare_corpus(
        Preparation(
            "manifest",
            path,
            tmp_path / "data",
            labels=("calm", "joy"),
            decoding=Decoding(0),
            partial=True,
        )
    )
    assert report["dataset"] == "manifest/my_calls"
    dataset = DialogueDataset("manifest/my_calls", tmp_path / "data")
    (dialogue,) = dataset.dialogues("train")
    assert [len(turn.audio) for turn in dialogue.utterances] == [16_000, 0, 0, 4_000]
    assert [turn.speech_present for turn in dialogue.utterances] == [True, False, False, True]
    assert [turn.text_present for turn in dialogue.utterances] == [False, True, True, False]
    assert [turn.label for turn in dialogue.utterances] == [1, -1, -1, -1]
    assert dialogue.utterances[0].score == 2 and dataset.class_names == ("calm", "joy")
    assert [entry["utterance"] for entry in report["missing"]] == ["1/3"]
