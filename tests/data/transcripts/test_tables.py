"""Reading STM, CTM, RTTM, CSV and TSV: detection by content, units, channels and recordings."""

import csv
import io

import pytest

from mister_jax.data.transcripts.segments import Segment, Word
from mister_jax.errors import InputError

STM = """;; a comment
call 1 anna 0.5 1.5 <o,f0,female> Hello there.
call 1 inter_segment_gap 1.5 2.0 <o,,unknown> ignore_time_segment_in_scoring
call 2 bert 1.9 2.5 Hi.
"""
CTM = """;; a comment
call A 0.10 0.20 hello 0.98
call A 0.30 0.25 1 0.5
call B 2.00 0.50 bye
"""
RTTM = """SPKR-INFO call 1 <NA> <NA> <NA> unknown anna <NA> <NA>
SPEAKER call 1 0.50 1.00 <NA> <NA> anna <NA> <NA>
SPEAKER call 1 1.25 0.00 <NA> <NA> bert <NA> <NA>
SPEAKER call 1 1.25 2.00 <NA> <NA> <NA> <NA> <NA>
"""


def test_stm_has_speakers_channels_and_categories(read):
    transcript = read("a.txt", STM)
    assert transcript.format == "STM"
    assert transcript.segments == (
        Segment(0.5, 1.5, "Hello there.", "anna", channel=0),
        Segment(1.9, 2.5, "Hi.", "bert", channel=1),
    )
    assert transcript.notes == ("left out 1 segment: ignore_time_segment_in_scoring",)


def test_ctm_has_words(read):
    transcript = read("a.txt", CTM)
    assert transcript.format == "CTM" and transcript.has_text
    assert transcript.segments[1] == Segment(
        0.3, 0.55, "1", channel=0, words=(Word("1", 0.3, 0.55),)
    )
    assert [segment.channel for segment in transcript.segments] == [0, 0, 1]


def test_rttm_has_turns_without_text(read):
    transcript = read("a.txt", RTTM)
    assert transcript.format == "RTTM" and not transcript.has_text
    assert transcript.segments == (Segment(0.5, 1.5, speaker="anna"), Segment(1.25, 3.25))
    assert transcript.notes == ("left out 1 segment: end not after start",)


def test_a_single_channel_is_not_an_index(read):
    assert {s.channel for s in read("a", STM.replace("call 2", "call 1")).segments} == {None}
    assert {s.channel for s in read("a", CTM.replace("call B", "call A")).segments} == {None}


@pytest.mark.parametrize("name", ["10", "left"])
def test_channels_with_other_names_are_not_indices(read, name):
    assert {s.channel for s in read("a", STM.replace("call 2", f"call {name}")).segments} == {None}


def test_the_extension_decides_between_stm_and_ctm_only_if_both_fit(read):
    digits = "call 1 0.5 1.5 2\ncall 1 2.0 3.0 4\n"
    assert read("a.ctm", digits).format == read("a", digits).format == "CTM"
    assert read("a.stm", digits).format == "STM"
    assert read("b.ctm", STM).format == "STM"
    assert read("b.stm", CTM).format == "CTM"


@pytest.mark.parametrize("content", [STM, CTM, RTTM])
def test_a_recording_is_selected(read, content):
    both = content + content.replace("call", "other.wav")
    expected = read("a", content).segments
    assert read("b", both, recording="call").segments == expected
    assert read("b", both, recording="other").segments == expected
    assert read("a", content, recording="differs").segments == expected
    with pytest.raises(
        InputError, match=r"has 2 recordings, and none is named 'x'; .*: call, other"
    ):
        read("b", both, recording="x")
    with pytest.raises(InputError, match="2 recordings; choose one with recording=NAME: call, oth"):
        read("b", both)


def test_rttm_without_turns_is_an_error(read):
    with pytest.raises(InputError, match="no SPEAKER lines"):
        read("a", RTTM.splitlines()[0])
    with pytest.raises(
        InputError, match=r"the line 'SPEAKER call 1 x 1\.00 .*' of this RTTM has no"
    ):
        read("a", RTTM.replace("0.50", "x"))


ROWS = [
    ["anna", "00:00:01,500", "00:00:02,750", 'Say "hi",\nplease', "joy"],
    ["bert", "3.5", "1:04", "Ok", ""],
]


@pytest.mark.parametrize("delimiter", [",", ";", "|"])
@pytest.mark.parametrize(
    "header",
    [
        ["Speaker", "Start", "End", "Text", "Emotion"],
        ["spk", "begin", "stop", "sentence", "label"],
        ["speaker_id", "StartTime", "end_time", "Utterance", "LABEL"],
        ["participant", "onset", "offset (s)", "transcript", "emotion"],
    ],
)
def test_columns_of_csv_have_aliases(read, header, delimiter):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([header, *ROWS])
    transcript = read("a.csv", file.getvalue(), "utf-8-sig")
    assert transcript.format == "CSV"
    assert transcript.segments == (
        Segment(1.5, 2.75, 'Say "hi", please', "anna", label="joy"),
        Segment(3.5, 64.0, "Ok", "bert"),
    )


