"""Subtitles: every cue with its times, without markup, numbers, identifiers and comments."""

import builtins

import pysubs2
import pytest

from mister_jax.data.transcripts.segments import Word
from mister_jax.errors import InputError, MissingExtraError

SRT = """1
00:00:05,000 --> 00:00:06,000
Later.

2
00:00:01,000 --> 00:00:05,500
Earlier,
overlapping.

3
100:00:00,500 --> 100:00:01,000
Past 99 hours
"""


def test_cues_are_sorted_and_hours_may_exceed_99(read, times):
    transcript = read("a.srt", SRT)
    assert transcript.format == "SRT" and transcript.notes == ()
    assert times(transcript) == [
        (1.0, 5.5, "Earlier, overlapping."),
        (5.0, 6.0, "Later."),
        (360000.5, 360001.0, "Past 99 hours"),
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_newlines_and_encodings_change_nothing(read, encoding, newline):
    text = SRT.replace("Later.", "Später ♥").replace("\n", newline)
    transcript = read("a.srt", text, encoding)
    assert transcript == read("b.srt", SRT.replace("Later.", "Später ♥"))
    assert transcript.segments[1].text == "Später ♥"


def test_text_that_is_not_utf8_is_windows_1252(read):
    transcript = read("a.srt", SRT.replace("Later.", "“Café” 5 €"), "cp1252")
    assert transcript.segments[1].text == "“Café” 5 €"
    assert transcript.notes == (
        "read as Windows-1252 because it is not UTF-8; convert a file in another encoding to UTF-8",
    )


def test_text_in_another_encoding_is_an_error(read):
    content = SRT.replace("Later.", "そう。").encode("shift-jis")
    position = content.index("。".encode("shift-jis"))
    with pytest.raises(
        InputError,
        match=rf"^\S+a\.srt: byte 0x81 at position {position} is neither UTF-8 nor Windows-1252; "
        "convert the file to UTF-8$",
    ):
        read("a.srt", content)


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_the_end_of_the_file_does_not_matter(read, times, end):
    content = "1\n00:00:01,000 --> 00:00:02,000\nOne\n2\n00:00:02,000 --> 00:00:03,000\n2001"
    assert times(read("a.srt", content + end)) == [(1, 2, "One"), (2, 3, "2001")]


def test_numbers_in_texts_are_kept_if_cues_have_no_numbers(read, times):
    content = "00:01,000 --> 00:02,000\nIn\n1999\n\n00:02,000 --> 00:03,000\nB"
    assert times(read("a.srt", content)) == [(1, 2, "In 1999"), (2, 3, "B")]


def test_blank_lines_inside_an_srt_cue_do_not_end_it(read, times):
    content = "1\n00:00:01,000 --> 00:00:02,000\nOne\n\nmore\n\n2\n00:00:02,000 --> 00:00:03,000\nB"
    assert times(read("a.srt", content)) == [(1, 2, "One more"), (2, 3, "B")]


def test_markup_music_and_dashes_are_removed(read, times):
    transcript = read(
        "a.srt",
        """1
00:00:01.0 --> 00:00:02.0  X1:40 X2:600
<font color="#fff"><i>Hello</i></font> {\\an8}&amp; goodbye <b

2
00:00:02,000 --> 00:00:03,000
♪♪

3
00:00:03,000 --> 00:00:04,000
♪ Sing 2 < 3 ♪

4
00:00:04,000 --> 00:00:05,000
- Who?
&gt;&gt; Me - you.

5
00:00:05,000 --> 00:00:06,000
""",
    )
    assert times(transcript) == [
        (1, 2, "Hello & goodbye <b"),
        (3, 4, "Sing 2 < 3"),
        (4, pytest.approx(4 + 4 / 13), "Who?"),
        (pytest.approx(4 + 4 / 13), 5, "Me - you."),
    ]
    assert transcript.notes == ("left out 2 segments: without text",)


def as_srt(*texts):
    return "".join(
        f"{second}\n00:00:{second:02},000 --> 00:00:{second + 1:02},000\n{text}\n\n"
        for second, text in enumerate(texts, start=1)
    )


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        pytest.param(
            ["[SPEAKER_00]: Hello and I", "so [quietly] on.", "[SPEAKER_01]: <i>No</i>: you"],
            [("SPEAKER_00", "Hello and I"), (None, "so [quietly] on."), ("SPEAKER_01", "No: you")],
            id="whisperx",
        ),
        pytest.param(
            ["ANN: Hello:", ">> DR. LEE (on phone): Look,", "it is 5:30.", "- Who?", "Ann: Me."],
            [
                ("ANN", "Hello:"),
                ("DR. LEE (on phone)", "Look,"),
                ("DR. LEE (on phone)", "it is 5:30."),
                (None, "Who?"),
                ("ANN", "Me."),
            ],
            id="names",
        ),
        pytest.param(
            ["Ann: Hello\nthere.\nBo: Hi."], [(None, "Ann: Hello there. Bo: Hi.")], id="one name"
        ),
        pytest.param(
            ["小明\uff1a你好", "小明\uff1a再见。", "J.R. Smith: <font\ncolor='red'>Hi.</font>"],
            [("小明", "你好"), ("小明", "再见。"), ("J.R. Smith", "Hi.")],
            id="names in other scripts",
        ),
        pytest.param(
            ["-Who?\n-Me.", "He came home\n\u2013 late as always \u2013", "-5 degrees.\n>>Cold."],
            [
                (None, "Who?"),
                (None, "Me."),
                (None, "He came home late as always \u2013"),
                (None, "-5 degrees."),
                (None, "Cold."),
            ],
            id="dashes",
        ),
        pytest.param(
            ["Remember: stay.", "Yes.", "But why?", "Rule one: run."],
            [(None, text) for text in ("Remember: stay.", "Yes.", "But why?", "Rule one: run.")],
            id="colons as names",
        ),
    ],
)
def test_speakers_are_read_from_prefixes(read, texts, expected):
    transcript = read("a.srt", as_srt(*texts))
    assert [(it.speaker, it.text) for it in transcript.segments] == expected


