"""Adaptation to other recording conditions, and the warning if adaptation is off."""

import dataclasses
import json

import numpy as np
import pytest

from mister_jax import data
from mister_jax.data.adaptation import adapt_features, describe_shift
from mister_jax.data.standardizer import Standardizer
from mister_jax.errors import InputError
from mister_jax.evaluation.results import evaluate
from mister_jax.training.loop import train
from tests.helpers.training import make_tiny_config


@pytest.fixture
def features(tiny_data_dir):
    return data.load_features("tiny", "train", tiny_data_dir)


@pytest.fixture
def standardizers(features):
    return {"speech": Standardizer.fit(features.speech[features.speech_present])}


def shifted(features):
    """Features in other units: every dimension is scaled and shifted."""
    scale = np.linspace(0.2, 5, features.speech.shape[1])
    return dataclasses.replace(features, speech=(features.speech * scale + 30 * scale))


def test_a_shift_and_a_scale_are_removed(features, standardizers):
    adapted = adapt_features(shifted(features), standardizers)
    present = features.speech_present
    count = present.sum()
    # The statistics of training have the weight of two utterances.
    new = shifted(features).speech[present].astype(np.float64)
    training = standardizers["speech"]
    mean = (count * new.mean(0) + 2 * training.mean) / (count + 2)
    variance = (count * new.var(0) + 2 * training.deviation**2) / (count + 2)
    expected = (shifted(features).speech - mean) / np.sqrt(variance)
    expected = expected * training.deviation + training.mean
    np.testing.assert_allclose(adapted.speech[present], expected[present], rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(adapted.speech[~present], shifted(features).speech[~present])
    assert adapted.text is features.text


def test_with_many_utterances_adaptation_recovers_the_features():
    random = np.random.default_rng(0)
    training = random.normal(3, 2, (50_000, 4))
    features = data.DialogueFeatures(
        name="calls",
        split="test",
        class_names=("a", "b"),
        dialogue_ids=("1",),
        lengths=np.array([50_000]),
        utterance_ids=np.arange(50_000).astype(str),
        speech=(10 * training - 70).astype(np.float32),
        text=np.zeros((50_000, 1), np.float32),
        speech_present=np.ones(50_000, bool),
        text_present=np.zeros(50_000, bool),
        label=np.zeros(50_000, np.int32),
    )
    adapted = adapt_features(features, {"speech": Standardizer.fit(training)})
    np.testing.assert_allclose(adapted.speech, training, atol=0.05)


def test_a_few_utterances_change_little(features, standardizers):
    # With one utterance, the statistics of training have a weight of two thirds.
    one = dataclasses.replace(
        features,
        dialogue_ids=features.dialogue_ids[:1],
        lengths=np.array([1]),
        **{
            name: getattr(features, name)[features.speech_present][:1]
            for name in (
                *("utterance_ids", "label", "speech", "text"),
                *("speech_present", "text_present"),
            )
        },
    )
    adapted = adapt_features(one, standardizers)
    standardizer = standardizers["speech"]
    standardized = standardizer(one.speech)
    np.testing.assert_allclose(
        standardizer(adapted.speech), standardized * (2 / 3) / np.sqrt(2 / 3), rtol=1e-4, atol=1e-5
    )


def test_shifted_features_are_described(features, standardizers):
    assert describe_shift(features, standardizers) == ""
    text = describe_shift(shifted(features), standardizers)
    assert "a tenth of the speech features by" in text and "--adapt_features may help" in text
    assert "\n" not in text
    none = dataclasses.replace(
        shifted(features), speech_present=np.zeros_like(features.speech_present)
    )
    assert describe_shift(none, standardizers) == ""


def test_a_model_without_standardized_features_is_refused(features):
    with pytest.raises(InputError, match="the model standardizes no features; needed"):
        adapt_features(features, {})


def test_evaluation_of_shifted_features_warns_and_adapts(tiny_data_dir, tmp_path, features, caplog):
    changes = {"data.standardize": "speech", "model.experts": ("speech",), "train.epochs": 1}
    train(make_tiny_config(tiny_data_dir, **changes), tmp_path / "run", quiet=True)
    splits = {split: data.load_features("tiny", split, tiny_data_dir) for split in data.SPLITS}
    large = {split: shifted(part) for split, part in splits.items()}
    data.write_features(large, "shifted", tmp_path / "data")
    options = {"dataset": "shifted", "data_dir": str(tmp_path / "data"), "quiet": True}

    def probabilities(folder, **more):
        evaluate(tmp_path / "run", "train", output=tmp_path / folder, **more)
        lines = (tmp_path / folder / "predictions.jsonl").read_text().splitlines()
        return np.array([list(json.loads(line)["probabilities"].values()) for line in lines])

    expected = probabilities("expected", quiet=True)
    assert "differ from those of the training utterances" not in caplog.text
    as_is = probabilities("as_is", **options)
    assert "differ from those of the training utterances" in caplog.text
    adapted = probabilities("adapted", adapt_features=True, **options)
    assert np.abs(adapted - expected).max() < 0.1 * np.abs(as_is - expected).max()
    scores = json.loads((tmp_path / "adapted" / "metrics.json").read_text())
    assert scores["shifted/train"]["adapted_features"] is True