def test_a_column_with_the_name_of_a_field_is_preferred(read):
    table = (
        "utterance,from,start,stop,end,role,speaker,file,recording,emotion,label,Text\n"
        "u1,8,0,9,1,caller,Ann,b.wav,a.wav,7,joy,Hello.\n"
    )
    assert read("a.csv", table).segments == (Segment(0, 1, "Hello.", "Ann", label="joy"),)
    aliases = table.replace("Text", "Comment").replace(",speaker", ",").replace(",recording", ",")
    assert read("a.csv", aliases).segments == (Segment(0, 1, "u1", "caller", label="joy"),)


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("start,end,utterance,Sentence", "text, 'utterance' and 'Sentence'"),
        ("start,end,Text,text", "text, 'Text' and 'text'"),
        ("start,end,role,spk", "speaker, 'role' and 'spk'"),
        ("begin,end,onset,text", "start, 'begin' and 'onset'"),
        ("start,to,stop,text", "end, 'to' and 'stop'"),
    ],
)
def test_several_columns_for_a_field_are_an_error(read, header, names):
    field = names.partition(",")[0]
    message = f"a.csv: has several columns for the {names}; name exactly one of them '{field}'"
    with pytest.raises(InputError, match=f"{message}$"):
        read("a.csv", f"{header}\n0,1,2,3\n")


def test_units_and_durations(read, times):
    assert times(read("a.csv", "start_ms,dur_ms,text\n500,250,a\n")) == [(0.5, 0.75, "a")]
    assert times(read("a.csv", "start,duration,text\n500,250,a\n")) == [(500, 750, "a")]


def test_times_of_whispers_tsv_are_milliseconds(read, times):
    whisper = 'start\tend\ttext\n0\t2500\t"Hello, he said.\n2500\t4000\t"Bye"\n'
    transcript = read("a.tsv", whisper)
    assert times(transcript) == [(0, 2.5, '"Hello, he said.'), (2.5, 4, "Bye")]
    assert transcript.notes == ("times are milliseconds, as in Whisper's TSV files",)
    seconds = "start\tend\ttext\n0\t3\tHello\n3\t12\tBye\n"
    assert times(read("a.tsv", seconds)) == [(0, 3, "Hello"), (3, 12, "Bye")]
    assert times(read("a.tsv", "start\tend\ttext\n0.0\t250.0\tHello\n")) == [(0, 250, "Hello")]


def test_tables_without_header_have_three_columns(read, times):
    expected = [(0.5, 1.5, "a, b"), (2, 3, "5")]
    assert times(read("a.csv", '"a, b",0.5,1.5\r\n5,2,3\r\n')) == expected
    assert times(read("labels.txt", "0.5\t1.5\ta, b\n2.0\t3.0\t5\n")) == expected


def test_the_column_of_labels_can_be_chosen(read):
    table = "start,end,text,label,Mood\n0,1,a,x,sad\n"
    assert read("a.csv", table).segments[0].label == "x"
    assert read("a.csv", table, label_column="mood").segments[0].label == "sad"
    with pytest.raises(
        InputError, match="no column 'none'; columns: start, end, text, label, Mood"
    ):
        read("a.csv", table, label_column="none")
    with pytest.raises(InputError, match="no header"):
        read("a.csv", "a,0,1\n", label_column="none")
    with pytest.raises(InputError, match=r"SRT has no label columns; leave out --label_column$"):
        read("a.srt", "00:01,000 --> 00:02,000\na", label_column="mood")


def test_rows_without_times_are_left_out_and_wrong_times_are_errors(read):
    transcript = read("a.csv", "start,end,text\n,,a\n0,1,b\n\n1\n")
    assert [segment.text for segment in transcript.segments] == ["b"]
    assert transcript.notes == ("left out 2 segments: without times",)
    with pytest.raises(InputError, match=r"^\S+a\.csv: row 2: start 'soon' is not a time$"):
        read("a.csv", "start,end,text\nsoon,1,a\n")
    with pytest.raises(InputError, match=r"has a segment from nan to 1\.0 s: 'a'"):
        read("a.csv", "start,end,text\nnan,1,a\n")


def test_a_table_without_text_has_no_text(read):
    transcript = read("a.csv", "start,end,speaker\n0,1,x\n")
    assert not transcript.has_text and transcript.segments == (Segment(0, 1, speaker="x"),)


def test_rows_of_a_recording(read):
    table = "file,start,end,text\nd/x.wav,0,1,a\nd/y.wav,0,1,b\n"
    assert [s.text for s in read("a.csv", table, recording="y").segments] == ["b"]
    with pytest.raises(InputError, match="2 recordings; choose one"):
        read("a.csv", table)
