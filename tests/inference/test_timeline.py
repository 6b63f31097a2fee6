"""Tests timelines: independent libraries read back the files of each format."""

import base64
import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from mister_jax.data import audio
from mister_jax.data.audio import encode_wav
from mister_jax.data.transcripts.reader import read_annotation, read_transcript
from mister_jax.errors import InputError
from mister_jax.inference.prediction_files import FORMATS, check_predictions_path, write_predictions
from mister_jax.inference.timeline.palette import emotion_colors
from mister_jax.inference.timeline.waveform import waveform_peaks

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
    # By default, pysubs2 removes text that looks like a tag from SRT files.
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


@pytest.mark.parametrize("extension", TEXT_FORMATS)
def test_uncertain_emotions_have_a_question_mark(tmp_path, extension):
    path = tmp_path / f"call{extension}"
    marked = [make_row(number, number, number + 1, uncertain=number == 1) for number in range(3)]
    write_predictions(path, marked)
    with_mark = path.read_text()
    write_predictions(path, [make_row(number, number, number + 1) for number in range(3)])
    plain = path.read_text()
    assert f"{CLASSES[1]}?" not in plain
    without_mark = with_mark.replace(f"{CLASSES[1]}?", CLASSES[1])
    date = re.compile('DATE="[^"]*"')
    assert with_mark.count(f"{CLASSES[1]}?") == 1
    assert date.sub("", without_mark) == date.sub("", plain)


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


def emotion_row(number, start, end, **values):
    return make_row(number, start, end, recording="call.wav", **values)


GIVEN_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

-1
5.5
<exists>
4
"IntervalTier" "emotion" -1 5.5 3
-1 0.1234 ""
0.1234 2.00049 "say ""hi""
twice"
2.00049 5.5 "  "
"TextTier" "bells" -1 5.5 2
1.5 "ding"
2.5 ""
"IntervalTier" "phones" 0 5 2
0 0.5 "a"
0.75 5 "b"
"IntervalTier" "empty" -1 5.5 1
-1 5.5 ""
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_praatio_reads_the_given_textgrid_and_the_emotions(tmp_path, encoding):
    textgrid = pytest.importorskip("praatio.textgrid")
    given = tmp_path / "given.TextGrid"
    given.write_text(GIVEN_GRID, encoding=encoding)
    rows = [emotion_row(1, 0.123, 2.0), emotion_row(2, 1.5, 5.501), emotion_row(3, 3.0, 4.0)]
    path = tmp_path / "out.TextGrid"
    write_predictions(path, rows, transcript=given)
    text = path.read_text()
    assert "xmin = -1.0\nxmax = 5.5\n" in text and "size = 6\n" in text
    assert 'text = "say ""hi""\ntwice"' in text and 'text = "  "' in text
    # praatio changes tiers that start or end at different times. In the file that praatio reads,
    # all tiers therefore have the same start and the same end.
    options = {"includeEmptyIntervals": True, "reportingMode": "silence"}
    plain = tmp_path / "plain.TextGrid"
    content = GIVEN_GRID.replace("0 5 2\n", "0 5.5 2\n").replace('5 "b', '5.5 "b')
    # praatio needs one token per line, and no negative times.
    content = content.replace("-1", "0")
    plain.write_text(re.sub('(?<=[0-9"]) (?=[-0-9"])', "\n", content))
    out = tmp_path / "wide.TextGrid"
    write_predictions(out, rows, transcript=plain)
    before, after = (textgrid.openTextgrid(str(it), **options) for it in (plain, out))
    assert after.tierNames == (*before.tierNames, "emotion 2", "emotion 3")
    for name in before.tierNames:
        assert after.getTier(name) == before.getTier(name), name
    # Emotions have the exact boundaries of the texts, although the times in the rows are rounded.
    assert [tuple(it) for it in after.getTier("emotion 2").entries] == [
        (0, 0.1234, ""), (0.1234, 2.00049, rows[0]["emotion"]), (2.00049, 3, ""),
        (3, 4, rows[2]["emotion"]), (4, 5.5, ""),
    ]  # fmt: skip
    assert [tuple(it) for it in after.getTier("emotion 3").entries] == [
        (0, 1.5, ""), (1.5, 5.5, rows[1]["emotion"])
    ]  # fmt: skip
    annotation = read_annotation(path)
    phones = annotation.tiers[2]
    assert phones.span == (0, 5) and [it.start for it in phones.intervals] == [0, 0.75]
    assert [tier.is_points for tier in annotation.tiers] == [False, True, *[False] * 4]


