"""The preparation benchmark runs `launch.prepare` on two corpora and compares the results."""

import pytest

from benchmarks import preparation
from benchmarks.preparation import measure_preparation
from mister_jax.data.synthetic_speech import writer
from mister_jax.errors import InputError


@pytest.fixture
def short_dialogues(monkeypatch):
    """Makes dialogues of one utterance, so that three utterances are enough for a corpus."""
    for module in (preparation, writer):
        monkeypatch.setattr(module, "MIN_LENGTH", 1)
        monkeypatch.setattr(module, "MAX_LENGTH", 1)


def test_two_corpora_are_prepared_and_compared(short_dialogues):
    lines = []
    small, large, difference = measure_preparation(12, num_workers=1, log=lines.append)
    assert lines == [f"{does} {n} recordings" for n in (3, 12) for does in ("writing", "preparing")]
    assert (small["utterances"], large["utterances"], difference["utterances"]) == (3, 12, 9)
    for row in (small, large):
        assert row["what"] == "launch.prepare"
        seconds = 3600 * row["audio_hours"]
        assert 0 < seconds / row["utterances"] < 3
        assert row["audio_seconds_per_second"] == pytest.approx(seconds / row["seconds"])
        assert 100 < row["peak_memory_mib"] < 10_000
    assert difference["what"] == "difference"
    for name in ("audio_hours", "seconds", "peak_memory_mib"):
        assert difference[name] == large[name] - small[name]


def test_too_few_utterances_are_refused():
    with pytest.raises(InputError, match="--prepare=107; allowed: 108 utterances or more"):
        measure_preparation(107)


def test_failure_of_the_command_is_reported(short_dialogues, monkeypatch):
    monkeypatch.setattr(preparation, "_RUN_AND_PRINT_MEMORY", "import sys; sys.exit('no')")
    with pytest.raises(InputError, match=r"launch\.prepare failed: no"):
        measure_preparation(12)
