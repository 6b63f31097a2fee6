"""TextGrid, EAF and CHAT: tiers, labels, times of parent annotations, and text without codes."""

import pytest

from mister_jax.data.transcripts.annotations import clean_chat
from mister_jax.data.transcripts.segments import Segment, Word
from mister_jax.errors import InputError

LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 5
tiers? <exists>
size = 4
item []:
    item [1]:
        class = "IntervalTier"
        name = "anna ""A"" (1)"
        xmin = 0
        xmax = 5
        intervals: size = 4
        intervals [1]:
            xmin = 0 ! a comment with "quotes" and 7
            xmax = 1.5
            text = "say ""hi"" item [2]: xmin = 3 ! done"
        intervals [2]:
            xmin = 1.5
            xmax = 2
            text = ""
        intervals [3]:
            xmin = 2
            xmax = 3
            text = "two
lines"
        intervals [4]:
            xmin = 3
            xmax = 5
            text = " "
    item [2]:
        class = "TextTier"
        name = "points"
        xmin = 0
        xmax = 5
        points: size = 1
        points [1]:
            number = 1
            mark = "x"
    item [3]:
        class = "IntervalTier"
        name = "empty"
        xmin = 0
        xmax = 5
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 5
            text = ""
    item [4]:
        class = "IntervalTier"
        name = "emotion"
        xmin = 0
        xmax = 5
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.75
            text = "joy"
        intervals [2]:
            xmin = 0.8
            xmax = 2.4
            text = "anger"
        intervals [3]:
            xmin = 2.4
            xmax = 5
            text = ""
"""
SHORT = """File type = "ooTextFile short"
"TextGrid"

