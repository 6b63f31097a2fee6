"""Calibration of probabilities: the fit, its application, and its file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mister_jax.calibration import (
    CALIBRATION_FILE,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    Calibration,
    fit_calibration,
    negative_log_likelihood,
    read_calibration,
    write_calibration,
)
from mister_jax.errors import InputError

PROGRESS = {"epoch": [3, 4], "weighted_f1": [0.25, 0.5]}
BIAS = (0.8, -0.5, -0.3)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def sample(calibration, num_utterances=20_000, seed=0):
    """Returns probabilities, and labels drawn from the calibrated probabilities."""
    random = np.random.default_rng(seed)
    probabilities = softmax(2 * random.normal(size=(num_utterances, 3)))
    draws = random.random((num_utterances, 1))
    label = (calibration(probabilities).cumsum(-1) > draws).argmax(-1)
    return probabilities.astype(np.float32), label


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("bias", [None, BIAS])
def test_the_fit_recovers_the_temperature_and_bias_of_the_labels(temperature, bias):
    probabilities, label = sample(Calibration(temperature, bias))
    fitted = fit_calibration(probabilities, label, with_bias=bias is not None)
    assert fitted.temperature == pytest.approx(temperature, rel=0.05)
    assert fitted.bias == (None if bias is None else pytest.approx(bias, abs=0.07))


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_fit_has_the_lowest_likelihood_and_is_deterministic(with_bias):
    probabilities, label = sample(Calibration(1.7, BIAS), 500)
    fitted = fit_calibration(probabilities, label, with_bias=with_bias)
    assert fit_calibration(probabilities, label, with_bias=with_bias) == fitted

    def loss(calibration):
        nll = negative_log_likelihood(calibration(probabilities.astype(float)), label).mean()
        deviations = np.array([1 / calibration.temperature - 1, *(calibration.bias or ())])
        return nll + (deviations**2).sum() / (2 * len(label))

    best = loss(fitted)
    for change in (0.99, 1.01):
        assert loss(Calibration(fitted.temperature * change, fitted.bias)) > best
    for index in range(3 if with_bias else 0):
        bias = np.array(fitted.bias) + 0.01 * np.eye(3)[index]
        assert loss(Calibration(fitted.temperature, tuple(bias))) > best


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_utterances", [1, 2, 5, 40])
def test_the_fit_never_makes_the_likelihood_worse(with_bias, num_utterances):
    for seed in range(20):
        random = np.random.default_rng(seed)
        probabilities = softmax(random.normal(size=(num_utterances, 4)) * 10 ** (seed % 4 - 1))
        label = random.integers(4, size=num_utterances)
        fitted = fit_calibration(probabilities, label, with_bias=with_bias)
        before = negative_log_likelihood(probabilities, label).mean()
        assert negative_log_likelihood(fitted(probabilities), label).mean() <= before + 1e-12


def test_a_temperature_keeps_the_order_of_the_classes_and_a_bias_may_change_it():
    probabilities, _ = sample(Calibration(), 100)
    order = probabilities.argsort(-1)
    for temperature in (MIN_TEMPERATURE, 0.7, 4.0):
        calibrated = Calibration(temperature)(probabilities)
        assert calibrated.dtype == np.float32
        np.testing.assert_allclose(calibrated.sum(-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(calibrated.argmax(-1), order[:, -1])
    np.testing.assert_array_equal(Calibration(4.0)(probabilities).argsort(-1), order)
    biased = Calibration(1.0, (9.0, 0.0, 0.0))(probabilities)
    assert (biased.argmax(-1) == 0).mean() > (order[:, -1] == 0).mean()


def test_a_higher_temperature_makes_the_model_less_certain():
    probabilities, _ = sample(Calibration(), 100)
    temperatures = (0.1, 0.5, 1.0, 2.0, 10.0)
    confidence = [Calibration(it)(probabilities).max(-1) for it in temperatures]
    assert (np.diff(confidence, axis=0) <= 0).all()
    np.testing.assert_allclose(confidence[2], probabilities.max(-1), rtol=1e-6)


def test_a_calibration_applies_to_arrays_of_jax_under_jit():
    probabilities, _ = sample(Calibration(), 10)
    calibration = Calibration(1.5, BIAS)
    calibrated = jax.jit(calibration)(jnp.asarray(probabilities))
    np.testing.assert_allclose(calibrated, calibration(probabilities), rtol=1e-5)


def test_probabilities_of_zero_stay_finite():
    certain = np.eye(3, dtype=np.float32)
    assert np.isfinite(Calibration(20.0, BIAS)(certain)).all()
    assert np.isfinite(negative_log_likelihood(certain, np.array([1, 2, 0]))).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("confidence", "label", "low", "high"),
    [
        (0.9, [0, 1, 2], MIN_TEMPERATURE, 1.0),  # all correct
        (0.9, [1, 2, 0], 1.0, MAX_TEMPERATURE),  # all wrong
        (1.0, [0, 1, 2], 1.0, 1.0),  # certain and correct
        (0.9, [0, 0, 0], 1.0, MAX_TEMPERATURE),  # labels of one class
    ],
)
def test_extreme_labels_give_bounded_values(with_bias, confidence, label, low, high):
    other = (1 - confidence) / 2
    probabilities = np.full((3, 3), other) + (confidence - other) * np.eye(3)
    for repeats in (1, 1000):
        fitted = fit_calibration(
            np.tile(probabilities, (repeats, 1)), np.tile(label, repeats), with_bias=with_bias
        )
        biases = fitted.bias or (0.0,)
        assert MIN_TEMPERATURE <= fitted.temperature <= MAX_TEMPERATURE
        if not with_bias:  # A bias can take the place of a temperature.
            assert low - 1e-6 <= fitted.temperature <= high + 1e-6
        assert np.abs(biases).max() < 20 and abs(sum(biases)) < 1e-6


def test_a_few_correct_predictions_do_not_make_the_model_certain():
    probabilities = np.full((6, 2), [0.8, 0.2])
    fitted = fit_calibration(probabilities, np.zeros(6, int))
    assert 0.8 < fitted(probabilities)[0, 0] < 0.99


def test_unlabeled_utterances_are_ignored():
    probabilities, label = sample(Calibration(2.0), 50)
    half = np.where(np.arange(50) % 2, label, -1)
    assert fit_calibration(probabilities, half) == fit_calibration(probabilities[1::2], label[1::2])
    assert fit_calibration(probabilities, np.full(50, -1)) is None


def test_a_single_class_has_nothing_to_calibrate():
    assert fit_calibration(np.ones((4, 1)), np.zeros(4, int)) == Calibration(1.0)


@pytest.mark.parametrize("bias", [None, BIAS])
def test_the_file_is_read_back_for_the_same_parameters_only(tmp_path, bias):
    assert read_calibration(tmp_path, PROGRESS, 3) is None
    calibration = Calibration(1.25, bias)
    write_calibration(tmp_path, calibration, PROGRESS)
    assert read_calibration(tmp_path, PROGRESS, 3) == calibration
    assert read_calibration(tmp_path, PROGRESS | {"epoch": [3, 5]}, 3) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[1]", "damaged"),
        ("{}", "damaged calibration .KeyError"),
        ('{"temperature": 0, "bias": null}', "damaged calibration .ValueError"),
        ('{"temperature": "warm", "bias": null}', "damaged calibration .ValueError"),
        ('{"temperature": NaN, "bias": null}', "damaged calibration .ValueError"),
        ('{"temperature": 1, "bias": 3}', "damaged calibration .TypeError"),
        ('{"temperature": 1, "bias": [0, 1]}', "calibration of 2 classes; the model has 3"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / CALIBRATION_FILE).write_text(content)
    with pytest.raises(InputError, match=f"{CALIBRATION_FILE}: {message}") as error:
        read_calibration(tmp_path, PROGRESS, 3)
    assert "\n" not in str(error.value)


def test_the_json_values_are_plain():
    values = json.loads(json.dumps(Calibration(1.5, BIAS).to_json()))
    assert Calibration.from_json(values, "file", 3) == Calibration(1.5, BIAS)


@pytest.mark.parametrize("label", [-1, 3])
def test_the_likelihood_of_a_label_that_is_no_class_raises(label):
    probabilities = np.full((2, 3), 1 / 3)
    with pytest.raises(ValueError, match=r"labels are from .*; allowed: 0 to 2"):
        negative_log_likelihood(probabilities, np.array([0, label]))
    with pytest.raises(ValueError, match=r"labels are from .*; allowed: 0 to 2"):
        fit_calibration(probabilities, np.array([0, 3]))


@pytest.mark.parametrize("num_classes", [1, 2, 4])
def test_a_bias_of_another_number_of_classes_raises(num_classes):
    with pytest.raises(ValueError, match=f"has 3 biases; allowed: {num_classes}, one per class"):
        Calibration(1.0, BIAS)(np.full((5, num_classes), 1 / num_classes))


@pytest.mark.parametrize("xp", [np, jnp])
def test_integer_probabilities_are_calibrated_as_floats(xp):
    certain = np.eye(3, dtype=int)
    calibration = Calibration(20.0, BIAS)
    expected = calibration(certain.astype(float if xp is np else np.float32))
    np.testing.assert_allclose(calibration(xp.asarray(certain)), expected, rtol=1e-5)
