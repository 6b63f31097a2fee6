"""What is measured in tests: as small as it gets, and no longer than it must be."""

import dataclasses

import numpy as np
import pytest

import benchmarks

TINY = {"preset": "tiny", "speech_dim": 6, "text_dim": 5, "batch_size": 4, "length": 3, "steps": 2}


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch, tiny_config):
    """The preset "tiny", the lengths "few", and runs that are done once."""

    def tiny(**changes):
        # Most of a compilation would be dropout's random bits.
        return dataclasses.replace(
            tiny_config, attention_dropout=0.0, fusion_dropout=0.0, **changes
        )

    monkeypatch.setitem(benchmarks.PRESETS, "tiny", tiny)
    monkeypatch.setitem(benchmarks.LENGTHS, "few", lambda: np.array([1, 3, 1, 3, 1]))
    monkeypatch.setattr("benchmarks.measure.SHORTEST_RUN", 0.0)
    monkeypatch.setattr("benchmarks.run.matmul_peak", lambda config: 1e9)
