"""`--corpus=transcripts`: a dialogue dataset of a folder of recordings with transcripts."""

import json
import pathlib

import numpy as np
import pytest

from mister_jax.data.audio import SAMPLE_RATE, encode_wav
from mister_jax.data.builder import DecodingOptions
from mister_jax.data.corpora.transcripts import TranscriptOptions, read_transcripts
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.prepare import PrepareOptions, prepare_corpus
from mister_jax.errors import InputError
from tests.helpers.commands import run_commands

TEXTS = ("Hello there.", "You again!", "Goodbye.")
LABELS = ("joy", "anger", "joy")
TIMES = ((0.0, 0.9), (1.0, 1.75), (2.0, 3.0))


def write_recording(path, seconds=3.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * SAMPLE_RATE))
    encode_wav(path, (5000 * np.sin(time / (20 + len(path.stem)))).astype(np.int16))


def text_grid() -> str:
    """Returns a TextGrid with the tiers `words` and `emotion`."""
    tiers = []
    for name, values in (("words", TEXTS), ("emotion", LABELS)):
        intervals = "".join(
            f'{start}\n{end}\n"{value}"\n'
            for (start, end), value in zip(TIMES, values, strict=True)
        )
        tiers.append(f'"IntervalTier"\n"{name}"\n0\n3\n{len(TIMES)}\n{intervals}')
    return 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n3\n<exists>\n2\n' + "".join(
        tiers
    )


def srt(texts=TEXTS) -> str:
    cues = (
        f"{number}\n00:00:{start:06.3f} --> 00:00:{end:06.3f}\n{text}\n\n"
        for number, ((start, end), text) in enumerate(zip(TIMES, texts, strict=True), start=1)
    )
    return "".join(cues)


def csv() -> str:
    rows = zip(TIMES, TEXTS, LABELS, strict=True)
    return "start,end,text,mood\n" + "".join(
        f"{a},{b},{text},{label}\n" for (a, b), text, label in rows
    )


@pytest.mark.parametrize(
    ("suffix", "content", "options"),
    [
        (".TextGrid", text_grid(), {"label_tier": "emotion"}),
        (".csv", csv(), {"label_column": "mood"}),
        (
            ".srt",
            srt([f"{text} [{label}]" for text, label in zip(TEXTS, LABELS, strict=True)]),
            {"label_suffix": True},
        ),
    ],
)
def test_labels_come_from_a_tier_a_column_or_the_text(tmp_path, suffix, content, options):
    for name in ("a/call 1", "call 2", "call 3"):
        write_recording(tmp_path / f"{name}.wav")
        (tmp_path / f"{name}{suffix}").write_text(content)
    corpus = read_transcripts(tmp_path, TranscriptOptions(**options))
    assert corpus.class_names == ("anger", "joy")
    dialogues = {dialogue.id: dialogue for _, dialogue in corpus.dialogues()}
    assert sorted(dialogues) == ["a/call 1", "call 2", "call 3"]
    utterances = dialogues["a/call 1"].utterances
    assert tuple(it.text for it in utterances) == TEXTS
    assert tuple(it.label for it in utterances) == LABELS
    assert tuple((it.recording.start, it.recording.end) for it in utterances) == TIMES
    assert str(utterances[0].recording.source) == str(tmp_path / "a" / "call 1.wav")


def test_a_folder_may_have_several_formats(tmp_path):
    for name, content in {"a.TextGrid": text_grid(), "b.csv": csv(), "c.srt": srt()}.items():
        write_recording(tmp_path / f"{name[0]}.wav")
        (tmp_path / name).write_text(content)
    options = TranscriptOptions(label_tier="emotion", label_column="mood")
    dialogues = {it.id: it for _, it in read_transcripts(tmp_path, options).dialogues()}
    labels = {name: tuple(it.label for it in dialogues[name].utterances) for name in "abc"}
    assert labels == {"a": LABELS, "b": LABELS, "c": (None, None, None)}


def test_the_report_lists_recordings_and_transcripts_without_the_other(tmp_path):
    source = tmp_path / "calls"
    for name in ("one", "two", "three", "alone"):
        write_recording(source / f"{name}.wav")
    for name in ("one", "two", "three", "lost"):
        (source / f"{name}.csv").write_text(csv())
    report = prepare_corpus(
        PrepareOptions(
            "transcripts",
            source,
            tmp_path / "data",
            transcripts=TranscriptOptions(label_column="mood"),
            decoding=DecodingOptions(0),
        )
    )
    assert "1 recordings without transcript are left out: alone.wav" in report["notes"]
    assert "1 transcripts without recording are left out: lost.csv" in report["notes"]
    dataset = DialogueDataset("manifest/calls", tmp_path / "data")
    turns = [
        turn
        for split in ("train", "validation", "test")
        for dialogue in dataset.dialogues(split)
        for turn in dialogue.utterances
    ]
    assert len(turns) == 9
    lengths = [len(turn.audio) / SAMPLE_RATE for turn in turns[:3]]
    assert lengths == [end - start for start, end in TIMES]


