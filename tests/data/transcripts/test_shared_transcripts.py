"""Real transcripts beside the repository, compared with values read from the raw files by hand."""

import pathlib

import pytest

from mister_jax.data.transcripts.reader import find_transcript, read_transcript
from mister_jax.data.transcripts.utterances import make_utterances
from mister_jax.errors import InputError

SHARED = pathlib.Path(__file__).parents[4] / "shared" / "real"

pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared recordings")

QUESTION = "Dis-moi, est-ce que l'avion vole ?"
MARY = (4, 0.31542, 1.518254, "mary", "barrel")
WHISPER = "transcripts/whisper/punctuations.mp3"  # codespell:ignore punctuations
# File, options, format, number of segments, first start, last end, first and last text.
FILES = [
    ("conversation/pyannote_sample.rttm", {}, "RTTM", 10, 6.69, 30.0, "", ""),
    ("conversation/ami_debug.test.rttm", {"recording": "tst00"}, "RTTM", 22, 0, 30.0, "", ""),
    ("conversation/ami_debug.test.rttm", {"recording": "tst01"}, "RTTM", 5, 4.39, 29.456, "", ""),
    (
        *("conversation/pyannote_sample.stm", {}, "STM", 13, 6.68, 29.987, "Hello?"),
        "Oh, I don't hear that in New Jersey now.",
    ),
    (
        *("transcripts/aws/pca_testfile.json", {}, "Amazon post-call analytics JSON", 12),
        *(0.04, 28.96, "MM.", None),
    ),
    (
        *("transcripts/chat/batchalign_support_test.json", {}, "batchalign JSON", 13, 0.14, 24.04),
        *("hello.", "thank you very much."),
    ),
    (
        *("transcripts/chat/test.cha", {}, "CHAT", 13, 0.125, 25.835),
        *("Hello.", "thank you very much."),
    ),
    (
        *("transcripts/eaf/abui_1.eaf", {}, "ELAN EAF", 1, 0.29, 1.91),
        *("amakaang di kaai hada muila",) * 2,
    ),
    (
        *("transcripts/eaf/abui_2.eaf", {}, "ELAN EAF", 1, 0.89, 2.96),
        *("dining ayoku kamar mia mui muila",) * 2,
    ),
    (
        "transcripts/google/web-scale_tr_google_standard.json",
        *({}, "Google Speech-to-Text JSON", 31, 0, 324.3, None, None),
    ),
    (
        "transcripts/google/web-scale_tr_google_standard.json.rttm",
        *({}, "RTTM", 29, 0.3, 324.3, "", ""),
    ),
    (
        *("transcripts/textgrid/bobby_phones.TextGrid", {}, "Praat TextGrid", 13),
        *(0.064691, 1.117148, "B", "ER0"),
    ),
    (
        *("transcripts/textgrid/bobby_words.TextGrid", {"tier": "word"}, "Praat TextGrid", 4),
        *(0.064691, 1.117148, "BOBBY", "LEDGER"),
    ),
    (
        *("transcripts/textgrid/bobby_words.TextGrid", {"tier": "phrase"}, "Praat TextGrid", 1),
        *(0.064691, 1.117148, "BOBBY RIPPED THE LEDGER", "BOBBY RIPPED THE LEDGER"),
    ),
    ("transcripts/textgrid/mary.TextGrid", {"tier": "word"}, "Praat TextGrid", *MARY),
    ("transcripts/textgrid/mary_longfile.TextGrid", {"tier": "word"}, "Praat TextGrid", *MARY),
    *(
        (f"{WHISPER}.{suffix}", {}, name, 1, 0.38, 2.76, QUESTION, QUESTION)
        for suffix, name in (("csv", "CSV"), ("srt", "SRT"), ("tsv", "TSV"), ("vtt", "WebVTT"))
    ),
    *(
        (f"{WHISPER}.words.{suffix}", {}, name, 5, 0.38, 2.76, "Dis-moi,", "vole ?")
        for suffix, name in (("csv", "CSV"), ("srt", "SRT"), ("tsv", "TSV"), ("vtt", "WebVTT"))
    ),
    (
        *("transcripts/whisper/radio_short.mp3.words.json", {}, "Whisper JSON", 11, 30.88, 93.08),
        *("Le plus important au poker ce ne sont pas les cartes, c'est ce que vous en faites.",),
        "...",
    ),
]


@pytest.mark.parametrize("expected", FILES, ids=lambda case: f"{case[0]} {case[1]}")
def test_real_files_are_read(expected):
    path, options, name, count, start, end, first, last = expected
    transcript = read_transcript(SHARED / path, **options)
    segments = transcript.segments
    assert (transcript.format, len(segments)) == (name, count)
    assert (segments[0].start, max(segment.end for segment in segments)) == (start, end)
    assert first is None or segments[0].text == first
    assert last is None or segments[-1].text == last
    for segment in segments:
        times = [(word.start, word.end) for word in segment.words if word.end is not None]
        assert all(segment.start <= start < end <= segment.end + 0.01 for start, end in times)


def test_tiers_and_recordings_must_be_chosen():
    folder = SHARED / "transcripts/textgrid"
    for name, tiers in (("bobby_words", r"word \(4\), phrase \(1\)"), ("mary", r"phone \(14\)")):
        with pytest.raises(InputError, match=f"choose one with --tier=NAME; tiers: {tiers}"):
            read_transcript(folder / f"{name}.TextGrid")
    with pytest.raises(InputError, match="choose one with recording=NAME: tst00, tst01"):
        read_transcript(SHARED / "conversation/ami_debug.test.rttm")


def test_a_text_without_times_is_no_transcript():
    with pytest.raises(InputError, match=r"text that begins .Dis-moi"):
        read_transcript(SHARED / f"{WHISPER}.txt")


def test_googles_turns_are_those_of_its_rttm():
    path = SHARED / "transcripts/google/web-scale_tr_google_standard.json"
    turns = read_transcript(f"{path}.rttm").segments
    segments = read_transcript(path).segments
    assert sum(len(segment.words) for segment in segments) == 711
    for segment in segments[1:]:
        (turn,) = [t for t in turns if t.start - 0.01 <= segment.start < t.end - 0.01]
        assert f"S{segment.speaker}" == turn.speaker and segment.end <= turn.end + 0.01


@pytest.mark.parametrize(
    ("recording", "transcript"),
    [
        ("conversation/pyannote_sample.wav", "pyannote_sample.stm"),
        ("conversation/ami_tst00.wav", None),
        ("transcripts/chat/batchalign_support_test.mp3", "batchalign_support_test.json"),
        ("transcripts/eaf/abui_1.wav", "abui_1.eaf"),
        ("transcripts/textgrid/mary.wav", "mary.TextGrid"),
        ("transcripts/textgrid/bobby.wav", None),
        (WHISPER, "punctuations.mp3.vtt"),  # codespell:ignore punctuations
        ("transcripts/whisper/radio_short.mp3", "radio_short.mp3.words.json"),
    ],
)
def test_transcripts_are_found_beside_recordings(recording, transcript):
    path = find_transcript(SHARED / recording)
    assert (path and path.name) == transcript


def test_words_become_one_utterance():
    segments = read_transcript(SHARED / f"{WHISPER}.words.vtt").segments
    (utterance,) = make_utterances(segments)
    assert (utterance.start, utterance.end, utterance.text) == (0.38, 2.76, QUESTION)
