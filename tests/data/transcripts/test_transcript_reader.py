"""Errors for files that are not transcripts, and the transcript beside a recording."""

import os

import pytest

from mister_jax.data.transcripts import reader
from mister_jax.data.transcripts.reader import detect_format, find_transcript, read_transcript
from mister_jax.errors import InputError

SRT = "1\n00:00:01,000 --> 00:00:02,000\nHi\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \r\n", "is empty"),
        (b"Just a text.\nMore.", "no supported transcript, but text that begins 'Just a text"),
        (b"RIFF\x00\x00\xff\xfe", "no supported transcript, but binary data"),
        (b"\x00\x00", "no supported transcript, but binary data"),
        (b"\xff\xfe\x00", "no supported transcript, but damaged UTF-16"),
        (b'{"segments": [', "is damaged JSON"),
        (b'{"a": 1, "b": 2}', "is JSON with a, b, which is not a supported transcript"),
        (b'{"text": "", "segments": []}', "is Whisper JSON without segments"),
        (b"{0}{25}Hi", "text that begins '{0}"),
        (b"[1, 2]", "is JSON with a list, which"),
        (b"WEBVTT\n", "is WebVTT without segments"),
        (
            SRT.replace("02,", "00,").encode(),
            "is SRT without segments; left out 1 segment: end not",
        ),
    ],
)
def test_other_files_are_errors_in_one_line(read, content, message):
    with pytest.raises(InputError, match=message) as raised:
        read("a.srt", content)
    assert "a.srt: " in str(raised.value) and "\n" not in str(raised.value)


def test_files_that_cannot_be_read_are_errors(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"missing\.srt: no such file$"):
        read_transcript(tmp_path / "missing.srt")
    with pytest.raises(InputError, match=r"is a directory, not a transcript$"):
        read_transcript(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"is not a file$"):
        read_transcript(tmp_path / "pipe")
    (tmp_path / "large.srt").write_text(SRT)
    monkeypatch.setattr(reader, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="at most"):
        read_transcript(tmp_path / "large.srt")


def test_the_content_decides_and_not_the_name(tmp_path):
    for name, content, expected in (
        ("a.vtt", SRT, "SRT"),
        ("a.srt", "WEBVTT\n\n" + SRT.replace(",", "."), "WebVTT"),
        ("a.json", SRT, "SRT"),
        ("a.csv", "SPEAKER a 1 0 1 <NA> <NA> x <NA> <NA>", "RTTM"),
        ("a.TextGrid", "[Script Info]\n[Events]\nDialogue: 0", "ASS"),
    ):
        (tmp_path / name).write_text(content)
        assert detect_format(tmp_path / name) == expected


def test_the_speaker_is_selected(read):
    table = "start,end,text,speaker\n0,1,a,x\n1,2,b,y\n2,3,c,\n"
    assert [s.text for s in read("a.csv", table, speaker="y").segments] == ["b"]
    with pytest.raises(InputError, match=r"'z'; speakers: x \(1\), y \(1\), unknown \(1\)$"):
        read("a.csv", table, speaker="z")


def touch(folder, *names, content=SRT):
    for name in names:
        (folder / name).write_text(content)


def found(folder, recording="x.wav"):
    path = find_transcript(folder / recording)
    return path and path.name


def test_transcripts_beside_a_recording_are_found_in_order(tmp_path):
    touch(tmp_path, "x.wav", "x.txt", "xy.srt", "x", "x.wav.bak")
    assert found(tmp_path) is None
    for name in (
        *("x.rttm", "x.ctm", "x.csv", "x.tsv", "x.stm", "x.ssa", "x.ass", "x.en.srt", "x.wav.srt"),
        *("x.SRT", "x.vtt", "x.wav.words.json", "x.json", "x.cha", "x.textgrid", "x.EAF"),
    ):
        touch(tmp_path, name)
        assert found(tmp_path) == name


def test_tables_and_json_that_are_no_transcripts_are_skipped(tmp_path):
    touch(tmp_path, "x.csv", content="name,value\na,1\n")
    touch(tmp_path, "x.json", "x.features.json", content='{"sample_rate": 16000}')
    assert found(tmp_path) is None
    touch(tmp_path, "x.words.json", content='{"segments": [{"start": 0, "end": 1, "text": "a"}]}')
    assert found(tmp_path) == "x.words.json"


def test_transcripts_of_other_recordings_are_not_taken(tmp_path):
    touch(tmp_path, "x.wav", "x.1.wav", "x.1.srt", "x.1.de.vtt")
    assert found(tmp_path) is None
    assert found(tmp_path, "x.1.wav") == "x.1.de.vtt"
    assert found(tmp_path, "missing/x.wav") is None


def test_names_may_be_composed_or_decomposed(tmp_path):
    touch(tmp_path, "e\u0301.srt")
    assert found(tmp_path, "\u00e9.wav") == "e\u0301.srt"
