"""Tests timelines: each format is read back by the library of its field."""

import html

import numpy as np
import pytest

from mister_jax.data.audio import encode_wav
from mister_jax.data.transcripts.reader import read_transcript
from mister_jax.errors import InputError
from mister_jax.inference.prediction_files import FORMATS, check_predictions_path, write_predictions

CLASSES = ("anger", "joy", "neutral")
INJECTION = "</script><img src=x onerror=\"document.title='broken'\"> & --> \"quoted\" 'x' \u2028 ü"
TEXT_FORMATS = (".srt", ".vtt", ".TextGrid", ".eaf")


def make_row(number, start, end, **values):
    emotion = values.pop("emotion", CLASSES[number % 3])
    rest = 0.3 / (len(CLASSES) - 1)
    return {
        "recording": "call.wav",
        "utterance": str(number),
        "start": start,
        "end": end,
        "speaker": None,
        "text": f"words {number}",
        "label": None,
        "emotion": emotion,
        "probabilities": {name: 0.7 if name == emotion else rest for name in CLASSES},
        "experts": {"speech": "joy", "text": None, "fusion": "neutral"},
        "gate": {"speech": 0.25, "text": 0.0, "fusion": 0.75},
        "notes": [],
        **values,
    }


@pytest.fixture
def rows():
    """Two speakers who talk at the same time; A's utterances 2 and 4 overlap, too."""
    return [
        make_row(1, 0.0, 1.2345, speaker="A", text='He said "no".'),
        make_row(2, 1.5, 4.0, speaker="A", text=INJECTION),
        make_row(3, 2.0, 3.25, speaker="B <b>", text=""),
        make_row(4, 3.9, 5.0, speaker="A"),
        make_row(5, 3661.007, 3662.5, speaker="B <b>"),
    ]


def one_line(text):
    return " ".join(text.split())


@pytest.mark.parametrize("extension", [".srt", ".vtt"])
def test_pysubs2_reads_subtitles(tmp_path, rows, extension):
    pysubs2 = pytest.importorskip("pysubs2")
    path = tmp_path / f"call{extension}"
    write_predictions(path, rows[::-1])
    # pysubs2 would remove what looks like a tag from SRT.
    subtitles = pysubs2.load(str(path), keep_html_tags=extension == ".srt")
    assert [(it.start, it.end) for it in subtitles] == [
        (round(1000 * row["start"]), round(1000 * row["end"])) for row in rows
    ]
    for event, row in zip(subtitles, rows, strict=True):
        text = one_line(row["text"])
        if extension == ".srt":
            text = f"{row['speaker']}: {text}".strip().replace("-->", "→")
        seen = html.unescape(event.plaintext) if extension == ".vtt" else event.plaintext
        assert seen == f"[{row['emotion']}] {text}".strip()


def test_webvtt_has_voices_and_colored_classes(tmp_path, rows):
    path = tmp_path / "call.vtt"
    rows[0] = make_row(1, 0.0, 1.0, speaker="A", emotion="Joy & 1", probabilities={})
    rows[1] = make_row(2, 1.5, 4.0, emotion="joy 1", probabilities={})
    write_predictions(path, rows)
    text = path.read_text()
    assert text.startswith("WEBVTT\n\nSTYLE\n::cue(.joy-1) { color: #")
    assert "::cue(.joy-1-1) { color: #" in text
    assert "<v A><c.joy-1>[Joy &amp; 1] words 1</c></v>" in text
    assert "\n<c.joy-1-1>[joy 1] words 2</c>\n" in text
    assert "<v B &lt;b&gt;>" in text


def test_praatio_reads_textgrid(tmp_path, rows):
    textgrid = pytest.importorskip("praatio.textgrid")
    path = tmp_path / "call.TextGrid"
    write_predictions(path, rows)
    grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False, reportingMode="error")
    assert grid.tierNames == (
        "A", "A emotion", "A 2", "A emotion 2", "B <b>", "B <b> emotion",
    )  # fmt: skip
    tiers = (("A", rows[:2]), ("A 2", rows[3:4]), ("B <b>", rows[4:]))
    for name, tier_rows in tiers:
        assert [tuple(it) for it in grid.getTier(name).entries] == [
            (row["start"], round(row["end"], 3), one_line(row["text"])) for row in tier_rows
        ]
    emotions = grid.getTier("B <b> emotion").entries
    assert [tuple(it) for it in emotions] == [
        (2.0, 3.25, rows[2]["emotion"]), (3661.007, 3662.5, rows[4]["emotion"])
    ]  # fmt: skip
    assert grid.maxTimestamp == 3662.5