GIVEN_EAF = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" AUTHOR="Ann" DATE="2020-01-01T00:00:00+00:00" FORMAT="3.0" VERSION="3.0" xsi:noNamespaceSchemaLocation="http://www.mpi.nl/tools/elan/EAFv3.0.xsd">
<HEADER MEDIA_FILE="" TIME_UNITS="milliseconds">
<MEDIA_DESCRIPTOR MEDIA_URL="file:///old/call.mp4" MIME_TYPE="video/mp4" RELATIVE_MEDIA_URL="./media/call.mp4"/>
<MEDIA_DESCRIPTOR MEDIA_URL="file:///old/call.wav" MIME_TYPE="audio/x-wav" RELATIVE_MEDIA_URL="../call.wav" EXTRACTED_FROM="file:///old/call.mp4"/>
<LINKED_FILE_DESCRIPTOR LINK_URL="file:///old/pitch.csv" MIME_TYPE="unknown" RELATIVE_LINK_URL="./pitch.csv"/>
<PROPERTY NAME="lastUsedAnnotationId">4</PROPERTY>
</HEADER>
<TIME_ORDER>
<TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="1000"/>
<TIME_SLOT TIME_SLOT_ID="ts2"/>
<TIME_SLOT TIME_SLOT_ID="ts3" TIME_VALUE="4000"/>
</TIME_ORDER>
<TIER TIER_ID="Ann" PARTICIPANT="Ann" ANNOTATOR="me" LINGUISTIC_TYPE_REF="emotion" LANG_REF="eng">
<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts2"><ANNOTATION_VALUE>one &amp; "two"</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a2" TIME_SLOT_REF1="ts2" TIME_SLOT_REF2="ts3"><ANNOTATION_VALUE> three
four </ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
</TIER>
<TIER TIER_ID="Ann emotion" PARENT_REF="Ann" LINGUISTIC_TYPE_REF="label">
<ANNOTATION><REF_ANNOTATION ANNOTATION_ID="a3" ANNOTATION_REF="a1" CVE_REF="cveid_0"><ANNOTATION_VALUE>joy</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION>
</TIER>
<LINGUISTIC_TYPE LINGUISTIC_TYPE_ID="emotion" TIME_ALIGNABLE="true" GRAPHIC_REFERENCES="false"/>
<LINGUISTIC_TYPE LINGUISTIC_TYPE_ID="label" TIME_ALIGNABLE="false" GRAPHIC_REFERENCES="false" CONSTRAINTS="Symbolic_Association" CONTROLLED_VOCABULARY_REF="moods"/>
<LANGUAGE LANG_ID="eng" LANG_LABEL="English"/>
<CONSTRAINT STEREOTYPE="Symbolic_Association" DESCRIPTION="1-1 association with a parent annotation"/>
<CONTROLLED_VOCABULARY CV_ID="moods"><DESCRIPTION LANG_REF="eng"/><CV_ENTRY_ML CVE_ID="cveid_0"><CVE_VALUE LANG_REF="eng">joy</CVE_VALUE></CV_ENTRY_ML></CONTROLLED_VOCABULARY>
</ANNOTATION_DOCUMENT>
"""  # noqa: E501


def test_pympi_reads_the_given_eaf_and_the_emotions(tmp_path):
    elan = pytest.importorskip("pympi.Elan")
    for folder in ("given", "out"):
        (tmp_path / folder).mkdir()
    given = tmp_path / "given" / "a.eaf"
    given.write_text(GIVEN_EAF, encoding="utf-8")
    recording = str(tmp_path / "call.wav")
    rows = [make_row(1, 1, 2.5, speaker="Ann"), make_row(2, 2.5, 4, speaker="Ann")]
    rows = [row | {"recording": recording} for row in [*rows, make_row(3, 3.9, 4.5)]]
    path = tmp_path / "out" / "a.eaf"
    write_predictions(path, rows, transcript=given)
    before, after = elan.Eaf(str(given)), elan.Eaf(str(path))
    names = list(before.get_tier_names())
    assert list(after.get_tier_names()) == [*names, "Ann emotion 2", "emotion"]
    for name in names:
        assert after.tiers[name][:3] == before.tiers[name][:3], name
    slots = {key: after.timeslots[key] for key in before.timeslots}
    assert slots == before.timeslots
    for part in ("constraints", "controlled_vocabularies", "languages", "licenses", "adocument"):
        assert getattr(after, part) == getattr(before, part), part
    assert set(after.linguistic_types) == {"emotion", "label", "emotion 2"}
    assert after.linguistic_types["label"] == before.linguistic_types["label"]
    assert sorted(after.get_annotation_data_for_tier("Ann emotion 2")) == [
        (1000, 2500, rows[0]["emotion"]), (2500, 4000, rows[1]["emotion"])
    ]  # fmt: skip
    assert after.get_parameters_for_tier("Ann emotion 2")["PARTICIPANT"] == "Ann"
    # Links are relative to the new file. The recording was already linked.
    assert [it["RELATIVE_MEDIA_URL"] for it in after.media_descriptors] == [
        "../given/media/call.mp4", "../call.wav"
    ]  # fmt: skip
    assert after.linked_file_descriptors[0]["RELATIVE_LINK_URL"] == "../given/pitch.csv"
    root = ET.parse(path).getroot()
    ids = [
        value
        for element in root.iter()
        for key, value in element.items()
        if key in ("ANNOTATION_ID", "TIME_SLOT_ID")
    ]
    assert len(set(ids)) == len(ids)
    last = max(int(re.sub(r"\D", "", it)) for it in ids)
    assert root.findtext("HEADER/PROPERTY") == str(last)
    assert [it.get("TIME_VALUE") for it in root.find("TIME_ORDER")] == [
        "1000", None, "1000", "2500", "2500", "3900", "4000", "4000", "4500"
    ]  # fmt: skip
    order = [it.tag for it in root]
    assert order == sorted(
        order, key=[*dict.fromkeys(it.tag for it in ET.fromstring(GIVEN_EAF))].index
    )


def test_pympi_reads_the_emotions_in_units_of_the_given_eaf(tmp_path):
    elan = pytest.importorskip("pympi.Elan")
    given, path = tmp_path / "a.eaf", tmp_path / "b.eaf"
    content = GIVEN_EAF.replace("milliseconds", "PAL-frames").replace("4000", "2000")
    given.write_text(re.sub("<MEDIA_DESC.*|<PROPERTY.*", "", content))
    write_predictions(path, [emotion_row(1, 40.01, 80.0)], transcript=given)
    document = elan.Eaf(str(path))
    assert [it[:2] for it in document.get_annotation_data_for_tier("emotion")] == [(1000, 2000)]
    assert [it["RELATIVE_MEDIA_URL"] for it in document.media_descriptors] != []


def summary(annotation):
    return [
        (tier.name, [(it.start, it.end, it.text) for it in tier.filled])
        for tier in annotation.tiers
    ]


def test_an_eaf_becomes_a_textgrid_and_a_textgrid_an_eaf(tmp_path):
    given = tmp_path / "a.eaf"
    overlapping = (
        '<TIER TIER_ID="two"><ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a8" '
        'TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts3"/></ANNOTATION><ANNOTATION>'
        '<ALIGNABLE_ANNOTATION ANNOTATION_ID="a9" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts3"/>'
        "</ANNOTATION></TIER><LINGUISTIC_TYPE "
    )
    given.write_text(GIVEN_EAF.replace("<LINGUISTIC_TYPE ", overlapping, 1), encoding="utf-8")
    rows = [emotion_row(1, 1, 2.5), emotion_row(2, 3, 6)]
    write_predictions(tmp_path / "a.TextGrid", rows, transcript=given)
    grid = read_annotation(tmp_path / "a.TextGrid")
    assert summary(grid) == [
        ("Ann", [(1, 2.5, 'one & "two"'), (2.5, 4, "three four")]),
        ("Ann emotion", [(1, 2.5, "joy")]),
        ("two", []),
        ("two 2", []),
        ("emotion", [(1, 2.5, rows[0]["emotion"]), (3, 6, rows[1]["emotion"])]),
    ]  # fmt: skip
    assert {tier.span for tier in grid.tiers} == {(0, 6)}
    assert grid.tiers[0].intervals[2].text == " three\nfour "

    (tmp_path / "b.TextGrid").write_text(GIVEN_GRID.replace("-1", "0"))
    write_predictions(tmp_path / "b.eaf", rows, transcript=tmp_path / "b.TextGrid")
    document = read_annotation(tmp_path / "b.eaf")
    assert summary(document) == [
        ("emotion", [(0.123, 2.0, 'say "hi" twice')]),
        ("phones", [(0, 0.5, "a"), (0.75, 5, "b")]),
        ("empty", []),
        ("emotion 2", [(1, 2.5, rows[0]["emotion"]), (3, 6, rows[1]["emotion"])]),
    ]  # fmt: skip


@pytest.mark.parametrize("extension", TEXT_FORMATS)
def test_a_transcript_of_another_format_changes_nothing(tmp_path, extension):
    given = tmp_path / "a.srt"
    given.write_text("1\n00:00:01,000 --> 00:00:02,000\na\n")
    path, expected = tmp_path / f"b{extension}", tmp_path / f"c{extension}"
    write_predictions(path, [emotion_row(1, 1, 2)], transcript=given)
    write_predictions(expected, [emotion_row(1, 1, 2)])
    texts = (re.sub("DATE=.* FORMAT", "FORMAT", it.read_text()) for it in (path, expected))
    assert len(set(texts)) == 1


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


def write_page(tmp_path, rows, **options):
    """Writes a page with a recording of 6 s, in which the second half is louder."""
    recording = tmp_path / "call #1.wav"
    samples = np.sin(np.arange(16_000 * 6) / 10) * np.repeat([4000, 8000], 16_000 * 3)
    encode_wav(recording, samples.astype(np.int16))
    path = tmp_path / "call.html"
    write_predictions(path, [row | {"recording": str(recording)} for row in rows], **options)
    return path


def page_data(text):
    return json.loads(re.search(r'id="timeline-data">(.*?)</script>', text, re.DOTALL)[1])


def test_page_has_the_data_of_the_rows(tmp_path, rows):
    text = write_page(tmp_path, rows[:4]).read_text()
    data = page_data(text)
    assert data["start"] == [0.0, 1.5, 2.0, 3.9] and data["end"] == [1.2345, 4.0, 3.25, 5.0]
    assert data["text"] == [one_line(row["text"]) for row in rows[:4]]
    assert [data["classes"][it] for it in data["emotion"]] == [it["emotion"] for it in rows[:4]]
    assert data["speakers"] == ["A", "B <b>"] and data["speaker"] == [0, 0, 1, 0]
    # The text expert has no vote in any row, so the page omits it.
    assert data["experts"] == ["speech", "fusion"] and data["gate"] == [[250] * 4, [750] * 4]
    assert data["probabilities"][:3] == [150, 700, 150]
    assert data["duration"] == 6.0 and data["source"] == "./call%20%231.wav"
    # The page loads nothing from a network, and the markup in the second text is escaped.
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|http-equiv", "", text)
    assert "<img" not in text and text.count("</script>") == 3


def test_page_marks_uncertain_emotions(tmp_path, rows):
    assert page_data(write_page(tmp_path, rows[:4]).read_text())["uncertain"] is None
    marked = [row | {"uncertain": index == 2} for index, row in enumerate(rows[:4])]
    data = page_data(write_page(tmp_path, marked).read_text())
    assert data["uncertain"] == [False, False, True, False]
    assert data["classes"] == list(CLASSES)


def test_page_waveform_follows_the_loudness(tmp_path, rows):
    data = page_data(write_page(tmp_path, rows[:4]).read_text())
    low, high = np.frombuffer(base64.b64decode(data["peaks"]), np.int8).reshape(2, -1)
    assert len(low) * data["binSeconds"] == 6.0
    assert high.max() == 127 and abs(high[:299].max() - 64) <= 1 and abs(low[:299].min() + 64) <= 1


def test_long_recordings_have_longer_bins(tmp_path):
    path = tmp_path / "call.wav"
    encode_wav(path, (np.arange(16_000) % 320 - 160).astype(np.int16))
    waveform = waveform_peaks(path, max_bins=30)
    assert len(waveform.low) == 25 and waveform.bin_seconds == 0.04
    assert set(waveform.low) == {-127} and set(waveform.high) == {126}


def test_page_embeds_audio(tmp_path, rows):
    text = write_page(tmp_path, rows[:4], embed_audio=True).read_text()
    encoded = base64.b64decode(re.search(r'id="audio-data">([^<]*)<', text)[1])
    assert "source" not in page_data(text)
    decoded = audio.decode(encoded).samples
    assert abs(len(decoded) / 16_000 - 6) < 0.08
    assert np.abs(decoded[52_000:90_000]).max() > 1.7 * np.abs(decoded[:44_000]).max()


@pytest.mark.parametrize(
    ("channels", "peak", "shown"),
    [
        ("left", 8000, "left channel"),
        ("1", 2000, "channel 1"),
        ("split", 5000, "mix of the channels"),
    ],
)
def test_page_shows_and_embeds_the_predicted_channel(tmp_path, channels, peak, shown):
    tone = 4000 * np.sin(np.arange(16_000) / 10)
    path = tmp_path / "call.wav"
    encode_wav(path, np.stack([2 * tone, tone / 2], axis=1).astype(np.int16))
    rows = [make_row(1, 0, 1, recording=str(path))]
    write_predictions(tmp_path / "a.html", rows, embed_audio=True, channels=channels)
    text = (tmp_path / "a.html").read_text()
    assert page_data(text)["channel"] == shown
    encoded = base64.b64decode(re.search(r'id="audio-data">([^<]*)<', text)[1])
    assert abs(np.abs(audio.decode(encoded).samples[4000:12_000]).max() - peak) < 0.1 * peak


def test_page_without_its_recording(tmp_path, rows):
    missing = [row | {"recording": str(tmp_path / "missing.wav")} for row in rows]
    path = tmp_path / "call.html"
    write_predictions(path, missing)
    data = page_data(path.read_text())
    assert data["peaks"] == "" and data["duration"] == 3662.5
    with pytest.raises(InputError, match=r"missing\.wav: no such file"):
        write_predictions(path, missing, embed_audio=True)


def test_colors_are_different_and_familiar():
    colors = emotion_colors(("joy", "anger", "neutral", "sadness", "x", "y", "fear", "surprise"))
    assert len(set(colors.values())) == 8
    assert colors["neutral"] == emotion_colors(["neutral"])["neutral"]
    assert len(emotion_colors([f"class {number}" for number in range(20)])) == 20


@pytest.mark.parametrize(("shade", "background"), [("light", "#fdfcfa"), ("dark", "#15171b")])
def test_colors_contrast_with_the_background(shade, background):
    def luminance(color):
        channels = np.array([int(color[index : index + 2], 16) for index in (1, 3, 5)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    for color in emotion_colors([f"class {number}" for number in range(8)]).values():
        low, high = sorted(map(luminance, (getattr(color, shade), background)))
        assert (high + 0.05) / (low + 0.05) >= 3


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WALK = """
const out = {errors: window.failures, seen: []};
const find = (id) => document.getElementById(id);
const rows = () => [...document.querySelectorAll("#rows > tr")];
const press = (key) => document.body.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const note = (what) => out.seen.push([what, find("time").textContent,
  rows().findIndex((row) => row.getAttribute("aria-current"))]);
