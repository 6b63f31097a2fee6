"""`predict_recording`: from one recording to the emotions of its utterances."""

import json
import logging
import tracemalloc
import types
import wave

import av
import faster_whisper
import numpy as np
import pytest

from mister_jax.console import prediction_table
from mister_jax.data import audio
from mister_jax.data.audio import encode_wav
from mister_jax.data.audio_source import AudioError
from mister_jax.data.transcripts.reader import (
    find_transcript,
    is_transcript_of,
    read_annotation,
    read_transcript,
)
from mister_jax.data.transcripts.segments import Segment, Word
from mister_jax.data.transcripts.utterances import UtteranceRules
from mister_jax.errors import InputError
from mister_jax.inference import recognizer as recognizer_module
from mister_jax.inference import speech_recognition
from mister_jax.inference.prediction_files import write_predictions
from mister_jax.inference.recordings import find_utterances, list_recordings
from mister_jax.inference.speech_recognition import recognize_speech
from mister_jax.inference.timeline.waveform import waveform_peaks
from tests.helpers.commands import run_commands
from tests.helpers.predictions import assert_predictions_close
from tests.helpers.speech import synthesize_speech

RATE = audio.SAMPLE_RATE
TURNS = [(0.5, 1.2, "so happy."), (1.5, 2.25, "we are mad."), (2.0, 2.8, "glad today.")]