def test_impossible_times_are_left_out_or_clipped(read, times):
    content = "".join(
        f"{number}\n{start} --> {end}\ntext {number}\n\n"
        for number, (start, end) in enumerate(
            [
                ("00:00:03,000", "00:00:02,000"),
                ("00:00:04,000", "00:00:04,000"),
                ("-00:00:01,000", "00:00:00,500"),
                ("-00:00:02,000", "-00:00:01,000"),
            ],
            1,
        )
    )
    transcript = read("a.srt", content)
    assert times(transcript) == [(0, 0.5, "text 3")]
    assert transcript.notes == (
        "segments that start before 0 start at 0",
        "left out 2 segments: end not after start",
        "left out 1 segment: before the beginning of the recording",
    )


WEBVTT = """WEBVTT - A title

STYLE
::cue { color: red }

REGION
id:top

NOTE 00:00:00.000 --> 00:00:01.000
a comment

intro
00:01.000 --> 00:02.500 line:0 position:50%
<v.loud Mary &amp; Jo>Hi</v> <c.red>there</c>
second line

NOTE one line

1:00:00.000 --> 1:00:01.000
<v A>One.</v>
<v B>Two.

NOTE
1:00:01.000 --> 1:00:02.000
Commented out

100:00:00.000 --> 100:00:01.000
Late"""


def test_webvtt_has_voices_settings_and_comments(read):
    transcript = read("a.vtt", WEBVTT)
    assert transcript.format == "WebVTT" and transcript.notes == ()
    assert [(s.start, s.end, s.text, s.speaker) for s in transcript.segments] == [
        (1, 2.5, "Hi there second line", "Mary & Jo"),
        (3600, 3600.5, "One.", "A"),
        (3600.5, 3601, "Two.", "B"),
        (360000, 360001, "Late", None),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<v A>No!\n<v B><i>No, no!!!</i>", [(1, 2, "No!", "A"), (2, 5, "No, no!!!", "B")]),
        ("Ah. <v A>Why<v B>♪", [(1, 3, "Ah.", None), (3, 5, "Why", "A")]),
        ("<v A>♪<v B>", []),
        ("<v A>a <00:02.000>b<v B>c", [(1, 4, "a b", "A"), (4, 5, "c", "B")]),
        ("<v A>a <00:02.000>b", [(1, 5, "a b", "A")]),
    ],
)
def test_the_time_of_a_cue_is_divided_among_its_voices(read, text, expected):
    content = f"WEBVTT\n\n00:01.000 --> 00:05.000\n{text}\n\n00:09.000 --> 00:10.000\nLast"
    *segments, last = read("a.vtt", content).segments
    assert [(it.start, it.end, it.text, it.speaker) for it in segments] == expected
    assert last.text == "Last"
    assert sum(len(it.words) for it in segments) == (2 if text.endswith("b") else 0)


def test_captions_that_roll_up_are_not_repeated(read, times):
    transcript = read(
        "a.vtt",
        """WEBVTT
Kind: captions

00:00:00.160 --> 00:00:02.550 align:start
\x20
well<00:00:00.480><c> hello</c>

00:00:02.550 --> 00:00:02.560 align:start
well hello
\x20

00:00:02.560 --> 00:00:05.000 align:start
well hello
hello<00:00:02.800><c> you</c>

00:00:05.000 --> 00:00:06.000 align:start
hello you
[Music]
""",
    )
    assert times(transcript) == [
        (0.16, 2.55, "well hello"),
        (2.56, 5.0, "hello you"),
        (5, 6, "[Music]"),
    ]
    assert transcript.segments[0].words == (Word("well", 0.16, 0.48), Word("hello", 0.48, 2.55))
    assert transcript.notes == ("left out 1 segment: repeats the text above",)


