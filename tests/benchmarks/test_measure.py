"""Candidates are timed in alternation, and synthetic dialogue lengths resemble those of IEMOCAP."""

import numpy as np

from benchmarks.dialogues import iemocap_like_lengths, released_epoch
from benchmarks.measure import time_runs


def test_candidates_are_timed_in_turns():
    order = []
    runs = {name: lambda times, name=name: order.append(name) for name in "ab"}
    timings = time_runs(runs, rounds=3)
    assert order == list("ab" * 5)
    assert {len(timing.seconds) for timing in timings.values()} == {3}


def test_lengths_resemble_iemocap():
    lengths = iemocap_like_lengths()
    assert len(lengths) == 120
    assert abs(lengths.mean() - 49) <= 1
    assert lengths.max() == 110
    np.testing.assert_array_equal(lengths, iemocap_like_lengths())
    epoch = released_epoch(lengths, 8)
    np.testing.assert_array_equal(np.sort(np.concatenate([b.rows for b in epoch])), range(120))
    positions = sum(len(batch.rows) * batch.padded_length for batch in epoch)
    assert 0.28 < 1 - lengths.sum() / positions < 0.36
