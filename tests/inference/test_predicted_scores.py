"""Predictions of models that predict sentiment as a number."""

import dataclasses

import numpy as np
import pytest

import mister_jax
from mister_jax import data
from mister_jax.predictor import Predictor
from tests.helpers.predictions import assert_predictions_close
from tests.helpers.training import ALL_LAYERS, write_untrained_workdir


@pytest.fixture(scope="module")
def scored_workdir(calls_dir, tmp_path_factory):
    """A work directory of an untrained causal MiSTER-E that predicts scores."""
    root = tmp_path_factory.mktemp("scored")
    splits = {}
    for name in data.SPLITS:
        split = data.load_features("both", name, calls_dir)
        score = np.linspace(-3, 3, len(split.label), dtype=np.float32)
        splits[name] = dataclasses.replace(split, score=score)
    data.write_features(splits, "scored", root / "data")
    return write_untrained_workdir(
        root / "run",
        root / "data",
        "scored,score",
        causal=True,
        kernel_sizes=(1,),
        attention_window=2,
        **ALL_LAYERS,
    )


def test_dialogues_and_streams_have_the_score_of_the_model(scored_workdir, dialogues):
    recognizer = mister_jax.load(scored_workdir)
    rows = [row for dialogue in dialogues for row in recognizer.predict(dialogue)]
    data_dir = scored_workdir.parent / "data"
    expected = Predictor(scored_workdir)(data.load_features("scored", "test", data_dir))
    np.testing.assert_allclose([row["score"] for row in rows], expected["score"], atol=1e-5)
    assert np.ptp(expected["score"]) > 0
    stream = recognizer.stream()
    answers = [stream.predict(utterance) for utterance in dialogues[0]]
    assert_predictions_close(answers, rows[: len(answers)])
    np.testing.assert_allclose([row["score"] for row in answers], expected["score"][:3], atol=1e-5)