def test_pympi_reads_eaf(tmp_path, rows):
    elan = pytest.importorskip("pympi.Elan")
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "call.eaf"
    rows = [row | {"recording": str(tmp_path / "call 1.wav")} for row in rows]
    write_predictions(path, rows)
    document = elan.Eaf(str(path))
    assert list(document.get_tier_names()) == [
        "A", "A emotion", "A 2", "A emotion 2", "B <b>", "B <b> emotion",
    ]  # fmt: skip
    assert sorted(document.get_annotation_data_for_tier("B <b>")) == [
        (2000, 3250, ""), (3661007, 3662500, "words 5")
    ]  # fmt: skip
    assert [it[:3] for it in sorted(document.get_ref_annotation_data_for_tier("A emotion"))] == [
        (0, 1234, rows[0]["emotion"]), (1500, 4000, rows[1]["emotion"])
    ]  # fmt: skip
    assert document.get_parameters_for_tier("A 2")["PARTICIPANT"] == "A"
    (media,) = document.media_descriptors
    assert media["RELATIVE_MEDIA_URL"] == "../call 1.wav"
    assert media["MEDIA_URL"] == (tmp_path / "call 1.wav").as_uri()


@pytest.mark.parametrize("extension", TEXT_FORMATS)
def test_read_transcript_reads_times_texts_and_emotions(tmp_path, extension):
    rows = [make_row(1, 0.5, 1.25), make_row(2, 1.25, 3.0, text="ü & more"), make_row(3, 8, 9)]
    path = tmp_path / f"call{extension}"
    write_predictions(path, rows)
    is_annotation = extension in (".TextGrid", ".eaf")
    tiers = {"tier": "text", "label_tier": "emotion"} if is_annotation else {}
    segments = read_transcript(path, **tiers).segments
    assert [(it.start, it.end) for it in segments] == [(it["start"], it["end"]) for it in rows]
    if is_annotation:
        assert [it.text for it in segments] == [row["text"] for row in rows]
        assert [it.label for it in segments] == [row["emotion"] for row in rows]


@pytest.mark.parametrize("extension", TEXT_FORMATS)
def test_one_short_utterance_with_forbidden_characters(tmp_path, extension):
    path = tmp_path / f"call{extension}"
    write_predictions(path, [make_row(1, 2.0, 2.0001, text="a\x00b\ud800\n\nc")])
    (segment,) = read_transcript(
        path, **({"tier": "text"} if extension in (".TextGrid", ".eaf") else {})
    ).segments
    assert (segment.start, segment.end) == (2.0, 2.001)
    assert segment.text.endswith("a\ufffdb\ufffd c")


def test_textgrid_is_as_long_as_the_recording(tmp_path):
    textgrid = pytest.importorskip("praatio.textgrid")
    recording = str(tmp_path / "call.wav")
    encode_wav(recording, np.zeros(16_000 * 4, np.int16))
    path = tmp_path / "call.textgrid"
    write_predictions(path, [make_row(1, 0.5, 1.0, recording=recording)])
    grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=True)
    assert grid.maxTimestamp == 4.0
    assert [tuple(it) for it in grid.getTier("text").entries] == [
        (0, 0.5, ""), (0.5, 1.0, "words 1"), (1.0, 4.0, "")
    ]  # fmt: skip


TIMELINES = [extension for extension in FORMATS if extension not in (".jsonl", ".csv")]


@pytest.mark.parametrize("extension", TIMELINES)
def test_timelines_need_the_times_of_one_recording(tmp_path, extension):
    path = tmp_path / f"call{extension}"
    first = make_row(1, 0, 1)
    for rows in ([], [first | {"start": None}], [{"emotion": "joy"}], [first | {"end": 0}]):
        with pytest.raises(InputError, match="needed: utterances of one recording, with start"):
            write_predictions(path, rows)
    with pytest.raises(InputError, match="rows of 2 recordings; needed: one recording"):
        write_predictions(path, [first, first | {"recording": "other.wav"}])
    assert not path.exists()


def test_output_extension_is_checked(tmp_path):
    with pytest.raises(InputError, match=r"\.txt; allowed: \.jsonl, \.csv, \.srt, \.vtt, \.TextG"):
        check_predictions_path(tmp_path / "call.txt")
