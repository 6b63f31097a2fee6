"""The reader of manifests returns the right dialogues, or an error with file, row and field."""

import collections
import csv
import io
import json
import pathlib
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mister_jax.data.corpora.manifest import reader
from mister_jax.data.corpus import DecodeRequest
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
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
    corpus = reader.read_manifest(write(tmp_path / f"m.{write.__name__[6:]}", ROWS))
    assert ids(corpus) == {"b": ["b/1", "b/2"], "a": ["a/y", "a/x"]}
    assert corpus.class_names == ("anger", "joy")
    turns = {turn.id: turn for _, turn in corpus.utterances()}
    assert turns["b/1"].label is None and turns["b/2"].label == "joy"
    assert turns["a/x"].recording.source == str(tmp_path / "a.wav")
    assert (turns["a/x"].start, turns["a/x"].end, turns["a/x"].text) == (3, 4, "")
    assert turns["a/y"].recording is None


def test_splits_and_labels_of_the_file_are_used(tmp_path):
    rows = [row | {"split": "test" if row["dialogue"] == "a" else "train"} for row in ROWS]
    corpus = reader.read_manifest(
        write_jsonl(tmp_path / "m.jsonl", rows), labels=("joy", "calm", "anger")
    )
    assert corpus.sizes() == {"train": (1, 2), "validation": (0, 0), "test": (1, 2)}
    assert [dialogue.id for dialogue in corpus.splits["test"]] == ["a"]
    assert corpus.class_names == ("joy", "calm", "anger")


def test_random_splits_keep_dialogues_whole_and_are_reproducible(tmp_path):
    rows = [
        {"dialogue": dialogue, "utterance": turn, "order": turn, "text": "a", "label": "joy"}
        for dialogue in range(20)
        for turn in range(3)
    ]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    first, same, other = (reader.read_manifest(path, seed=seed) for seed in (0, 0, 1))
    assert first.sizes() == {"train": (16, 48), "validation": (2, 6), "test": (2, 6)}
    assert first.splits == same.splits != other.splits
    assert first.notes == ("dialogues split at random, seed 0",)
    few = reader.read_manifest(write_jsonl(path, rows[:9]))
    assert few.sizes() == {"train": (1, 3), "validation": (1, 3), "test": (1, 3)}


def single_utterances(*, with_speakers=False):
    """Returns 200 dialogues of one utterance, optionally with 20 speakers of 10 dialogues each."""
    return [
        {"dialogue": n, "utterance": n, "order": 0, "text": "a", "label": "joy"}
        | ({"speaker": f"s{n % 20}"} if with_speakers else {})
        for n in range(200)
    ]


def test_random_splits_keep_speakers_apart(tmp_path):
    path = write_jsonl(tmp_path / "m.jsonl", single_utterances(with_speakers=True))
    corpus = reader.read_manifest(path)
    assert corpus.sizes() == {"train": (160, 160), "validation": (20, 20), "test": (20, 20)}
    speakers = [
        {turn.metadata["speaker"] for dialogue in dialogues for turn in dialogue.utterances}
        for dialogues in corpus.splits.values()
    ]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 20
    assert "in 20 groups that share no speaker" in corpus.notes[-1]


def test_splitting_single_utterances_without_speakers_warns(tmp_path):
    corpus = reader.read_manifest(write_jsonl(tmp_path / "m.jsonl", single_utterances()))
    assert corpus.notes[-1].startswith("WARNING: ") and "add a column speaker" in corpus.notes[-1]


def test_speakers_that_connect_all_dialogues_give_a_split_by_dialogue_and_a_warning(tmp_path):
    rows = [
        {"dialogue": n, "utterance": turn, "order": turn, "text": "a", "speaker": (n + turn) % 10}
        for n in range(10)
        for turn in range(2)
    ]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    corpus = reader.read_manifest(path)
    assert corpus.sizes() == {"train": (8, 16), "validation": (1, 2), "test": (1, 2)}
    (note,) = (note for note in corpus.notes if note.startswith("WARNING: "))
    assert "dialogues that share a speaker form 1 groups, too few" in note
    with pytest.raises(InputError, match="that share a speaker form 1 groups; needed"):
        reader.read_manifest(path, group_by="speaker")
    with pytest.raises(InputError, match="line 1: room: missing; needed in every row"):
        reader.read_manifest(path, group_by="room")