0
5
<exists>
1
"IntervalTier"
"anna ""A"" (1)"
0
5
2
0
1.5
"say ""hi"" item [2]: xmin = 3 ! done"
2
3
"two lines"
"""
ANNA = [(0, 1.5, 'say "hi" item [2]: xmin = 3 ! done'), (2, 3, "two lines")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_both_forms_of_textgrids_are_read(read, times, newline, encoding):
    mark = "\ufeff" if encoding.startswith("utf-16") else ""
    for content, options in ((LONG, {"tier": 'anna "A" (1)'}), (SHORT, {})):
        text = mark + content.replace("\n", newline)
        transcript = read("a.txt", text, encoding, **options)
        assert transcript.format == "Praat TextGrid" and transcript.notes == ()
        assert times(transcript) == ANNA
        assert {segment.speaker for segment in transcript.segments} == {None}


def test_several_tiers_need_a_choice(read):
    with pytest.raises(InputError) as raised:
        read("a.TextGrid", LONG)
    assert str(raised.value).endswith(
        "a.TextGrid: has several tiers; choose one with --tier=NAME; tiers: "
        'anna "A" (1) (2), empty (0), '
        "emotion (2); tiers of points, which have no length: points"
    )
    with pytest.raises(InputError, match="no tier of intervals named 'points'; tiers: anna"):
        read("a.TextGrid", LONG, tier="points")
    with pytest.raises(InputError, match=r"no intervals with text in its tiers; tiers: anna"):
        read("a.TextGrid", LONG, tier="empty")
    with pytest.raises(InputError, match="SRT has no tiers; leave out --tier"):
        read("a.srt", "00:01,000 --> 00:02,000\na", tier="a")


def test_tiers_of_several_speakers_are_read_together(read):
    segments = read("a.TextGrid", LONG, tier='anna "A" (1), emotion').segments
    assert [(segment.start, segment.speaker) for segment in segments] == [
        (0, 'anna "A" (1)'),
        (0, "emotion"),
        (0.8, "emotion"),
        (2, 'anna "A" (1)'),
    ]


def test_a_label_covers_half_of_its_segment(read):
    transcript = read("a.TextGrid", LONG, label_tier="emotion")
    assert [segment.label for segment in transcript.segments] == ["joy", None]
    content = LONG.replace("0.75", "0.74").replace("0.8", "0.74")
    transcript = read("a.TextGrid", content, label_tier="emotion")
    assert [segment.label for segment in transcript.segments] == ["anger", None]
    with pytest.raises(InputError, match="no tier of intervals named 'mood'"):
        read("a.TextGrid", LONG, label_tier="mood")


def test_a_cut_textgrid_is_an_error(read):
    with pytest.raises(InputError, match=r"ends before its last interval$"):
        read("a.TextGrid", SHORT[:-12])


@pytest.mark.parametrize("form", ["short_textgrid", "long_textgrid"])
def test_what_praatio_writes_is_read(tmp_path, times, form):
    textgrid = pytest.importorskip("praatio.textgrid")
    from mister_jax.data.transcripts.reader import read_transcript

    entries = [(0.5, 1.25, 'Say "hi".'), (2, 3.1, "ə̃ Grüße")]
    grid = textgrid.Textgrid()
    grid.addTier(textgrid.IntervalTier("words", entries, 0, 4))
    grid.addTier(textgrid.PointTier("pitch", [(1, "120")], 0, 4))
    grid.save(str(tmp_path / "a.TextGrid"), form, includeBlankSpaces=True)
    assert times(read_transcript(tmp_path / "a.TextGrid")) == entries


EAF = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT AUTHOR="" FORMAT="3.0" VERSION="3.0">
<HEADER MEDIA_FILE="" TIME_UNITS="milliseconds"/>
<TIME_ORDER>
<TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="1000"/>
<TIME_SLOT TIME_SLOT_ID="ts2"/>
<TIME_SLOT TIME_SLOT_ID="ts3"/>
<TIME_SLOT TIME_SLOT_ID="ts4" TIME_VALUE="4000"/>
<TIME_SLOT TIME_SLOT_ID="ts5"/>
<TIME_SLOT TIME_SLOT_ID="ts6" TIME_VALUE="9000"/>
</TIME_ORDER>
<TIER TIER_ID="translation" LINGUISTIC_TYPE_REF="t" PARENT_REF="anna" PARTICIPANT="Anna">
<ANNOTATION>
<REF_ANNOTATION ANNOTATION_ID="r1" ANNOTATION_REF="a1">
<ANNOTATION_VALUE>Hallo</ANNOTATION_VALUE></REF_ANNOTATION>
</ANNOTATION>
<ANNOTATION>
<REF_ANNOTATION ANNOTATION_ID="r2" ANNOTATION_REF="a2">
<ANNOTATION_VALUE>das</ANNOTATION_VALUE></REF_ANNOTATION>
</ANNOTATION>
<ANNOTATION>
<REF_ANNOTATION ANNOTATION_ID="r3" ANNOTATION_REF="a2" PREVIOUS_ANNOTATION="r2">
<ANNOTATION_VALUE>hier</ANNOTATION_VALUE></REF_ANNOTATION>
</ANNOTATION>
</TIER>
<TIER TIER_ID="anna" LINGUISTIC_TYPE_REF="t" PARTICIPANT="Anna">
<ANNOTATION>
<ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts2">
<ANNOTATION_VALUE>Hello</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION>
</ANNOTATION>
<ANNOTATION>
<ALIGNABLE_ANNOTATION ANNOTATION_ID="a2" TIME_SLOT_REF1="ts2" TIME_SLOT_REF2="ts3">
<ANNOTATION_VALUE>this is</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION>
</ANNOTATION>
<ANNOTATION>
<ALIGNABLE_ANNOTATION ANNOTATION_ID="a3" TIME_SLOT_REF1="ts3" TIME_SLOT_REF2="ts4">
<ANNOTATION_VALUE></ANNOTATION_VALUE></ALIGNABLE_ANNOTATION>
</ANNOTATION>
<ANNOTATION>
<ALIGNABLE_ANNOTATION ANNOTATION_ID="a4" TIME_SLOT_REF1="ts5" TIME_SLOT_REF2="ts6">
<ANNOTATION_VALUE>lost</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION>
</ANNOTATION>
</TIER>
<TIER TIER_ID="empty" LINGUISTIC_TYPE_REF="t"/>
</ANNOTATION_DOCUMENT>
"""


def test_time_slots_without_value_are_interpolated(read):
    transcript = read("a.eaf", EAF, tier="anna")
    assert transcript.format == "ELAN EAF"
    assert transcript.segments == (
        Segment(1, 2, "Hello", "Anna"),
        Segment(2, 3, "this is", "Anna"),
    )
    assert transcript.notes == ("left out 1 segment: without times, in tier anna",)


def test_references_take_the_times_of_their_parents(read, times):
    transcript = read("a.eaf", EAF, tier="translation")
    assert times(transcript) == [(1, 2, "Hallo"), (2, 2.5, "das"), (2.5, 3, "hier")]


def test_the_only_tier_with_text_needs_no_name(read, times):
    content = EAF.replace("<ANNOTATION_VALUE>Hallo", "<ANNOTATION_VALUE>")
    for word in ("das", "hier"):
        content = content.replace(word + "</ANNOTATION_VALUE></REF", "</ANNOTATION_VALUE></REF")
    assert times(read("a.eaf", content)) == [(1, 2, "Hello"), (2, 3, "this is")]
    with pytest.raises(InputError, match=r"several tiers; .* translation \(3\), anna \(2\), empty"):
        read("a.eaf", EAF)


