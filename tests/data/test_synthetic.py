"""Synthetic dialogues and their exact posterior."""

import itertools

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.metrics import accuracy_score, f1_score

from mister_jax.data import dialogue_process, synthetic
from mister_jax.errors import InputError

SMALL = {"train": 20, "test": 10}


def test_the_same_seed_gives_the_same_dialogues():
    first, same, other = (synthetic.generate_features(seed, SMALL)["test"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.speech, same.speech)
    np.testing.assert_array_equal(first.label, same.label)
    assert first.metadata == same.metadata
    assert not np.array_equal(first.speech[:2], other.speech[:2])


def test_a_split_does_not_depend_on_the_sizes_of_other_splits():
    small = synthetic.generate_features(0, SMALL)["test"]
    large = synthetic.generate_features(0, {"train": 30, "test": 10})["test"]
    np.testing.assert_array_equal(small.text, large.text)


def test_the_posterior_equals_enumeration():
    process = synthetic.emotion_process(
        3, num_classes=3, speech_dim=2, text_dim=3, uninformative_share=0.2, missing_share=0.5
    )
    (_, *features), _ = process.sample(4, np.random.default_rng(0))
    speech, text, speech_present, text_present = features
    speech_present[:], text_present[:] = [True, False, True, True], [True, True, False, True]

    def density(values, mean, present):
        return multivariate_normal.pdf(values, mean) if present else 1.0

    def emission(step, emotion):
        return sum(
            weight
            * density(speech[step], speech_mean, speech_present[step])
            * density(text[step], text_mean, text_present[step])
            for weight, speech_mean, text_mean in (
                (0.6, process.speech_mean[emotion], process.text_mean[emotion]),
                (0.2, process.speech_neutral, process.text_mean[emotion]),
                (0.2, process.speech_mean[emotion], process.text_neutral),
            )
        )

    expected = np.zeros((4, 3))
    for path in itertools.product(range(3), repeat=4):
        weight = process.initial[path[0]]
        for previous, current in itertools.pairwise(path):
            weight *= process.transition[previous, current]
        for step, emotion in enumerate(path):
            weight *= emission(step, emotion)
        expected[np.arange(4), path] += weight
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(process.posterior(*features), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def default_splits() -> dict:
    return synthetic.generate_features()


def test_the_default_task_rewards_fusion_and_context(default_splits):
    for features in default_splits.values():
        score = {
            reference: values["weighted_f1"]
            for reference, values in features.metadata["reference_scores"].items()
        }
        assert 0.8 < score["bayes"] < 0.9
        assert score["bayes_utterance"] < score["bayes"] - 0.05
        assert 0.5 < score["bayes_speech"] < score["bayes"] - 0.1
        assert 0.6 < score["bayes_text"] < score["bayes"] - 0.1
        assert score["majority"] < 0.2


def test_missing_modalities_are_marked_zero_and_as_frequent_as_configured(default_splits):
    train = default_splits["train"]
    assert not (~train.speech_present & ~train.text_present).any()
    assert not train.speech[~train.speech_present].any()
    assert not train.text[~train.text_present].any()
    assert 0.03 < np.mean(~train.speech_present | ~train.text_present) < 0.07
    assert train.lengths.min() >= 2
    assert train.lengths.max() <= 30


def test_reference_scores_match_scikit_learn():
    generator = np.random.default_rng(0)
    label, predicted = generator.integers(0, 4, size=(2, 50))
    predicted[label == 3] = 0
    expected = f1_score(label, predicted, average="weighted", zero_division=0)
    assert dialogue_process._weighted_f1(label, predicted) == pytest.approx(expected)

    process = synthetic.emotion_process(0)
    features = synthetic.generate_features(0, SMALL)["test"]
    predicted = np.concatenate(
        [
            process.posterior(
                *(
                    getattr(features, field)[start:end]
                    for field in ("speech", "text", "speech_present", "text_present")
                )
            ).argmax(axis=1)
            for start, end in itertools.pairwise(features.offsets)
        ]
    )
    scores = features.metadata["reference_scores"]["bayes"]
    assert scores["accuracy"] == pytest.approx(accuracy_score(features.label, predicted))


@pytest.mark.parametrize(
    "arguments", [{"num_classes": 1}, {"uninformative_share": 0.6}, {"stay_probability": 1.0}]
)
def test_arguments_out_of_range_are_rejected(arguments):
    with pytest.raises(ValueError):
        synthetic.emotion_process(0, **arguments)


def test_empty_splits_are_omitted_and_one_dialogue_is_needed():
    assert list(synthetic.generate_features(0, {"train": 2, "validation": 0, "test": 1})) == [
        "train",
        "test",
    ]
    for num_dialogues in ({}, {"train": 0}, {"train": -1, "test": 2}, {"dev": 2}):
        with pytest.raises(InputError, match=r"allowed: numbers for train, validation, test"):
            synthetic.generate_features(0, num_dialogues)