def test_times_that_do_not_fit_are_reported_and_kept(tmp_path):
    source = tmp_path / "calls"
    for name in ("one", "two", "three"):
        write_recording(source / f"{name}.wav", seconds=2.3)
        texts = (TEXTS[0] * 10, *TEXTS[1:])
        rows = zip(TIMES, texts, LABELS, strict=True)
        lines = (f"{a},{b},{text},{label}\n" for (a, b), text, label in rows)
        (source / f"{name}.csv").write_text("start,end,text,label\n" + "".join(lines))
    report = prepare_corpus(
        PrepareOptions("transcripts", source, tmp_path / "data", decoding=DecodingOptions(0))
    )
    assert sorted(entry["utterance"] for entry in report["past_end"]) == [
        "one/3",
        "three/3",
        "two/3",
    ]
    assert report["past_end"][0]["seconds"] == pytest.approx(0.3)
    assert report["past_end"][0]["annotated_seconds"] == 1.0
    assert sorted(entry["utterance"] for entry in report["fast_text"]) == [
        "one/1",
        "three/1",
        "two/1",
    ]
    assert report["fast_text"][0]["characters"] == 120
    assert sum(split["utterances"] for split in report["splits"].values()) == 9


def test_a_second_transcript_of_a_recording_is_not_lost(tmp_path):
    write_recording(tmp_path / "one.wav")
    (tmp_path / "one.csv").write_text(csv())
    (tmp_path / "one.srt").write_text(srt())
    corpus = read_transcripts(tmp_path, TranscriptOptions(), fractions=(1, 0, 0))
    assert not any("without recording" in note for note in corpus.notes)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "no recordings; needed"),
        ({"a.wav": None}, {}, "1 recordings without a transcript"),
        ({"a.wav": None, "a.TextGrid": text_grid()}, {}, "tiers: words .3., emotion .3."),
        (
            {"a.wav": None, "a.srt": srt()},
            {"label_tier": "emotion"},
            "SRT has no label tiers; leave out --label_tier",
        ),
        ({"a.wav": None, "a.csv": csv()}, {"label_column": "feeling"}, "columns: start, end"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, files, options, message):
    for name, content in files.items():
        if content is None:
            write_recording(tmp_path / name)
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_transcripts(tmp_path, TranscriptOptions(**options))
    assert "\n" not in str(error.value)


def test_without_labels_the_flags_that_find_them_are_named(tmp_path):
    write_recording(tmp_path / "one.wav")
    (tmp_path / "one.srt").write_text(srt())
    with pytest.raises(InputError, match="--label_tier, --label_column, --label_suffix"):
        prepare_corpus(PrepareOptions("transcripts", tmp_path, tmp_path / "data", name="calls"))


def test_a_transcript_of_two_recordings_is_an_error_that_names_all_three(tmp_path):
    for name in ("call.wav", "call.flac"):
        write_recording(tmp_path / name)
    (tmp_path / "call.csv").write_text(csv())
    with pytest.raises(
        InputError, match=r"call\.csv: matches both call\.flac and call\.wav; needed: one"
    ):
        read_transcripts(tmp_path, TranscriptOptions())
    (tmp_path / "call.csv").rename(tmp_path / "call.wav.csv")
    (tmp_path / "call.flac.csv").write_text(csv())
    corpus = read_transcripts(tmp_path, TranscriptOptions(label_column="mood"), fractions=(1, 0, 0))
    assert [it.id for it in corpus.splits["train"]] == ["call.flac", "call.wav"]


def test_spaces_around_the_name_of_a_recording_are_kept(tmp_path):
    options = TranscriptOptions(label_column="mood")
    for name in (" call", "call"):
        write_recording(tmp_path / f"{name}.wav")
        (tmp_path / f"{name}.csv").write_text(csv())
    dialogues = read_transcripts(tmp_path, options, fractions=(1, 0, 0)).splits["train"]
    assert {it.utterances[0].recording.source for it in dialogues} == {
        str(tmp_path / " call.wav"), str(tmp_path / "call.wav")
    }  # fmt: skip
    assert len({it.id for it in dialogues}) == 2


def test_the_rules_of_utterances_can_be_changed(tmp_path):
    write_recording(tmp_path / "one.wav")
    (tmp_path / "one.srt").write_text(srt(["Hello", "there.", "You [joy]"]))
    prepare = ["prepare", "--corpus=transcripts", "--source=.", "--label_suffix", "--name=calls"]
    flags = [["--data_dir=a"], ["--data_dir=b", "--join_gap=0.05"]]
    commands = [*(prepare + it for it in flags), ["prepare", "--corpus=meld", "--join_gap=1"]]
    results = run_commands(commands, tmp_path, working_directory=tmp_path)
    for result, folder, count in zip(results[:2], "ab", (2, 3), strict=True):
        assert result.status == 0, result.stderr
        (report,) = (tmp_path / folder).rglob("report.json")
        assert json.loads(report.read_text())["splits"]["train"]["utterances"] == count
    assert "--join_gap cannot be used with --corpus=meld" in results[2].stderr


def test_each_folder_is_listed_once(tmp_path, monkeypatch):
    for number in range(20):
        write_recording(tmp_path / f"{number}.wav", 0.1)
        (tmp_path / f"{number}.csv").write_text("start,end,text,label\n0,0.1,a,joy\n")
    listed = []
    iterdir = pathlib.Path.iterdir
    monkeypatch.setattr(pathlib.Path, "iterdir", lambda path: listed.append(path) or iterdir(path))
    corpus = read_transcripts(tmp_path, TranscriptOptions(), fractions=(1, 0, 0))
    assert len(corpus.splits["train"]) == 20
    assert listed.count(tmp_path) <= 1