const click = (id, share) => {
  const box = find(id).getBoundingClientRect();
  find(id).dispatchEvent(new MouseEvent(
    "click", {bubbles: true, clientX: box.left + share * box.width, clientY: box.top + 5}));
};
const walk = () => {
  out.title = document.title;
  out.text = rows()[1].querySelector(".words").textContent;
  out.seconds = find("audio").duration;
  out.emotions = rows().map((row) => row.querySelector(".emotion").textContent);
  out.facts = find("facts").textContent;
  note("start");
  press("ArrowDown"); note("down");
  out.verdict = document.querySelector(".verdict").textContent;
  press("ArrowRight"); note("right");
  press("ArrowUp"); note("up");
  click("detail", .76); note("detail");
  click("overview", .51); note("overview");
  out.audio = find("audio").currentTime;
  rows()[0].querySelector("button").click(); note("button");
  find("speaker").value = "1"; find("speaker").dispatchEvent(new Event("change")); note("speaker");
  press("ArrowDown"); note("down of the speaker");
  out.hidden = rows().map((row) => row.hidden);
  out.totals = find("totals").rows[0].textContent;
  const list = find("scroll");
  list.focus();
  out.focused = document.activeElement === list;
  const scroll = new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true, cancelable: true});
  list.dispatchEvent(scroll);
  out.scrolls = !scroll.defaultPrevented;
  press("+"); press("0"); press(" ");
  const pixels = find("detail").getContext("2d").getImageData(0, 0, 300, 100).data;
  out.painted = new Set(pixels).size > 4;
  out.playing = !find("audio").paused;
  out.wide = document.documentElement.scrollWidth > window.innerWidth;
  document.body.innerHTML = "";
  document.body.append(Object.assign(document.createElement("pre"),
    {id: "result", textContent: JSON.stringify(out)}));
};
const wait = (rest) => setTimeout(() =>
  find("audio").readyState > 0 || !rest ? walk() : wait(rest - 1), 50);