def test_speakers_in_training_and_another_split_give_a_warning(tmp_path):
    rows = [row | {"split": "test" if row["dialogue"] == "a" else "train"} for row in ROWS]
    rows = [row | {"speaker": "Ann"} for row in rows]
    notes = reader.read_manifest(write_jsonl(tmp_path / "m.jsonl", rows)).notes
    assert "WARNING: 1 of 1 values of speaker are in training and in another split" in notes


def in_one_recording(**changes):
    return [
        {"dialogue": "d", "utterance": n, "start": n, "end": n + 0.5, "audio": "call.wav"} | changes
        for n in range(3)
    ]


def test_utterances_of_one_recording_are_cut_by_start_and_end(tmp_path):
    rows = [*in_one_recording(), ROWS[1], ROWS[3]]
    corpus = reader.read_manifest(write_jsonl(tmp_path / "m.jsonl", rows))
    recordings = [turn.recording for _, turn in corpus.utterances() if turn.id.startswith("d/")]
    path = str(tmp_path / "call.wav")
    assert recordings == [DecodeRequest(path, n, n + 0.5) for n in range(3)]
    assert "start and end select 3 utterances in 1 recordings" in corpus.notes[0]
    # If only one row names a recording, the utterance is the whole recording.
    turns = {turn.id: turn for _, turn in corpus.utterances()}
    assert turns["a/x"].recording == DecodeRequest(str(tmp_path / "a.wav"))


def test_audio_start_and_audio_end_take_precedence_over_start_and_end(tmp_path):
    rows = in_one_recording()
    rows[1] |= {"audio_start": 7, "audio_end": 8}
    corpus = reader.read_manifest(write_jsonl(tmp_path / "m.jsonl", rows))
    cuts = [(turn.recording.start, turn.recording.end) for _, turn in corpus.utterances()]
    assert cuts == [(0, 0.5), (7, 8), (2, 2.5)]


def test_several_utterances_without_times_in_one_recording_are_rejected(tmp_path):
    rows = in_one_recording(end=None)
    with pytest.raises(InputError, match="line 1: end: missing; 3 utterances have the recording"):
        reader.read_manifest(write_jsonl(tmp_path / "m.jsonl", rows))
    with pytest.raises(InputError, match="line 1: end: missing; 3 utterances have the recording"):
        respelled = [
            row | {"dialogue": n, "audio": "./" * n + "call.wav"} for n, row in enumerate(rows)
        ]
        respelled[1]["dialogue"] = "another"
        reader.read_manifest(write_jsonl(tmp_path / "m.jsonl", respelled))
    # Rows with different channels may share a recording.
    for n, row in enumerate(rows):
        row["audio_channel"] = (" ", 0, 1)[n]
    corpus = reader.read_manifest(write_jsonl(tmp_path / "m.jsonl", rows))
    recordings = [turn.recording for _, turn in corpus.utterances()]
    assert [recording.channel for recording in recordings] == ["mix", 0, 1]
    assert all((recording.start, recording.end) == (None, None) for recording in recordings)


@pytest.mark.parametrize(
    ("name", "delimiter"), [("m.csv", ","), ("m.csv", ";"), ("m.csv", "\t"), ("m.tsv", "\t")]
)
def test_the_separator_of_a_csv_file_is_detected(tmp_path, name, delimiter):
    path = tmp_path / name
    lines = ["dialogue", "utterance", "order", "text", "label"], ["d", "1", "1", "a, b; c", "joy"]
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    ((_, turn),) = reader.read_manifest(path, fractions=(1, 0, 0)).utterances()
    assert (turn.id, turn.text, turn.label) == ("d/1", "a, b; c", "joy")


