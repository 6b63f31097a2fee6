"""Scores, compared with scikit-learn and with values computed by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from mister_jax import metrics

CLASSES = ("anger", "joy", "neutral", "sadness")
NUM_CLASSES = len(CLASSES)
utterances = st.lists(
    st.tuples(st.integers(0, NUM_CLASSES - 1), st.integers(0, NUM_CLASSES - 1)), min_size=1
)


def confusion_of(labels, predicted):
    return sklearn.metrics.confusion_matrix(labels, predicted, labels=range(NUM_CLASSES))


@settings(max_examples=60, deadline=None)
@given(utterances)
def test_scores_equal_scikit_learn(pairs):
    labels, predicted = np.array(pairs).T
    scores = metrics.classification_scores(confusion_of(labels, predicted), CLASSES)
    f1 = {
        average: sklearn.metrics.f1_score(labels, predicted, average=average, zero_division=0)
        for average in ("weighted", "macro")
    }
    assert scores["weighted_f1"] == pytest.approx(f1["weighted"])
    assert scores["macro_f1"] == pytest.approx(f1["macro"])
    assert scores["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    # `balanced_accuracy_score` would warn about predicted classes that are not in the labels.
    recall = sklearn.metrics.recall_score(
        labels, predicted, labels=np.unique(labels), average="macro"
    )
    assert scores["uar"] == pytest.approx(recall)
    assert scores["utterances"] == len(labels)


@settings(max_examples=60, deadline=None)
@given(utterances)
def test_per_class_scores_equal_scikit_learn(pairs):
    labels, predicted = np.array(pairs).T
    per_class = metrics.classification_scores(confusion_of(labels, predicted), CLASSES)["per_class"]
    expected = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(NUM_CLASSES), zero_division=0
    )
    assert tuple(per_class) == CLASSES
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        actual = [per_class[class_name][name] for class_name in CLASSES]
        np.testing.assert_allclose(actual, values, err_msg=name)


@settings(max_examples=20, deadline=None)
@given(utterances)
def test_majority_baseline_predicts_the_most_frequent_label(pairs):
    labels, predicted = np.array(pairs).T
    constant = np.full_like(labels, np.bincount(labels).argmax())
    scores = metrics.classification_scores(confusion_of(labels, predicted), CLASSES)
    expected = metrics.classification_scores(confusion_of(labels, constant), CLASSES)
    assert scores["majority"] == {name: expected[name] for name in metrics.SCORE_NAMES}


def test_scores_without_utterances_are_zero():
    scores = metrics.classification_scores(np.zeros((NUM_CLASSES, NUM_CLASSES), int), CLASSES)
    assert scores["weighted_f1"] == scores["macro_f1"] == scores["accuracy"] == 0
    assert scores["uar"] == scores["utterances"] == 0
    assert scores["majority"]["weighted_f1"] == 0


def test_wrong_number_of_class_names_raises():
    with pytest.raises(ValueError, match="4 class names"):
        metrics.classification_scores(np.zeros((3, 3)), CLASSES)


def test_only_labeled_utterances_inside_the_mask_are_counted():
    random = np.random.default_rng(0)
    labels, predicted = random.integers(-1, NUM_CLASSES, (5, 9)), random.integers(0, 4, (5, 9))
    mask = random.random((5, 9)) < 0.6
    count = jax.jit(metrics.confusion_counts, static_argnums=3)
    counts = count(labels, predicted, mask, NUM_CLASSES)
    counted = mask & (labels >= 0)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, confusion_of(labels[counted], predicted[counted]))


def test_counts_of_batches_add_up():
    random = np.random.default_rng(0)
    labels, predicted = random.integers(-1, 4, (2, 8)), random.integers(0, 4, (2, 8))
    mask = np.ones((2, 8), bool)
    rows = zip(labels, predicted, mask, strict=True)
    parts = (metrics.confusion_counts(*row, NUM_CLASSES) for row in rows)
    np.testing.assert_array_equal(
        sum(parts), metrics.confusion_counts(labels, predicted, mask, NUM_CLASSES)
    )


def test_nothing_is_counted_outside_the_mask():
    counts = metrics.confusion_counts(
        jnp.zeros((2, 3), int), jnp.zeros((2, 3), int), jnp.zeros((2, 3), bool), NUM_CLASSES
    )
    assert not counts.any()


def test_binary_sentiment_follows_three_conventions():
    score = np.array([-2.0, -0.5, 0.0, 0.0, 1.0, 3.0, np.nan])
    positive = np.array([False, True, True, False, True, False, True])
    scores = metrics.binary_sentiment(score, positive)
    assert tuple(scores) == metrics.SENTIMENT_CONVENTIONS

    # Labels - - + + + +: the 1st, 3rd and 5th are correct. F1 is 2/(2+3) for -, 4/(4+3) for +.
    nonnegative = scores["negative_nonnegative"]
    assert nonnegative["accuracy"] == pytest.approx(3 / 6)
    assert nonnegative["weighted_f1"] == pytest.approx((2 * 2 / 5 + 4 * 4 / 7) / 6)
    assert nonnegative["utterances"] == 6

    # Labels - - + +, predictions - + + -: each class has one correct and one wrong utterance.
    without_zero = scores["negative_positive_without_zero"]
    assert without_zero["accuracy"] == pytest.approx(2 / 4)
    assert without_zero["weighted_f1"] == pytest.approx(1 / 2)
    assert without_zero["utterances"] == 4

    # Labels - - - - + +, predictions - + + - + -. F1 is 4/(4+3) for -, and 2/(2+3) for +.
    positive_only = scores["nonpositive_positive"]
    assert positive_only["accuracy"] == pytest.approx(3 / 6)
    assert positive_only["weighted_f1"] == pytest.approx((4 * 4 / 7 + 2 * 2 / 5) / 6)
    assert positive_only["utterances"] == 6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.booleans()), min_size=1))
def test_sentiment_scores_equal_scikit_learn(pairs):
    score, positive = (np.array(column) for column in zip(*pairs, strict=True))
    scores = metrics.binary_sentiment(score, positive)["nonpositive_positive"]
    expected = sklearn.metrics.f1_score(score > 0, positive, average="weighted", zero_division=0)
    assert scores["weighted_f1"] == pytest.approx(expected)


def test_calibration_bins_and_error_equal_values_computed_by_hand():
    confidence = np.array([0.55, 0.6, 0.95, 1.0])
    calibration = metrics.calibration(confidence, np.array([True, False, True, True]))
    assert calibration["count"].tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert calibration["error"] == pytest.approx((2 * abs(0.5 - 0.575) + 2 * abs(1 - 0.975)) / 4)
    assert metrics.calibration(np.zeros(0), np.zeros(0, bool))["error"] == 0


def test_brier_scores_equal_values_computed_by_hand():
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], np.float32)
    assert metrics.brier_scores(probabilities, np.array([0, 0, 0])).tolist() == [0, 0.5, 2]


def test_the_risk_coverage_curve_equals_values_computed_by_hand():
    confidence = np.array([0.9, 0.6, 0.8, 0.7])
    coverage, risk, area = metrics.risk_coverage(confidence, np.array([True, False, False, True]))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_equal_confidences_are_kept_together_and_have_the_area_of_a_random_order():
    correct = np.array([True, False, True, False, False])
    coverage, risk, area = metrics.risk_coverage(np.full(5, 0.5), correct)
    assert coverage.tolist() == [1] and risk.tolist() == [0.6]
    assert area == pytest.approx(0.6)
    confidence = np.array([0.9, 0.5, 0.5, 0.5, 0.2])
    areas = [
        metrics.risk_coverage(confidence - 1e-6 * np.array([0, *order, 0]), correct)[2]
        for order in itertools.permutations(range(3))
    ]
    assert metrics.risk_coverage(confidence, correct)[2] == pytest.approx(np.mean(areas))


def test_perfect_confidences_have_the_smallest_area():
    random = np.random.default_rng(0)
    correct = random.random(50) < 0.7
    best = metrics.risk_coverage(correct, correct)[2]
    assert 0 < best < metrics.risk_coverage(random.random(50), correct)[2]
    assert best < metrics.risk_coverage(~correct, correct)[2]


@pytest.mark.parametrize(
    ("class_names", "expected"),
    [
        (("negative", "positive"), 1),
        (("positive", "negative"), 0),
        (("negative", "non_negative"), 1),
        (("Non-negative", "Negative"), 0),
        (("non positive", "positive"), 1),
        (("calm", "angry"), None),
        (("negative", "neutral", "positive"), None),
        (("nonnegative", "nonpositive"), None),
    ],
)
def test_positive_class_is_recognized_by_its_name(class_names, expected):
    assert metrics.positive_class(class_names) == expected


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_positions_with_a_label_or_prediction_that_is_no_class_are_not_counted(dtype):
    labels = np.array([0, 29, 30, 3, 1, 100], dtype)
    predicted = np.array([0, 29, 3, 30, 99, 1], dtype)
    counts = metrics.confusion_counts(labels, predicted, np.ones(6, int), 30)
    assert counts[0, 0] == counts[29, 29] == 1
    assert counts.sum() == 2
    minus_one = metrics.confusion_counts(np.array([1, 2]), np.array([-1, 2]), np.ones(2, bool), 3)
    assert minus_one.sum() == minus_one[2, 2] == 1


@pytest.mark.parametrize("num_bins", [1, 3, 7, 10, 49, 100, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_calibration_bin_includes_its_upper_end(num_bins, dtype):
    confidence = (np.arange(num_bins + 1) / num_bins).astype(dtype)
    bins = metrics.calibration(confidence, np.ones(num_bins + 1, bool), num_bins)["bin"]
    assert bins.tolist() == [0, *range(num_bins)]


@pytest.mark.parametrize("confidence", [-0.1, 1.1, np.nan])
def test_a_confidence_outside_0_and_1_raises(confidence):
    with pytest.raises(ValueError, match=r"confidence is from .*; allowed: 0 to 1"):
        metrics.calibration(np.array([0.5, confidence]), np.ones(2, bool))
    assert metrics.calibration(np.float32([1.0000001]), np.ones(1, bool))["bin"] == [9]


@pytest.mark.parametrize("label", [-1, 2])
def test_brier_scores_of_a_label_that_is_no_class_raise(label):
    with pytest.raises(ValueError, match=r"labels are from .*; allowed: 0 to 1"):
        metrics.brier_scores(np.full((2, 2), 0.5), np.array([0, label]))


def test_a_missing_predicted_score_raises_only_where_a_score_is_annotated():
    score = np.array([1.0, np.nan, -2.0])
    scores = metrics.regression_scores(score, np.array([1.0, np.nan, -2.0]))
    assert scores["mae"] == 0 and scores["utterances"] == 2
    with pytest.raises(ValueError, match="predicted is NaN for 1 of 2 annotated utterances"):
        metrics.regression_scores(score, np.array([np.nan, 0.0, -2.0]))
