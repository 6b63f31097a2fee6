"""The recording benchmark: transcripts, voice activity detection, and their overlap with speech.

Each row of the benchmark starts a process, so only a few tests run measurements.
"""

import numpy as np
import pytest

from benchmarks import recordings
from mister_jax import extraction
from mister_jax.data.audio import encode_wav
from mister_jax.data.transcripts.segments import Segment, Word
from mister_jax.errors import InputError
from tests.helpers.speech import synthesize_speech
from tests.helpers.tiny_datasets import prepare_manifest, write_manifest
from tests.helpers.training import write_untrained_workdir

RATE = 16000


@pytest.fixture(scope="module")
def speech():
    return synthesize_speech(2.0)


@pytest.fixture(scope="module")
def model(speech, tmp_path_factory):
    """A work directory of an untrained model that reads only speech."""
    root = tmp_path_factory.mktemp("speech")
    encode_wav(root / "a.wav", speech)
    rows = [
        {"dialogue": split, "utterance": turn, "order": turn, "split": split, "audio": "a.wav"}
        | {"label": ("calm", "angry")[turn], "audio_start": turn, "audio_end": turn + 1}
        for split in ("train", "validation", "test")
        for turn in range(2)
    ]
    prepare_manifest(write_manifest(root / "calls.jsonl", rows), root / "data")
    extraction.extract_features(
        extraction.ProsodyEncoder(), "manifest/calls", "speech", root / "data", quiet=True
    )
    return write_untrained_workdir(root / "run", root / "data", "speech")


def test_sources_of_utterances_are_measured_and_compared_with_speech(model, speech, tmp_path):
    silence = np.zeros(RATE, np.int16)
    encode_wav(tmp_path / "call.wav", np.concatenate([silence, speech, silence]))
    (tmp_path / "call.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello.\n")
    (tmp_path / "call.rttm").write_text(
        "SPEAKER call 1 1.0 1.5 <NA> <NA> a <NA> <NA>\n"
        "SPEAKER call 1 2.0 1.0 <NA> <NA> b <NA> <NA>\n"
    )
    lines = []
    rows = recordings.measure_recording(
        tmp_path / "call.wav", str(model), repeat=3, log=lines.append
    )
    assert len(lines) == 3
    assert [row["what"] for row in rows] == ["transcript", "voice activity"]
    for row in rows:
        assert row["audio_seconds"] == 12
        assert row["times_real_time"] == pytest.approx(12 / row["seconds"])
        assert 0 <= row["memory_above_start_mib"] < 1000
        assert 50 < row["start_memory_mib"] < 5000
    assert rows[0]["num_utterances"] == 3
    assert rows[0]["speech_in_utterances"] == pytest.approx(0.5)
    assert rows[0]["utterance_time_with_speech"] == pytest.approx(1)


def test_recording_without_transcript_is_measured_by_voice_activity(model, speech, tmp_path):
    encode_wav(tmp_path / "call.wav", speech)
    (row,) = recordings.measure_recording(tmp_path / "call.wav", str(model))
    assert row["what"] == "voice activity"
    assert "speech_in_utterances" not in row


def test_error_of_the_prediction_is_one_line(speech, tmp_path):
    encode_wav(tmp_path / "call.wav", speech)
    with pytest.raises(InputError, match=r"^.*no_such_run.*$"):
        recordings.measure_recording(tmp_path / "call.wav", str(tmp_path / "no_such_run"))


def test_common_time_counts_overlapping_turns_once():
    turns = recordings._union([(4, 6), (0, 2), (1, 3)])
    assert turns == [(0, 3), (4, 6)]
    assert recordings.covered_seconds(turns, [(2, 5), (5.5, 9)]) == 1 + 1 + 0.5
    assert recordings.covered_seconds([(0, 9)], turns) == 5
    assert recordings.covered_seconds(turns, []) == 0


def test_repetitions_shift_segments_and_words():
    word = Word("hi", 1.0, None)
    _, second = recordings._repeated([Segment(1, 2, "hi", words=(word,))], 10.0, 2)
    assert second == Segment(11, 12, "hi", words=(Word("hi", 11.0, None),))
    (stored,) = recordings._as_json([second])
    stored["words"] = [dict(it) for it in stored["words"]]
    assert recordings._from_json(stored) == second