def test_extra_columns_are_kept_as_metadata(tmp_path):
    rows = [row | {"duration": 1.5, "channel": "left", "tags": ["a", "b"]} for row in ROWS]
    corpus = reader.read_manifest(write_jsonl(tmp_path / "m.jsonl", rows))
    for _, turn in corpus.utterances():
        assert turn.metadata == {"duration": "1.5", "channel": "left", "tags": '["a", "b"]'}
    assert corpus.notes[0] == (
        "columns kept as metadata, which no model reads: duration, channel, tags"
    )


def test_labels_are_mapped_and_dropped_by_label_map(tmp_path):
    labels = ["anger", "anger", "ANGER", "nan"]
    rows = [row | {"label": label} for row, label in zip(ROWS, labels, strict=True)]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    with pytest.raises(InputError, match=r"'ANGER' is 'anger' .*--map_labels=ANGER=anger,nan="):
        reader.read_manifest(path)
    corpus = reader.read_manifest(path, label_map={"ANGER": "anger", "nan": ""})
    assert corpus.class_names == ("anger",)
    assert [turn.label for _, turn in corpus.utterances()].count(None) == 1
    kept = reader.read_manifest(path, label_map={"ANGER": "anger", "nan": "nan"})
    assert kept.class_names == ("anger", "nan")
    assert reader.read_manifest(path, check_labels=False).class_names == ("ANGER", "anger", "nan")


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        (
            {"lable": "joy", "label": None},
            "'lable'",
            "unknown, close to 'label'; allowed: ",
        ),
        ({"mood\n": "calm"}, "'mood\\n'", "invalid name; allowed: printable text"),
        ({"mood": "\ud800"}, "mood", "allowed: text without null or invalid characters"),
        ({"audio": "b.wav", "audio_channel": "up"}, "audio_channel", "'up'; allowed: mix, left"),
        ({"audio": "b.wav", "audio_channel": []}, "audio_channel", "[]; allowed: mix, left"),
        (
            {"label": "nan"},
            "label",
            "'nan' reads like a missing label (1 rows); fix: --map_l",
        ),
        ({"label": "Anger"}, "label", "'Anger' is 'anger' spelled differently"),
        ({"text": None}, "audio", "missing, and text is also missing"),
        ({"order": None}, "order", "missing, and start is also missing"),
        ({"order": "soon"}, "order", "'soon'; allowed: a number, with a point for decimals"),
        ({"order": True}, "order", "True; allowed: a number"),
        ({"start": -1}, "start", "-1.0; allowed: a finite number, 0 to 3.40282e+38"),
        ({"start": 1e300}, "start", "1e+300; allowed: a finite number, 0 to 3.40282e+38"),
        ({"score": 1e300}, "score", "1e+300; allowed: a finite number, -3 to 3"),
        ({"score": -3.1}, "score", "-3.1; allowed: a finite number, -3 to 3"),
        ({"start": 2, "end": 2}, "end", "2; allowed: more than start"),
        ({"audio_end": 2}, "audio", "missing; audio_start and audio_end refer to it"),
        ({"dialogue": ""}, "dialogue", "missing; needed: an id"),
        ({"utterance": 1.5}, "utterance", "1.5; allowed: text"),
        ({"split": "dev"}, "split", "'dev'; allowed: train, validation, test"),
        ({"split": "train"}, "split", "in some rows; allowed: in all rows or none"),
        ({"label": 3}, "label", "3; allowed: text"),
        ({"text": "a\ud800"}, "text", "allowed: text without null or invalid characters"),
        ({"order": -1}, "order", "-1 repeated in its dialogue"),
        ({"utterance": 1, "order": 7}, "utterance", "repeats the row at line 3"),
    ],
)
def test_an_error_names_file_row_and_field(tmp_path, row, field, message):
    rows = [ROWS[1], ROWS[3], ROWS[2], ROWS[0] | row]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    with pytest.raises(InputError) as caught:
        reader.read_manifest(path)
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
        ("m.csv", b"dialogue,utterence\n", "'utterence': unknown, close to 'utterance'"),
        ("m.csv", b"text,text\n", "text: repeated column"),
        ("m.csv", b"dialogue,utterance\na\n", "row at line 2: 1 fields; needed: 2"),
        ("m.csv", b"dialogue;utterance\na,1\n", "separated by semicolons, as in the header"),
        ("m.csv", b'dialogue\n"a', "row at line 2: not CSV"),
        ("m.txt", b"", ".txt; allowed: .jsonl, .csv, .tsv"),
    ],
)
def test_an_error_names_the_bad_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        reader.read_manifest(path)