ASS = """[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,20

[Events]
Format: Start, End, Name, Text
Comment: 0:00:00.00,0:00:01.00,Anna,not spoken
Dialogue: 0:00:01.00,0:00:02.50,Anna,{\\i1}Hi,{\\i0} you\\Nthere\\hnow{a comment}
Dialogue: 0:00:01.00,0:00:02.50,Anna,{\\b1}Hi,{\\b0} you\\Nthere\\hnow
Dialogue: 0:00:01.00,0:00:02.50,,{\\p1}m 0 0 l 100 100{\\p0}
Dialogue: 100:00:00.00,100:00:01.00,,Late"""


def test_captions_that_stay_on_the_screen_end_where_the_next_begins(read, times):
    starts = (0, 2, 5, 7, 9, 20)
    cues = [f"00:00:{start:02} --> 00:00:{start + 4:02}\nwords at {start}\n" for start in starts]
    transcript = read("a.srt", "\n".join(cues))
    ends = (2, 5, 7, 9, 13, 24)
    expected = [(a, b, f"words at {a}") for a, b in zip(starts, ends, strict=True)]
    assert times(transcript) == expected
    assert transcript.notes == ("captions that roll up end where the next caption begins",)
    # Speakers, or a caption inside another, show that people talk at the same time.
    inside = [*cues[:4], "00:00:07.500 --> 00:00:08\nyes\n", *cues[5:]]
    named = [cue.replace("words", f"{'AB'[n % 2]}: words") for n, cue in enumerate(cues)]
    for other in (inside, named, cues[:4]):
        assert read("a.srt", "\n".join(other)).notes == ()


def test_ass_has_names_and_its_own_order_of_fields(read):
    transcript = read("a.ass", ASS.replace("{a comment}", ""))
    assert transcript.format == "ASS"
    assert [(s.start, s.end, s.text, s.speaker) for s in transcript.segments] == [
        (1, 2.5, "Hi, you there now", "Anna"),
        (360000, 360001, "Late", None),
    ]
    assert transcript.notes == ("left out 1 segment: drawing",)


def test_a_damaged_event_is_an_error(read):
    with pytest.raises(InputError, match=r"a\.ass: the event 'Dialogue: x,y.*cannot be read$"):
        read("a.ass", ASS + "\nDialogue: x,y,,z")


@pytest.mark.parametrize("name", ["srt", "vtt", "ass", "ssa", "ttml"])
def test_what_pysubs2_writes_is_read(tmp_path, read, times, name):
    subtitles = pysubs2.SSAFile()
    texts = [(500, 1500, "One, two"), (1200, 2010, r"{\i1}Three{\i0}\Nfour"), (5000, 6000, "Fünf.")]
    for start, end, text in texts:
        subtitles.append(pysubs2.SSAEvent(start=start, end=end, text=text))
    expected = [(0.5, 1.5, "One, two"), (1.2, 2.01, "Three four"), (5, 6, "Fünf.")]
    assert times(read(f"a.{name}", subtitles.to_string(name))) == expected


def test_sami_is_read(read, times):
    content = (
        "<SAMI><BODY><SYNC Start=1000><P Class=EN>Hello<br>you</P></SYNC>"
        "<SYNC Start=2000><P Class=EN>&nbsp;</P></SYNC></BODY></SAMI>"
    )
    assert times(read("a.smi", content)) == [(1, 2, "Hello you")]


def as_ttml(*attributes):
    paragraphs = "".join(f"<p {value}>a <span>b</span></p>" for value in attributes)
    return f'<tt xmlns="http://www.w3.org/ns/ttml"><body><div>{paragraphs}</div></body></tt>'


def test_ttml_has_ends_or_durations(read, times):
    content = as_ttml(
        'begin="1s" dur="2s"', 'begin="00:00:03.5" dur="00:00:01"', 'begin="5s" end="5500ms"'
    )
    assert times(read("a.ttml", content)) == [(1, 3, "a b"), (3.5, 4.5, "a b"), (5, 5.5, "a b")]


@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        ('begin="9t" end="99t"', r"pysubs2 cannot read this TTML \(.*9t\)"),
        ('begin="1s" dur="15000000t"', r"pysubs2 cannot read this TTML \(.*15000000t\)"),
        ('begin="00:00:06:12" end="9s"', r"pysubs2 cannot read this TTML \(.*00:00:06:12\)"),
        ('begin="1s"', "the paragraph 'a b' of this TTML has no end"),
    ],
)
def test_other_times_of_ttml_are_an_error(read, attributes, problem):
    needed = "needed: begin, and end or dur, as hh:mm:ss.fff, or as a number and h, m, s or ms"
    with pytest.raises(InputError, match=rf"^\S+a\.ttml: {problem}; {needed}$"):
        read("a.ttml", as_ttml(attributes))


def test_only_formats_that_need_pysubs2_ask_for_it(read, monkeypatch):
    real_import = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "pysubs2":
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    assert read("a.srt", SRT) and read("a.vtt", WEBVTT)
    with pytest.raises(
        MissingExtraError, match=r'pysubs2; .* pip install "mister_jax\[predict\]"$'
    ):
        read("a.ass", ASS)
