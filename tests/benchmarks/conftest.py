"""A tiny model and few repetitions, so that the benchmarks finish fast."""

import dataclasses

import numpy as np
import pytest

from benchmarks import cli, config, dialogues, measure

TINY = {"preset": "tiny", "speech_dim": 6, "text_dim": 5, "batch_size": 4, "length": 3, "steps": 2}


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch, tiny_config):
    """Adds the preset "tiny" and the dialogue lengths "few", and makes measurements short."""

    def tiny(**changes):
        # The random bits of dropout would take most of the compile time.
        return dataclasses.replace(
            tiny_config, attention_dropout=0.0, fusion_dropout=0.0, **changes
        )

    monkeypatch.setitem(config.PRESETS, "tiny", tiny)
    monkeypatch.setitem(dialogues.LENGTHS, "few", lambda: np.array([1, 3, 1, 3, 1]))
    monkeypatch.setattr(measure, "SHORTEST_RUN", 0.0)
    monkeypatch.setattr(cli, "matmul_peak", lambda config: 1e9)