def test_a_folder_is_rejected(tmp_path):
    with pytest.raises(InputError, match="a folder; needed: a manifest"):
        reader.read_manifest(tmp_path)


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
    """Draws rows that are mostly valid and have a few careless mistakes."""
    rows = []
    with_splits = draw(st.booleans())
    for dialogue in range(draw(st.integers(1, 3))):
        order_field = draw(st.sampled_from(["order", "start"]))
        split = draw(st.sampled_from(["train", "validation", "test"]))
        for turn in range(draw(st.integers(1, 3))):
            row = {
                "dialogue": f"d{dialogue}",
                "utterance": turn,
                order_field: turn,
                "text": "words",
            }
            if draw(st.booleans()):
                row["label"] = draw(st.sampled_from(["joy", "anger"]))
            if with_splits:
                row["split"] = split
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


def expected_text(value):
    """Returns the text that the reader should return for a cell, or None if there is no text."""
    return None if value is None else str(value).strip() or None


def number(value):
    return None if expected_text(value) is None else float(value)


def expected_ids(rows):
    """Maps each dialogue to its utterance ids in the expected order; all rows must be valid."""

    def position(row):
        order = number(row.get("order"))
        return number(row["start"]) if order is None else order

    dialogues = collections.defaultdict(list)
    for row in sorted(rows, key=position):
        dialogues[expected_text(row["dialogue"])].append(utterance_id(row))
    return dict(dialogues)


def expected_channel(value):
    """Returns the channel that the reader should return for a cell."""
    if expected_text(value) is None:
        return "mix"
    return int(value) if str(value).strip().isdecimal() else value


def utterance_id(row):
    return f"{expected_text(row['dialogue'])}/{expected_text(row['utterance'])}"


def expected_utterance(row, folder, shared_recordings):
    """Returns the content of a row, in the format of `read_utterances`."""
    recording = None
    if expected_text(row.get("audio")) is not None:
        path = str(folder / expected_text(row["audio"]))
        cut = number(row.get("audio_start")), number(row.get("audio_end"))
        times = number(row.get("start")), number(row.get("end"))
        if (
            cut == (None, None)
            and expected_text(row["audio"]) in shared_recordings
            and None not in times
        ):
            cut = times
        recording = DecodeRequest(path, *cut, expected_channel(row.get("audio_channel")))
    numbers = [number(row.get(field)) for field in ("score", "start", "end")]
    return (
        expected_text(row.get("split")),
        expected_text(row.get("text")),
        expected_text(row.get("label")),
        recording,
        numbers,
    )


def read_utterances(corpus, with_splits):
    return {
        turn.id: (
            split if with_splits else None,
            turn.text or None,
            turn.label,
            turn.recording,
            [turn.score, turn.start, turn.end],
        )
        for split, turn in corpus.utterances()
    }


def names_of(content, as_csv, rows):
    """Returns the names that an error may use for the columns of a file."""
    columns = {field for row in rows for field in row}
    if as_csv:  # A truncated file may end within its header.
        header = next(csv.reader(io.StringIO(content.decode(errors="replace"), newline="")), [])
        columns = {name.strip() or "unnamed" for name in header}
    # Errors name a repeated column as it is written, and quote the names of other extra columns.
    extra_columns = columns - {*reader.FIELDS}
    quoted = {" ".join(repr(name).split()) for name in extra_columns}
    return {*reader.FIELDS, *quoted, *(" ".join(name.split()) for name in extra_columns)}