wait(80);
"""


@pytest.mark.parity
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("embed_audio", [False, True])
def test_browser_seeks_and_follows(tmp_path, rows, embed_audio):
    rows[1]["uncertain"] = True
    path = write_page(tmp_path, rows[:4], embed_audio=embed_audio)
    # The page's content security policy allows only the page's script, so allow the test's too.
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", path.read_text())
    watch = "window.failures = []; window.onerror = (message) => window.failures.push(message);"
    text = text.replace("<head>", f"<head><script>{watch}</script>", 1)
    path.write_text(text.replace("</body>", f"<script>{WALK}</script></body>"))
    dom = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900",
            "--virtual-time-budget=8000", "--dump-dom", path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout  # fmt: skip
    result = re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    assert result, dom[-2000:]
    outcome = json.loads(html.unescape(result[1]))
    assert outcome["errors"] == []
    assert outcome["text"] == one_line(INJECTION) and outcome["title"] == "call #1.wav: emotions"
    assert outcome["emotions"] == ["joy 70%", "neutral? (uncertain) 70%", "anger 70%", "joy 70%"]
    assert outcome["verdict"] == "neutral? (uncertain)"
    assert "1 uncertain, marked with “?”" in outcome["facts"]
    assert outcome["seen"] == [
        ["start", "0:00.0 / 0:06", 0],
        ["down", "0:01.5 / 0:06", 1],
        ["right", "0:02.0 / 0:06", 2],
        ["up", "0:01.5 / 0:06", 1],
        ["detail", "0:04.5 / 0:06", 3],
        ["overview", "0:03.0 / 0:06", 2],
        ["button", "0:00.0 / 0:06", 0],
        ["speaker", "0:00.0 / 0:06", -1],
        ["down of the speaker", "0:02.0 / 0:06", 2],
    ]
    assert outcome["hidden"] == [True, True, False, True]
    assert outcome["totals"].endswith("0:01.2 (100%)")
    assert outcome["focused"] and outcome["scrolls"]
    assert outcome["painted"] and not outcome["wide"]
    assert abs(outcome["seconds"] - 6) < 0.1 and abs(outcome["audio"] - 3.06) < 0.05
