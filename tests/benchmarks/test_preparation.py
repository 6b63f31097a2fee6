"""The benchmark of preparation runs the command and tells what the larger corpus takes more."""

import pytest

from benchmarks import preparation
from benchmarks.preparation import preparation_rows
from mister_jax.data import recordings
from mister_jax.errors import InputError


@pytest.fixture
def short_dialogues(monkeypatch):
    """Of one utterance, so that three of them are a corpus."""
    for module in (preparation, recordings):
        monkeypatch.setattr(module, "MIN_LENGTH", 1)
        monkeypatch.setattr(module, "MAX_LENGTH", 1)


def test_two_sizes_are_prepared_and_their_difference_is_told(short_dialogues):
    told = []
    fewer, more, growth = preparation_rows(12, num_workers=1, tell=told.append)
    assert told == [f"{does} {n} recordings" for n in (3, 12) for does in ("writing", "preparing")]
    assert (fewer["utterances"], more["utterances"], growth["utterances"]) == (3, 12, 9)
    for row in (fewer, more):
        assert row["what"] == "launch.prepare"
        seconds = 3600 * row["audio_hours"]
        assert 0 < seconds / row["utterances"] < 3
        assert row["audio_seconds_per_second"] == pytest.approx(seconds / row["seconds"])
        assert 100 < row["peak_memory_mib"] < 10_000
    assert growth["what"] == "what is more"
    for name in ("audio_hours", "seconds", "peak_memory_mib"):
        assert growth[name] == more[name] - fewer[name]


def test_too_few_utterances_are_refused():
    with pytest.raises(InputError, match="prepare 107; allowed are 108 utterances or more"):
        preparation_rows(107)


def test_a_command_that_fails_is_told(short_dialogues, monkeypatch):
    monkeypatch.setattr(preparation, "_WATCHED", "import sys; sys.exit('no')")
    with pytest.raises(InputError, match=r"launch\.prepare failed: no"):
        preparation_rows(12)