def voice(seconds: float, hertz: float, seed: int = 0) -> np.ndarray:
    """Returns a harmonic sound with a little noise, [S] int16."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(size=len(time))
    sound = sum(np.sin(2 * np.pi * hertz * order * time) / order for order in (1, 2, 3))
    return (3000 * sound + 200 * noise).astype(np.int16)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.int16)


@pytest.fixture
def recording(tmp_path):
    """A recording of 3 s."""
    path = tmp_path / "call.wav"
    encode_wav(path, voice(3.0, 150))
    return path


@pytest.fixture
def srt(recording):
    """The transcript `TURNS` beside the recording."""
    path = recording.with_suffix(".srt")
    cues = (
        f"{number}\n00:00:0{start:.3f} --> 00:00:0{end:.3f}\n{text}\n"
        for number, (start, end, text) in enumerate(TURNS, start=1)
    )
    path.write_text("\n".join(cues).replace(".", ",").replace("y,", "y.").replace("d,", "d."))
    return path


def loud_segments(samples):
    """A speech recognizer that transcribes each loud part, with one time per word."""
    is_loud = np.abs(samples).reshape(-1, RATE // 10).max(axis=1) > 0.05
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_loud, [0]]))) / 10
    return [
        Segment(start, end, "so mad", words=(Word("so", start), Word("mad", None, end)))
        for start, end in edges.reshape(-1, 2)
    ]


def test_predictions_equal_those_of_the_cuts_and_texts(recognizer, recording, srt):
    rows = recognizer.predict_recording(recording)
    assert [(row["start"], row["end"], row["text"]) for row in rows] == TURNS
    assert [row["utterance"] for row in rows] == ["1", "2", "3"]
    assert {row["recording"] for row in rows} == {str(recording)}
    assert set(rows[0]) >= {"speaker", "label", "emotion", "probabilities", "experts", "gate"}
    expected = recognizer.predict(
        [
            {"audio": recording, "audio_start": start, "audio_end": end, "text": text}
            for start, end, text in TURNS
        ]
    )
    assert_predictions_close(rows, expected)


def test_the_transcript_beside_a_recording_can_be_ignored(recording, srt):
    found = find_utterances(recording)
    assert found.origin == f"transcript {srt} (SRT)"
    found = find_utterances(recording, search_transcript=False, recognizer=loud_segments)
    assert found.origin == "speech recognition"
    assert [(it.start, it.end, it.text) for it in found.segments] == [(0.0, 3.0, "so mad")]


def test_joined_segments_are_noted(recording, srt):
    assert find_utterances(recording).notes == ()
    srt.write_text(srt.read_text().replace("happy.", "happy,"))
    found = find_utterances(recording)
    assert [it.text for it in found.segments] == ["so happy, we are mad.", "glad today."]
    assert found.notes == ("2 segments are joined into 1 utterance; --join_gap=0 joins none",)
    assert len(find_utterances(recording, rules=UtteranceRules(join_gap=0)).segments) == 3


@pytest.mark.parametrize("has_text", [True, False])
@pytest.mark.parametrize("ending", ["csv", "srt", "vtt", "eaf", "TextGrid"])
def test_an_output_beside_the_recording_is_not_taken_for_a_transcript(
    recognizer, recording, srt, ending, has_text, caplog
):
    rows = recognizer.predict_recording(recording)
    srt.unlink()
    if not has_text:
        rows = [{**row, "text": ""} for row in rows]
    output = recording.with_suffix(f".{ending}")
    write_predictions(output, rows)
    # A TextGrid with texts looks like an annotation.
    expected = output if ending == "TextGrid" and has_text else None
    assert find_transcript(recording) == expected
    assert not is_transcript_of(output, recording)
    is_ambiguous = ending == "srt" or (ending == "TextGrid" and not has_text)
    assert ("if it is a transcript, pass its path" in caplog.text) == is_ambiguous


def test_a_written_csv_is_read_as_a_transcript(recognizer, recording, srt, tmp_path):
    rows = recognizer.predict_recording(recording)
    write_predictions(tmp_path / "out.csv", rows)
    segments = read_transcript(tmp_path / "out.csv").segments
    assert [(it.start, it.end, it.text, it.speaker) for it in segments] == [
        (*turn, None) for turn in TURNS
    ]


@pytest.mark.parametrize("speakers", [("Ann", "Bo"), ("Ann", None), ("Ann", "Ann 2")])
@pytest.mark.parametrize("ending", ["eaf", "TextGrid"])
def test_the_texts_of_a_written_annotation_are_read_without_naming_tiers(
    recognizer, recording, srt, tmp_path, ending, speakers
):
    rows = recognizer.predict_recording(recording)
    for index, row in enumerate(rows):
        row["speaker"] = speakers[index % 2]
    write_predictions(tmp_path / f"out.{ending}", rows)
    with pytest.raises(InputError, match="several tiers"):
        read_transcript(tmp_path / f"out.{ending}")
    segments = read_transcript(tmp_path / f"out.{ending}", ignore_emotion_tiers=True).segments
    assert [(it.start, it.end, it.text) for it in segments] == [
        (row["start"], row["end"], row["text"]) for row in rows
    ]
    # Without a speaker, the name of the tier is "text".
    assert [it.speaker for it in segments] == [row["speaker"] or "text" for row in rows]


def test_segments_of_other_programs_are_used(recognizer, recording):
    segments = [Segment(start, end, text) for start, end, text in TURNS]
    rows = recognizer.predict_recording(recording, transcript=segments[::-1])
    assert [(row["start"], row["end"], row["text"]) for row in rows] == TURNS


def test_split_channels_equal_each_channel_alone(recognizer, tmp_path):
    left = np.concatenate([silence(0.5), voice(1.0, 120), silence(1.5), voice(0.5, 130)])
    right = np.concatenate([silence(1.7), voice(1.0, 230), silence(0.8)])
    encode_wav(tmp_path / "stereo.wav", np.stack([left, right], axis=1))
    encode_wav(tmp_path / "left.wav", left)
    encode_wav(tmp_path / "right.wav", right)
    options = {"recognizer": loud_segments}
    found = find_utterances(tmp_path / "stereo.wav", channels="split", **options)
    assert [(it.start, it.speaker) for it in found.segments] == [
        (0.5, "left"),
        (1.7, "right"),
        (3.0, "left"),
    ]
    rows = recognizer.predict_utterances(found)
    alone = [
        {"audio": tmp_path / f"{it.speaker}.wav", "audio_start": it.start, "audio_end": it.end}
        | {"text": it.text}
        for it in found.segments
    ]
    assert_predictions_close(rows, recognizer.predict(alone))
    mixed = recognizer.predict_recording(tmp_path / "stereo.wav", **options)
    assert [row["speaker"] for row in mixed] == [None] * len(mixed)


def test_speakers_of_a_transcript_get_the_channel_in_which_they_are_loudest(tmp_path):
    left = np.concatenate([voice(1.0, 120), silence(1.0), voice(1.0, 120)])
    right = np.concatenate([silence(1.0), voice(1.0, 230), silence(1.0)])
    encode_wav(tmp_path / "stereo.wav", np.stack([left, right], axis=1))
    segments = [
        Segment(0, 1, "so.", "Ann"),
        Segment(1, 2, "mad.", "Bob"),
        Segment(2, 3, "we.", "Ann"),
    ]
    found = find_utterances(tmp_path / "stereo.wav", transcript=segments, channels="split")
    assert [(it.speaker, it.channel) for it in found.segments] == [
        ("Ann", 0),
        ("Bob", 1),
        ("Ann", 0),
    ]


def test_segments_of_pieces_have_the_times_of_the_recording(tmp_path, monkeypatch):
    monkeypatch.setattr(speech_recognition, "_PIECE_SECONDS", 4.0)
    monkeypatch.setattr(speech_recognition, "_SEARCH_SECONDS", 2.0)
    path = tmp_path / "long.wav"
    encode_wav(path, np.tile(np.concatenate([voice(0.9, 150), silence(0.6)]), 10))
    lengths = []

    def recognizer(samples):
        lengths.append(len(samples) / RATE)
        padded = np.pad(samples, (0, -len(samples) % (RATE // 10)))
        return loud_segments(padded)

    speech = recognize_speech(path, recognizer)
    assert len(lengths) > 3 and max(lengths) <= 4
    assert speech.seconds == pytest.approx(15) == sum(lengths)
    assert len(speech.segments) == 10, "no segment is cut at the end of a piece"
    for number, segment in enumerate(speech.segments):
        assert segment.start == pytest.approx(1.5 * number, abs=0.11)
        assert segment.end == pytest.approx(1.5 * number + 0.9, abs=0.11)
        assert segment.words[0].start == segment.start and segment.words[1].end == segment.end


def test_long_conversations_are_predicted_in_overlapping_sections(
    recognizer, recording, monkeypatch
):
    segments = [
        Segment(0.05 * n, 0.05 * n + 0.04, "so mad and glad."[: 3 + n % 9]) for n in range(50)
    ]

    def predict(segments):
        rules = UtteranceRules(join_gap=0.0)
        rows = recognizer.predict_recording(recording, transcript=segments, rules=rules)
        assert [row["text"] for row in rows] == [it.text for it in segments]
        return rows

    monkeypatch.setattr(recognizer_module, "MAX_CONTEXT", 16)
    rows = predict(segments)
    assert_predictions_close(rows[:4], predict(segments[:12])[:4])
    window = predict(segments[4:20])
    assert_predictions_close(rows[8:16], window[4:12])
    dialogue = [
        {"audio": recording, "audio_start": it.start, "audio_end": it.end, "text": it.text}
        for it in segments
    ]
    assert_predictions_close(recognizer.predict(dialogue), rows)


def test_memory_does_not_grow_with_the_length_of_speech(recognizer, recording, srt, monkeypatch):
    expected = recognizer.predict_recording(recording)
    monkeypatch.setattr(recognizer_module, "_GROUP_SECONDS", 1.0)
    assert_predictions_close(recognizer.predict_recording(recording), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transcript": "missing.srt"}, "missing.srt"),
        ({"transcript": []}, "no segments"),
        ({"transcript": [Segment(5, 6, "a"), Segment(7, 8, "b")]}, "transcript of this recording"),
        ({"recognizer": lambda samples: []}, "no speech found by speech recognition"),
        ({"recognizer": lambda samples: [Segment(0, float("nan"))]}, "needed: finite times"),
        ({"channels": "split"}, "one channel; needed for --channels=split"),
        ({"channels": "center"}, "allowed: mix, left, right"),
        ({"channels": "right"}, "number of channels in .*is 1"),
        ({"transcript": [Segment(2, 1, "a")]}, "the end after the start"),
        ({"transcript": [Segment(float("nan"), 1, "a")]}, "needed: finite times"),
        ({"tier": "words", "recognizer": loud_segments}, "has no transcript"),
    ],
)
def test_unusable_transcripts_and_channels_are_one_line(recognizer, recording, options, message):
    with pytest.raises(InputError, match=message) as error:
        recognizer.predict_recording(recording, **options)
    assert "\n" not in str(error.value)


def test_a_missing_recording_and_one_without_audio_are_one_line(recognizer, tmp_path):
    (tmp_path / "text.mp3").write_text("no sound")
    for name in ("missing.mp3", "text.mp3"):
        with pytest.raises(AudioError, match=name):
            recognizer.predict_recording(tmp_path / name)


def test_times_that_do_not_fit_are_noted_and_kept(recognizer, recording):
    segments = [
        Segment(0, 1, "so " * 20 + "mad."),
        Segment(2, 5, "glad."),
        Segment(2.5, 2.9, "so."),
    ]
    rows = recognizer.predict_recording(recording, transcript=segments)
    first, second, third = (row["notes"] for row in rows)
    assert "64 characters in 1.0 s" in first[0]
    assert "ends 2.0 s after the recording" in second[0]
    assert third == []


def test_the_note_on_fast_text_states_the_limit_of_its_script(recording):
    found = find_utterances(recording, transcript=[Segment(0, 1, "我们今天要去北京" * 2)])
    assert "16 characters in 1.0 s; speech has at most 13 per second" in found.segment_notes[0][0]


def test_voice_activity_is_found_offline(recognizer, tmp_path):
    path = tmp_path / "call.wav"
    encode_wav(
        path,
        np.concatenate(
            [silence(0.5), synthesize_speech(2.0), silence(1.0), synthesize_speech(1.5)]
        ),
    )
    rows = recognizer.predict_recording(path, recognizer=speech_recognition.detect_voice_activity)
    times = [(row["start"], row["end"]) for row in rows]
    np.testing.assert_allclose(times, [(0.5, 2.5), (3.5, 5.0)], atol=0.3)
    assert [row["text"] for row in rows] == ["", ""]
    assert all(row["experts"]["speech"] and not row["experts"]["text"] for row in rows)


class PocketSphinx:
    """A recognizer from another package, whose wheel includes an English model."""

    def __init__(self):
        self._decoder = pytest.importorskip("pocketsphinx").Decoder(samprate=RATE, loglevel="FATAL")

    def __call__(self, samples):
        self._decoder.start_utt()
        pcm = np.rint(32767 * samples).astype("<i2")
        self._decoder.process_raw(pcm.tobytes(), full_utt=True)
        self._decoder.end_utt()
        words = [
            Word(it.word.partition("(")[0], it.start_frame / 100, (it.end_frame + 1) / 100)
            for it in self._decoder.seg()
            if it.word[0] not in "<["
        ]
        text = " ".join(word.text for word in words)
        return [Segment(words[0].start, words[-1].end, text, words=tuple(words))] if words else []


def test_a_recognizer_of_another_package_can_be_used(recognizer, tmp_path):
    path = tmp_path / "call.wav"
    encode_wav(path, np.concatenate([silence(0.5), synthesize_speech(2.0), silence(0.5)]))
    rows = recognizer.predict_recording(path, recognizer=PocketSphinx())
    assert rows and all(row["text"] for row in rows)
    assert 0 <= rows[0]["start"] < rows[-1]["end"] <= 3
    assert all(row["experts"]["text"] and row["experts"]["fusion"] for row in rows)


def test_a_truncated_recording_is_used_with_its_transcript(tmp_path):
    path = tmp_path / "call.wav"
    encode_wav(path, voice(6.0, 150))
    path.write_bytes(path.read_bytes()[: 2 * 2 * RATE])
    segments = [Segment(start, start + 0.5, "so mad.") for start in range(6)]
    found = find_utterances(path, transcript=segments)
    assert len(found.segments) == 6
    assert "the recording ends at 2.0 s" in found.notes[0]
    assert [bool(notes) for notes in found.segment_notes] == [False] * 2 + [True] * 4


def test_a_recording_without_stated_length_is_not_reported_to_end_early(tmp_path):
    path = tmp_path / "call.flac"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(voice(3.0, 150)[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = bytearray(path.read_bytes())
    # The number of samples, 36 bits, is 0 in a file that FFmpeg writes to a pipe.
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert audio.container_seconds(path) is None
    assert find_utterances(path, transcript=[Segment(0.5, 2.9, "so mad.")]).notes == ()


def test_a_segment_shorter_than_a_millisecond_has_a_length(recognizer, recording, tmp_path):
    rows = recognizer.predict_recording(recording, transcript=[Segment(1.0, 1.0003, "mad.")])
    assert rows[0]["end"] > rows[0]["start"]
    write_predictions(tmp_path / "call.srt", rows)


def test_channels_of_segments_are_kept_and_loud_channels_do_not_win(tmp_path):
    left = np.concatenate([voice(1.0, 120), voice(1.0, 120) // 4])
    right = np.concatenate([voice(1.0, 230) // 40, voice(1.0, 230) // 10])
    encode_wav(tmp_path / "stereo.wav", np.stack([left, right], axis=1))
    segments = [Segment(0, 1, "so.", "Ann"), Segment(1, 2, "mad.", "Bob")]
    found = find_utterances(tmp_path / "stereo.wav", transcript=segments, channels="split")
    assert [it.channel for it in found.segments] == [0, 1]
    segments = [Segment(0, 1, "so.", "Ann", channel="right")]
    found = find_utterances(tmp_path / "stereo.wav", transcript=segments, channels="split")
    assert [it.channel for it in found.segments] == [1]


def conversation(*turns, crosstalk):
    """Returns stereo samples of the turns, with crosstalk between the channels."""
    channels = np.zeros((max(round(end * RATE) for _, end, *_ in turns), 2))
    for start, end, channel, loudness in turns:
        sound = loudness * voice(end - start, 120 if channel == 0 else 190).astype(float)
        channels[round(start * RATE) : round(end * RATE), channel] += sound
    return (channels + crosstalk * channels[:, ::-1]).astype(np.int16)


@pytest.mark.parametrize(
    "turns",
    [
        # Both speakers, sometimes at the same time; one of them speaks longer.
        [(0, 1, 0, 1), (1, 2, 1, 1), (2, 3, 0, 1), (2.5, 3.5, 1, 1), (4, 9, 0, 1)],
        # One speaker is quieter than the crosstalk of the other speaker.
        [(0, 2, 0, 1), (2, 4, 1, 0.2)],
        # All turns are in one channel, and the other channel has only crosstalk.
        [(0, 1, 1, 1), (1, 2, 1, 1)],
        [(0, 1, 0, 1), (1, 2, 0, 1)],
    ],
)
@pytest.mark.parametrize("has_speakers", [True, False])
def test_crosstalk_does_not_change_the_channels_of_speakers(tmp_path, turns, has_speakers):
    path = tmp_path / "stereo.wav"
    encode_wav(path, conversation(*turns, crosstalk=0.3))
    if not has_speakers:  # Without speakers, the channels of overlapping turns are unclear.
        turns = [turn for turn in turns if turn[:2] not in ((2, 3), (2.5, 3.5))]
    segments = [
        Segment(start, end, "so mad.", f"speaker {channel}" if has_speakers else None)
        for start, end, channel, _ in turns
    ]
    found = find_utterances(path, transcript=segments, channels="split")
    assert [it.channel for it in found.segments] == [channel for _, _, channel, _ in turns]


def test_long_recordings_are_read_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(speech_recognition, "_PIECE_SECONDS", 60.0)
    minutes = 20
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        for minute in range(minutes):
            file.writeframes(voice(60.0, 100 + minute).tobytes())
    pieces = []

    def recognizer(samples):
        pieces.append(len(samples))
        return [Segment(0.0, 1.0, "so mad.")]

    segments = [Segment(second, second + 1.0, "so.") for second in range(0, 60 * minutes, 2)]
    tracemalloc.start()
    try:
        find_utterances(path, recognizer=recognizer)
        find_utterances(path, transcript=[*segments, Segment(60 * minutes, 60 * minutes + 9)])
        waveform_peaks(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(pieces) == minutes * 60 * RATE and len(pieces) >= minutes
    assert peak < 22e6, "the samples are 38 MB"


def test_an_unknown_language_is_an_error_without_a_checkpoint_too(monkeypatch):
    monkeypatch.setattr(faster_whisper, "WhisperModel", FakeWhisperModel)
    with pytest.raises(InputError, match="language 'xx'; allowed: de, en"):
        speech_recognition.load_recognizer(None, "xx")


def test_the_good_part_of_a_damaged_recording_is_used(tmp_path):
    path = tmp_path / "broken.wav"
    encode_wav(path, np.concatenate([voice(2.0, 150), silence(0.5)]))
    path.write_bytes(path.read_bytes()[:-20_000])
    found = find_utterances(path, recognizer=lambda samples: [Segment(0.1, 1.5)])
    assert [(it.start, it.end) for it in found.segments] == [(0.1, 1.5)]
    assert any("damaged" in note for note in found.notes)


def test_missing_audio_is_noted_without_a_transcript(monkeypatch):
    samples = np.concatenate([voice(2.0, 150), silence(0.5)])
    blocks = [
        audio.Clip(samples, 2.5),
        audio.Clip(samples, 2.5, notes=("1.0 s missing",)),
        audio.Clip(samples, 2.5, damaged=True, notes=("1.0 s missing",)),
    ]
    monkeypatch.setattr(audio, "stream_blocks", lambda *_: iter(blocks))
    monkeypatch.setattr(audio, "container_seconds", lambda _: None)
    speech = recognize_speech("call.webm", loud_segments)
    assert speech.notes == (
        "2 to 5 s: 1.0 s missing",
        "damaged somewhere between 5 and 8 s; only speech that could be decoded is used",
    )


def test_only_transcripts_of_a_recording_are_protected(recording, srt):
    other, missing = recording.with_name("other.srt"), recording.with_suffix(".vtt")
    other.write_text(srt.read_text())
    assert is_transcript_of(srt, recording)
    assert not any(is_transcript_of(path, recording) for path in (other, missing))


def test_a_folder_stands_for_its_recordings(tmp_path):
    with pytest.raises(InputError, match="no recordings"):
        list_recordings([tmp_path])
    for name in ("b.WAV", "a.mp4", "notes.txt", "a.srt"):
        (tmp_path / name).touch()
    assert list_recordings([tmp_path]) == [str(tmp_path / "a.mp4"), str(tmp_path / "b.WAV")]
    with pytest.raises(InputError, match="given twice"):
        list_recordings([tmp_path / "a.mp4", tmp_path])
    with pytest.raises(InputError, match="given twice"):
        list_recordings([tmp_path / "a.mp4", f"{tmp_path}/./a.mp4"])


def test_a_checkpoint_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded") as error:
        speech_recognition.load_recognizer(tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message and "model.bin" in message and "\n" not in message


def test_without_weights_utterances_come_from_voice_activity(monkeypatch, caplog):
    def fail(*_args, **_options):
        raise OSError("no network")

    monkeypatch.setattr(faster_whisper, "WhisperModel", fail)
    speech_recognition._load_default.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            recognizer = speech_recognition.load_recognizer(None)
            assert recognizer is speech_recognition.detect_voice_activity
    speech_recognition._load_default.cache_clear()
    assert caplog.text.count("no network") == 1, "not loaded again for the second recording"


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """A folder with recordings, transcripts and an annotation of two tiers."""
    folder = tmp_path_factory.mktemp("calls")
    for name in ("first", "second"):
        encode_wav(folder / f"{name}.wav", synthesize_speech(2.0))
    (folder / "first.srt").write_text(
        "1\n00:00:00,250 --> 00:00:00,900\nso mad.\n\n2\n00:00:01,000 --> 00:00:01,800\nglad!\n"
    )
    (folder / "late.srt").write_text("1\n00:01:00,000 --> 00:01:01,000\nso mad.\n")
    (folder / "empty").mkdir()
    (folder / "rows.jsonl").write_text(
        '{"dialogue": 1, "utterance": 1, "order": 1, "text": "glad"}\n'
    )
    encode_wav(folder / "silence.flac", np.zeros(16_000, np.int16))
    tiers = "".join(
        f'"IntervalTier"\n"{name}"\n0\n2\n1\n0\n2\n"mad"\n' for name in ("words", "phones")
    )
    grid = f'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n2\n<exists>\n2\n{tiers}'
    (folder / "two.TextGrid").write_text(grid)
    return folder


OUTPUTS = ("jsonl", "csv", "srt", "vtt", "TextGrid", "eaf", "html")
GOOD_COMMANDS = {
    "one recording in every format": (
        ["--recording=first.wav", *(f"--output=out/one.{ending}" for ending in OUTPUTS)],
        "first.wav: utterances 2 from transcript",
    ),
    "an annotation": (
        [
            *("--recording=first.wav", "--transcript=two.TextGrid", "--tier=words"),
            *("--output=out/two.eaf", "--output=out/{name}.TextGrid"),
        ],
        "first.wav: utterances 1 from transcript",
    ),
    "a folder": (
        [
            *("--recording=both", "--no_text", "--output=out/all.csv"),
            "--output=out/{name}.vtt",
        ],
        "written to out/all.csv: utterances",
    ),
}
BAD_COMMANDS = {
    ("--recording=first.wav", "--transcript=late.srt"): "needed: the transcript of this recording",
    ("--recording=silence.flac", "--no_text"): "no speech found by voice activity detection",
    ("--recording=first.wav", "--transcript=first.wav"): "first.wav: ",
    ("--recording=first.wav", "--transcript=two.TextGrid"): "tiers: words (1), phones (1)",
    ("--recording=empty",): "empty: no recordings; needed: files with extension",
    ("--recording=first.wav", "--audio=first.wav"): "--recording excludes --audio",
    ("--audio=first.wav", "--transcript=first.srt"): "--transcript: needs --recording",
    ("--recording=both", "--transcript=first.srt"): "--transcript with 2 recordings",
    ("--recording=both", "--output=one.html"): "{name} in the name for a file per recording",
    ("--recording=first.wav", "--output=one.doc"): "output with extension .doc; allowed: .jsonl",
    ("--recording=first.wav", "--recognizer=nowhere", "--nosearch_transcript"): "cannot be loaded",
    ("--recording=first.wav", "--channels=split"): "one channel; needed for --channels=split",
    ("--recording=first.wav", "--output=first.srt"): "--output=first.srt: would replace",
    ("--recording=first.wav", "--no_text", "--output={name}.srt"): "would replace a transcript of",
    ("--manifest=rows.jsonl", "--output=./rows.jsonl"): "would replace --manifest",
    ("--text=glad", "--output=one.srt"): "one.srt: needs --recording; allowed without it: .jsonl",
    ("--recording=first.wav", "--output=first.wav.srt", "--channels=9"): "first.wav is 1",
    ("--recording=first.wav", "--audio_channel=left"): "cannot be used with --recording",
    ("--audio=first.wav", "--channels=left"): "--channels: needs --recording",
    ("--recording=first.wav", "--no_text", "--transcript=first.srt"): "--no_text: cannot be used",
    ("--recording=first.wav", "--no_text", "--language=en"): "--no_text: cannot be used",
    ("--recording=first.wav", "--embed_audio", "--output=one.csv"): "--embed_audio: needs",
}


@pytest.fixture(scope="module")
def results(calls, workdir):
    """The result of each command, by its name in `GOOD_COMMANDS` or its flags in `BAD_COMMANDS`."""
    (calls / "both").mkdir()
    for name in ("first.wav", "first.srt", "second.wav"):
        (calls / "both" / name).write_bytes((calls / name).read_bytes())
    names = [*GOOD_COMMANDS, *BAD_COMMANDS]
    flags = [*(flags for flags, _ in GOOD_COMMANDS.values()), *BAD_COMMANDS]
    commands = [["predict", f"--model={workdir}", *command] for command in flags]
    good = run_commands(commands[: len(GOOD_COMMANDS)], calls, working_directory=calls)
    before = contents(calls)
    bad = run_commands(commands[len(GOOD_COMMANDS) :], calls, working_directory=calls)
    assert contents(calls) == before, "bad commands write nothing"
    return dict(zip(names, [*good, *bad], strict=True))


def contents(folder):
    """Returns the content of each file, by path."""
    return {
        path.relative_to(folder): path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", GOOD_COMMANDS)
def test_the_command_writes_every_output(results, calls, name):
    _, message = GOOD_COMMANDS[name]
    assert results[name].status == 0, results[name].stderr
    assert message in results[name].stdout
    rows = [json.loads(line) for line in (calls / "out" / "one.jsonl").read_text().splitlines()]
    assert [(row["start"], row["end"]) for row in rows] == [(0.25, 0.9), (1.0, 1.8)]
    for ending in OUTPUTS:
        text = (calls / "out" / f"one.{ending}").read_text()
        assert "so mad." in text and rows[0]["emotion"] in text, ending
    tiers = ["words", "phones", "emotion"]
    for file in ("two.eaf", "first.TextGrid"):
        assert [tier.name for tier in read_annotation(calls / "out" / file).tiers] == tiers
    assert (calls / "out" / "first.vtt").exists() and (calls / "out" / "second.vtt").exists()
    table = (calls / "out" / "all.csv").read_text()
    assert "both/first.wav" in table and "both/second.wav" in table


@pytest.mark.parametrize("flags", BAD_COMMANDS)
def test_a_wrong_use_is_one_line_and_writes_nothing(results, flags):
    result = results[flags]
    assert result.status == 2, result.stdout
    assert BAD_COMMANDS[flags] in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


class FakeWhisperModel:
    """Stands in for `faster_whisper.WhisperModel`, whose weights are not available offline."""

    supported_languages = ("de", "en")

    def __init__(self, model, **options):
        self.calls = []

    def transcribe(self, samples, **options):
        assert samples.dtype == np.float32 and np.abs(samples).max() <= 1
        assert options["word_timestamps"] and options["vad_filter"]
        self.calls.append(options["language"])
        words = [
            types.SimpleNamespace(word=" So", start=0.5, end=0.7),
            types.SimpleNamespace(word=" mad.", start=0.7, end=1.0),
            types.SimpleNamespace(word=" Glad!", start=1.2, end=1.9),
        ]
        segment = types.SimpleNamespace(start=0.5, end=1.9, text=" So mad. Glad!", words=words)
        is_silent = not samples.any()
        language = options["language"] or ("en" if is_silent else "de")
        return iter([] if is_silent else [segment]), types.SimpleNamespace(language=language)


def test_whisper_segments_are_split_at_sentences_by_the_times_of_words(
    recognizer, recording, monkeypatch
):
    monkeypatch.setattr(faster_whisper, "WhisperModel", FakeWhisperModel)
    whisper = speech_recognition.WhisperRecognizer("tiny", language="en")
    rows = recognizer.predict_recording(recording, recognizer=whisper)
    assert [(row["start"], row["end"], row["text"]) for row in rows] == [
        (0.5, 1.0, "So mad."),
        (1.2, 1.9, "Glad!"),
    ]
    assert whisper._model.calls == ["en"]
    with pytest.raises(InputError, match="language 'xx'; allowed: de, en"):
        speech_recognition.WhisperRecognizer("tiny", language="xx")


def test_whisper_detects_the_language_of_a_recording_once(tmp_path, monkeypatch):
    monkeypatch.setattr(faster_whisper, "WhisperModel", FakeWhisperModel)
    monkeypatch.setattr(speech_recognition, "_PIECE_SECONDS", 2.0)
    monkeypatch.setattr(speech_recognition, "_SEARCH_SECONDS", 0.6)
    path = tmp_path / "call.wav"
    encode_wav(path, np.concatenate([silence(2.0), voice(4.0, 150)]))
    whisper = speech_recognition.WhisperRecognizer("tiny")
    recognize_speech(path, whisper)
    calls = whisper._model.calls
    # The first piece is silent, so its language is not used.
    assert calls[:2] == [None, None] and len(calls) > 3 and set(calls[2:]) == {"de"}
    calls.clear()
    recognize_speech(path, whisper)
    assert calls[:2] == [None, None], "another recording may have another language"
    whisper(voice(1.0, 150).astype(np.float32) / audio.FULL_SCALE)
    assert calls[-1] is None
    whisper = speech_recognition.WhisperRecognizer("tiny", language="en")
    recognize_speech(path, whisper)
    assert set(whisper._model.calls) == {"en"}


def test_the_table_of_a_recording_distinguishes_times_within_a_second():
    row = {"emotion": "joy", "probabilities": {"joy": 1.0}, "gate": {}, "experts": {}}
    rows = [row | {"start": start} for start in (0.25, 0.9, 61.2, 3661.2)]
    table = prediction_table(["a"] * 4, rows)
    assert list(table.columns[0].cells) == ["0:00.2", "0:00.9", "1:01.2", "1:01:01.2"]