# Errors about a row or a file, which name no field.
ERRORS_WITHOUT_FIELD = ("not JSON (", "fields; needed: ", "not CSV (", "not UTF-8; ")


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=manifests(), as_csv=st.booleans(), cut=st.one_of(st.none(), st.floats(0, 1)))
def test_a_careless_manifest_is_read_correctly_or_rejected_with_its_row(
    tmp_path, rows, as_csv, cut
):
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
    is_complete = cut is None or cut == 1
    if not is_complete:
        content = content[: int(cut * len(content))]
        path.write_bytes(content)
    try:
        corpus = reader.read_manifest(path)
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1
        location = re.match(r"(?:row at )?line (\d+): (.*)", message.removeprefix(f"{path}: "))
        if location is None:
            assert re.search(r": (no rows|empty);", message), message
            return
        line, reason = int(location[1]), location[2]
        assert 1 <= line <= 1 + content.count(b"\n") + content.count(b"\r")
        if not any(text in reason for text in ERRORS_WITHOUT_FIELD):
            names = names_of(content, as_csv, rows)
            assert any(reason.startswith(f"{name}: ") for name in names), message
        return
    utterances = [turn for _, turn in corpus.utterances()]
    if is_complete:
        assert len(utterances) == len(rows)
        assert ids(corpus) == expected_ids(rows)
        complete_rows = rows
    else:
        # A truncated file contains the first rows, and the last of these may end within a value.
        assert 0 < len(utterances) <= len(rows)
        complete_rows = rows[: len(utterances) - 1]
    read = read_utterances(corpus, any(expected_text(row.get("split")) for row in complete_rows))
    recordings = [expected_text(row.get("audio")) for row in rows]
    shared_recordings = {name for name in recordings if name and recordings.count(name) > 1}
    for row in complete_rows:
        if is_complete or not shared_recordings:
            assert read[utterance_id(row)] == expected_utterance(
                row, path.parent, shared_recordings
            )


def test_a_manifest_is_written_as_a_dataset(tmp_path, write_wav):
    write_wav(tmp_path / "a.wav", 1.0)
    rows = [
        {"dialogue": 1, "utterance": 1, "order": 1, "audio": "a.wav", "label": "joy", "score": 2}
        | {"audio_start": 0, "mood": "calm", "speaker": "x"},
        {"dialogue": 1, "utterance": 2, "order": 2, "text": "Only text."},
        {"dialogue": 1, "utterance": 3, "order": 3, "audio": "b.wav", "text": "No file."},
        {"dialogue": 1, "utterance": 4, "order": 4, "audio": "a.wav"}
        | {"audio_start": 0.25, "audio_end": 0.5},
    ]
    path = write_jsonl(tmp_path / "My-calls.jsonl", [row | {"split": "train"} for row in rows])
    report = prepare_corpus(
        PrepareOptions(
            "manifest",
            path,
            tmp_path / "data",
            labels=("calm", "joy"),
            decoding=DecodingOptions(0),
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
    assert dialogue.utterances[0].metadata == {"mood": "calm", "speaker": "x"}
    assert dialogue.utterances[1].metadata == {}
    assert [entry["utterance"] for entry in report["missing"]] == ["1/3"]


def test_the_documentation_lists_all_fields():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "your_own_data.md").read_text()
    for field in reader.FIELDS:
        assert f"`{field}`" in page


def test_spaces_around_a_path_belong_to_it_only_if_there_is_such_a_file(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("dialogue,utterance,order,audio\n1,1,1, a.wav\n1,2,2, b.wav \n")
    for name in (" a.wav", "a.wav", "b.wav"):
        (tmp_path / name).touch()
    (dialogue,) = reader.read_manifest(path, fractions=(1, 0, 0)).splits["train"]
    assert [it.recording.source for it in dialogue.utterances] == [
        str(tmp_path / " a.wav"), str(tmp_path / "b.wav")
    ]  # fmt: skip