def test_children_share_interpolated_time_slots(read, times):
    child = (
        '<TIER TIER_ID="words"><ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="w1" '
        'TIME_SLOT_REF1="ts2" TIME_SLOT_REF2="ts9"><ANNOTATION_VALUE>this</ANNOTATION_VALUE>'
        "</ALIGNABLE_ANNOTATION></ANNOTATION><ANNOTATION><ALIGNABLE_ANNOTATION "
        'ANNOTATION_ID="w2" TIME_SLOT_REF1="ts9" TIME_SLOT_REF2="ts3"><ANNOTATION_VALUE>is'
        "</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION></TIER>"
    )
    content = EAF.replace("</ANNOTATION_DOCUMENT>", child + "</ANNOTATION_DOCUMENT>")
    assert times(read("a.eaf", content, tier="words")) == [(2, 2.5, "this"), (2.5, 3, "is")]


def test_damaged_xml_is_an_error(read):
    with pytest.raises(InputError, match=r"the time slot 'soon' of this EAF is not a number"):
        read("a.eaf", EAF.replace('"4000"', '"soon"'))
    with pytest.raises(InputError, match=r"this EAF is not XML "):
        read("a.eaf", EAF[:900])


def test_what_pympi_writes_is_read(tmp_path):
    elan = pytest.importorskip("pympi.Elan")
    from mister_jax.data.transcripts.reader import read_transcript

    eaf = elan.Eaf()
    for tier in ("anna", "emotion"):
        eaf.add_tier(tier, part=tier.title())
    eaf.add_annotation("anna", 500, 1250, "Grüße & <b>")
    eaf.add_annotation("emotion", 0, 1000, "joy")
    eaf.to_file(str(tmp_path / "a.eaf"))
    transcript = read_transcript(tmp_path / "a.eaf", tier="anna", label_tier="emotion")
    assert transcript.segments == (Segment(0.5, 1.25, "Grüße & <b>", "Anna", label="joy"),)


CHAT = """@UTF8
@Begin
@Languages:\teng
@Participants:\tCHI Target_Child, DAD Father
*CHI:\t<I want> [/] I want to [>] go &=laughs home xxx . \x15100_1500\x15
%wor:\tI \x15100_200\x15 want \x15200_300\x15 .
%emo:\tjoy
*DAD:\tyou ⌈can't⌉ have [<] it (.) ‡ the(m) gonna [: going to] wug@n [* s:r]
\tlong line +... \x151600_2500\x15
*CHI:\tno bullet here .
%emo:\tsad
*DAD:\t&=coughs . \x152500_2600\x15
*DAD:\txxx . \x15%snd:"a b"_2600_2700\x15
*CHI:\t+" first part \x152700_3000\x15 second part +/. \x153000_3500\x15
*CHI:\tbackwards . \x153600_3600\x15
@End
"""


def test_chat_is_read_without_codes(read):
    transcript = read("a.cha", CHAT, label_tier="emo")
    assert transcript.format == "CHAT"
    words = (Word("I", 0.1, 0.2), Word("want", 0.2, 0.3))
    assert transcript.segments == (
        Segment(0.1, 1.5, "I want I want to go home.", "CHI", words=words, label="joy"),
        Segment(1.6, 2.5, "you can't have it, them gonna wug long line...", "DAD"),
        Segment(2.6, 2.7, "", "DAD"),
        Segment(2.7, 3.5, "first part second part.", "CHI"),
    )
    assert transcript.notes == (
        "left out 1 segment: without times",
        "left out 1 segment: without words",
        "left out 1 segment: end not after start",
    )


def test_chat_has_speakers_and_no_tiers(read):
    segments = read("a.cha", CHAT, speaker="CHI").segments
    assert [segment.start for segment in segments] == [0.1, 2.7]
    with pytest.raises(InputError, match=r"'BOB'; speakers: CHI \(2\), DAD \(2\)"):
        read("a.cha", CHAT, speaker="BOB")
    with pytest.raises(InputError, match=r"no tier '%mood'; tiers: %wor \(1\), %emo \(2\)"):
        read("a.cha", CHAT, label_tier="mood")
    with pytest.raises(InputError, match="CHAT has no tiers; leave out --tier"):
        read("a.cha", CHAT, tier="CHI")


@pytest.mark.parametrize(
    ("coded", "text"),
    [
        ("Hello .", "Hello."),
        ("what's [x 3] that [= a toy] ?", "what's that?"),
        ("&-um &+fr &~gaga &*DAD:hi friend !", "um friend!"),
        ("(be)cause I 0am [*] here .", "because I here."),
        ("ba:nana no: rhi^no ice+cream New_York .", "banana no rhino icecream New York."),
        ("is it +..?", "is it...?"),
        ('he said +"/.', "he said."),
        ("+, and then +//?", "and then?"),
        ("+< yes (..) (1.5) yes .", "yes yes."),
        ("∆fast∆ °soft° ⌊2 what⌋ ↑up", "fast soft 2 what up"),
        ("0 [=! whining] .", ""),
        ("0 .", ""),
        ("[- spa] sí , mamá .", "sí, mamá."),
        ("yyy www xxxx ok .", "xxxx ok."),
    ],
)  # fmt: skip
def test_codes_of_chat(coded, text):
    assert clean_chat(coded) == text
