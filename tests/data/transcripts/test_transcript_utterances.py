"""Utterances: sentences joined over segments of a speaker, and split where words have times."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mister_jax.data.transcripts.parsing import Notes
from mister_jax.data.transcripts.segments import Segment, Word
from mister_jax.data.transcripts.utterances import UtteranceRules, ends_sentence, make_utterances
from mister_jax.errors import InputError

RULES = UtteranceRules()


def segment(start, end, text, speaker=None, **fields):
    return Segment(start, end, text, speaker, **fields)


def timed(text, start=0.0, step=1.0, **fields):
    """Returns a segment whose words last `step` seconds each."""
    words = tuple(
        Word(word, start + step * index, start + step * (index + 1))
        for index, word in enumerate(text.split())
    )
    return Segment(start, words[-1].end, text, words=words, **fields)


def summary(utterances):
    return [(u.start, u.end, u.text) for u in utterances]


def texts(*segments, **rules):
    return [u.text for u in make_utterances(segments, UtteranceRules(**rules))]


def test_cues_of_a_sentence_are_joined():
    utterances = make_utterances(
        [segment(0, 1, "I thought"), segment(1.5, 2, "you knew."), segment(2, 3, "No.")]
    )
    assert summary(utterances) == [(0, 2, "I thought you knew."), (2, 3, "No.")]


def test_pauses_lengths_labels_channels_and_speakers_separate():
    first, second = segment(0, 1, "a"), segment(1.5, 2, "b")
    assert texts(first, second) == ["a b"]
    assert texts(first, second, join_gap=0.4) == ["a", "b"]
    assert texts(first, second, utterance_seconds=1.9) == ["a", "b"]
    for change in ({"label": "joy"}, {"channel": 1}, {"speaker": "x"}, {"text": ""}):
        changed = dataclasses.replace(second, **change)
        assert len(make_utterances([first, changed])) == 2
        assert len(make_utterances([dataclasses.replace(first, **change), second])) == 2
    both = [dataclasses.replace(part, label="joy") for part in (first, second)]
    assert make_utterances(both) == (Segment(0, 2, "a b", label="joy"),)


def test_a_speaker_may_go_on_after_another():
    utterances = make_utterances(
        [
            segment(0, 2, "I was going to", "a"),
            segment(1.5, 2.2, "Yes.", "b"),
            segment(2.1, 3, "say it.", "a"),
        ]
    )
    assert summary(utterances) == [(0, 3, "I was going to say it."), (1.5, 2.2, "Yes.")]


def test_overlapping_segments_of_a_speaker_keep_the_later_end():
    utterances = make_utterances([segment(0, 5, "a long", "x"), segment(1, 3, "sentence.", "x")])
    assert summary(utterances) == [(0, 5, "a long sentence.")]


def test_overlapping_segments_of_unknown_speakers_are_separate():
    rows = [(0.5, 4, "Hello I was"), (1, 2, "no way"), (2, 6, "going home")]
    assert summary(make_utterances([segment(*row) for row in rows])) == rows
    rows = [(0.5, 4, "Hello I was"), (3.5, 3.9, "no way"), (4, 6, "going home")]
    assert summary(make_utterances([segment(*row) for row in rows])) == [
        (0.5, 6, "Hello I was going home"), (3.5, 3.9, "no way")
    ]  # fmt: skip
    # Times in hundredths of a second, or of video frames, are rounded.
    assert texts(segment(0, 1.04, "a"), segment(1, 2, "b")) == ["a b"]
    assert texts(segment(0, 1.06, "a"), segment(1, 2, "b")) == ["a", "b"]


def test_no_segments_are_joined_if_the_gap_is_zero():
    parts = [segment(start, start + 1.5, "a", "x") for start in (0, 1.5, 2.5, 5)]
    assert len(make_utterances(parts, UtteranceRules(join_gap=0))) == 4
    assert texts(*parts, join_gap=0.01) == ["a a a", "a"]
    assert texts(*parts, join_gap=1) == ["a a a", "a"]
    assert texts(*parts, join_gap=1.01) == ["a a a a"]


def test_joined_segments_are_counted():
    notes = Notes()
    make_utterances([segment(0, 1, "a."), segment(1, 2, "b.")], notes=notes)
    assert notes.messages() == ()
    parts = ["a", "b", "c.", "d", "e.", "f."]
    make_utterances([segment(n, n + 1, text) for n, text in enumerate(parts)], notes=notes)
    assert notes.messages() == ("5 segments are joined into 2 utterances; --join_gap=0 joins none",)
    notes = Notes()
    make_utterances([timed("Yes. I am"), timed("here. Good.", 3.0)], notes=notes)
    assert "2 segments are joined into 1 utterance;" in notes.messages()[0]


@pytest.mark.parametrize(
    ("text", "following", "ends"),
    [
        ("So.", "And", True),
        ("So", "and", False),
        ("So,", "And", False),
        ("So!", "and", True),
        ("So?!", "And", True),
        ('He said "so."', "And", True),
        ("(Laughs.)", "And", True),
        ('"Stop!"', "he said.", False),
        ("I asked Mr.", "Smith", False),
        ("by J.", "Smith", False),
        ("the U.S.", "Army", False),
        ("So do I.", "And", True),
        ("No.", "And", True),
        ("and so on, etc.", "But", True),
        ("and so on, etc.", "but", False),
        ("I think...", "that it", False),
        ("I think…", "...that it", False),
        ("I think...", "Well", True),
        ("本当。", "はい", True),
        ("本当？」", "はい", True),  # noqa: RUF001
        ("कैसे हो।", "ठीक", True),
        ("کیا؟", "جی", True),
        ("It costs 3.5", "euros", False),
        ("...", "", True),
        ("", "And", False),
    ],
)
def test_ends_of_sentences(text, following, ends):
    assert ends_sentence(text, following, RULES) == ends


def test_segments_are_split_at_sentences_with_word_times():
    utterances = make_utterances([timed('He said "yes." Then 3.5 came. Mr. Smith left?', 10.0)])
    assert summary(utterances) == [
        (10, 13, 'He said "yes."'),
        (13, 16, "Then 3.5 came."),
        (16, 19, "Mr. Smith left?"),
    ]
    assert [word.text for word in utterances[1].words] == ["Then", "3.5", "came."]


def test_words_may_differ_from_the_text_in_punctuation_and_lack_times():
    words = (Word("hello", 0, 1), Word("you"), Word("how", 2, 3), Word("are", 3, 4), Word("you"))
    utterances = make_utterances([Segment(0, 5, "Hello, you! How are you?", words=words)])
    assert summary(utterances) == [(0, 2, "Hello, you!"), (2, 5, "How are you?")]


def test_splits_leave_no_short_parts():
    parts = timed("Oh. I see it. No.", step=0.2)
    assert texts(parts) == ["Oh. I see it. No."]
    assert texts(parts, min_seconds=0.1) == ["Oh.", "I see it.", "No."]


def test_the_rest_of_a_split_sentence_is_joined_with_the_next_segment():
    utterances = make_utterances([timed("Yes. I am"), timed("here. Good.", 3.0)])
    assert [u.text for u in utterances] == ["Yes.", "I am here.", "Good."]
    assert [word.text for word in utterances[1].words] == ["I", "am", "here."]


def test_texts_without_spaces_are_split_and_joined():
    words = tuple(Word(c, i, i + 1) for i, c in enumerate("本当はい今"))
    utterances = make_utterances(
        [Segment(0, 5, "本当。はい今", words=words), Segment(5, 6, "日。")]
    )
    assert summary(utterances) == [(0, 2, "本当。"), (2, 6, "はい今日。")]


def test_segments_without_word_times_are_split_only_if_they_are_long():
    text = "A b c d. E f g h. I j k l. "
    assert texts(segment(0, 20, text.strip())) == [text.strip()]
    utterances = make_utterances([segment(0, 27, text)])
    assert summary(utterances) == [(0, 18, "A b c d. E f g h."), (18, 27, "I j k l.")]
    assert texts(segment(0, 60, "No end of a sentence")) == ["No end of a sentence"]
    assert make_utterances([segment(0, 60, "")]) == (segment(0, 60, ""),)


def test_long_sentences_are_split_at_their_longest_pauses():
    first, second = timed("one (two three", step=4.0), timed("four five) six", 13.0, step=4.0)
    whole = Segment(0, 25, "one (two three four five) six", words=first.words + second.words)
    utterances = make_utterances([whole])
    assert summary(utterances) == [(0, 12, "one (two three"), (13, 25, "four five) six")]
    even = make_utterances([timed("a b c d e f", step=4.0)])
    assert summary(even) == [(0, 12, "a b c"), (12, 24, "d e f")]


def test_rules_are_checked():
    for name in ("join_gap", "utterance_seconds", "min_seconds"):
        for value in (-1, float("nan"), float("inf")):
            with pytest.raises(InputError, match=f"{name}=.*; allowed: finite, 0 or more seconds"):
                UtteranceRules(**{name: value})
    with pytest.raises(InputError, match=r"min_seconds=3 is not below utterance_seconds=2"):
        UtteranceRules(min_seconds=3, utterance_seconds=2)


WORDS = st.sampled_from(["a", "Bc", "d.", "...", "Mr.", '"E!"', "本。", "–", "f?"])  # noqa: RUF001
TIMES = st.floats(0, 30).map(lambda value: round(value, 2))


@st.composite
def segments(draw):
    start, length = draw(TIMES), draw(st.floats(0.01, 50))
    texts_of_words = draw(st.lists(WORDS, max_size=8))
    words = ()
    if draw(st.booleans()):
        times = [draw(st.none() | TIMES) for _ in texts_of_words]
        words = tuple(Word(t, s, s and s + 0.5) for t, s in zip(texts_of_words, times, strict=True))
    speaker = draw(st.sampled_from([None, "x"]))
    return Segment(start, start + length, " ".join(texts_of_words), speaker, words=words)


@settings(deadline=None, max_examples=300)
@given(st.lists(segments(), max_size=5))
def test_no_text_is_lost_and_times_stay_in_order(parts):
    utterances = make_utterances(parts)
    letters = sorted("".join(part.text for part in parts).replace(" ", ""))
    assert sorted("".join(u.text for u in utterances).replace(" ", "")) == letters
    assert all(u.end > u.start for u in utterances)
    assert all(a.start <= b.start for a, b in itertools.pairwise(utterances))
    assert all(min(p.start for p in parts) <= u.start for u in utterances)
    assert all(max(p.end for p in parts) >= u.end for u in utterances)
