"""Class weights, logit adjustment and balanced sampling."""

import jax
import numpy as np
import pytest

from mister_jax import imbalance, losses, metrics
from mister_jax.data.batching import BatchPlan
from mister_jax.errors import InputError
from mister_jax.models import EXPERTS, MisterEOutput
from mister_jax.tasks.fusion import FusionTask
from mister_jax.training.loop import train
from mister_jax.training.progress import TrainConfig, TrainProgress
from tests.helpers.training import make_tiny_config, read_metric_records

COUNTS = np.array([90, 9, 1])


def test_balanced_weights_give_every_class_the_same_share():
    weights = imbalance.class_weights("balanced", COUNTS)
    np.testing.assert_allclose(weights * COUNTS, [100 / 3] * 3, rtol=1e-6)


def test_effective_numbers_lie_between_no_weights_and_balanced_ones():
    weights = imbalance.class_weights("effective_number", COUNTS)
    numbers = [sum(0.999**power for power in range(count)) for count in COUNTS]
    np.testing.assert_allclose(weights[1:] / weights[:-1], np.divide(numbers[:-1], numbers[1:]))
    assert (weights * COUNTS).sum() == pytest.approx(100)


def test_given_weights_are_scaled_to_a_mean_of_1_over_the_items():
    weights = imbalance.class_weights("1,2,4", COUNTS)
    np.testing.assert_allclose(weights / weights[0], [1, 2, 4])
    assert (weights * COUNTS).sum() == pytest.approx(100)
    assert imbalance.class_weights("none", COUNTS) is None


@pytest.mark.parametrize("method", ["1,2", "1,2,x", "1,2,0", "1,2,nan", "inverse", ""])
def test_unusable_class_weights_are_refused(method):
    with pytest.raises(InputError, match=r"weights=.*; allowed: none, balanced, .* 3 positive"):
        imbalance.class_weights(method, COUNTS, "weights")


def test_a_missing_class_has_finite_weights_and_adjustment():
    counts = np.array([5, 0])
    assert np.isfinite(imbalance.class_weights("balanced", counts)).all()
    assert np.isfinite(imbalance.logit_adjustment(1.0, counts)).all()


def make_output(random, batch=3, length=5, classes=3, experts=3):
    logits, expert_logits, representations = (
        random.normal(size=shape).astype(np.float32)
        for shape in (
            (batch, length, classes),
            (batch, length, experts, classes),
            (2, batch, length, 4),
        )
    )
    present = random.random((batch, length, experts)) < 0.8
    gate = np.where(present, random.random((batch, length, experts)), 0)
    return MisterEOutput(
        logits=logits,
        gate=(gate / np.maximum(gate.sum(-1, keepdims=True), 1e-9)).astype(np.float32),
        expert_logits=expert_logits,
        expert_present=present,
        speech_context=representations[0],
        text_context=representations[1],
        speech_repr=representations[0],
        text_repr=representations[1],
        speech_present=present[..., 0],
        text_present=present[..., 1],
        experts=EXPERTS,
    )


def test_the_focal_losses_use_weights_and_adjusted_logits():
    random = np.random.default_rng(0)
    output = make_output(random)
    labels, mask = random.integers(-1, 3, (3, 5)), random.random((3, 5)) < 0.8
    weights = imbalance.class_weights("balanced", COUNTS)
    adjustment = imbalance.logit_adjustment(1.0, COUNTS)
    _, parts = losses.mister_e(
        output, labels, mask, gamma=2.0, class_weights=weights, logit_adjustment=adjustment
    )
    for name, logits, present in (
        ("mixture", output.logits, np.ones_like(mask)),
        ("text", output.expert_logits[..., 1, :], output.expert_present[..., 1]),
    ):
        rows = mask & (labels >= 0) & present
        log_p = np.asarray(jax.nn.log_softmax((logits + adjustment)[rows].astype(np.float64)))
        log_p = log_p[np.arange(len(log_p)), labels[rows]]
        expected = (weights[labels[rows]] * (1 - np.exp(log_p)) ** 2 * -log_p).mean()
        assert parts[name] == pytest.approx(expected, rel=1e-5)
    # The agreement loss uses neither the class weights nor the logit adjustment.
    _, plain = losses.mister_e(output, labels, mask, gamma=2.0)
    assert parts["agreement"] == plain["agreement"]


def test_balanced_sampling_draws_all_classes_equally_often():
    label = np.repeat([0, 1, 2, -1], [90, 9, 1, 10])
    weights = imbalance.sampling_weights("balanced", label, np.ones(110, int), 3, "sampling")
    plan = BatchPlan(np.ones(110, int), 10, weights=weights)
    drawn = np.concatenate([b.rows for epoch in range(200) for b in plan.epoch(0, epoch)])
    counts = np.bincount(label[drawn] % 4)[:3]
    np.testing.assert_allclose(counts / counts.sum(), [1 / 3] * 3, atol=0.01)
    unshuffled = np.concatenate([batch.rows for batch in plan.epoch(0, 0, shuffle=False)])
    assert sorted(unshuffled) == list(range(110))


def test_a_dialogue_weighs_the_mean_of_its_labeled_utterances():
    label = np.array([0, 0, 1, 0, -1, -1])
    weights = imbalance.sampling_weights("balanced", label, np.array([2, 3, 1]), 2, "sampling")
    np.testing.assert_allclose(weights, [1 / 3, (1 / 3 + 1) / 2, 1 / 3])
    with pytest.raises(InputError, match=r"sampling=both; allowed: shuffle, balanced"):
        imbalance.sampling_weights("both", label, np.array([6]), 2, "sampling")
    with pytest.raises(InputError, match=r"sampling=balanced needs labels"):
        imbalance.sampling_weights("balanced", np.array([-1, -1]), np.array([2]), 2, "sampling")


def test_a_training_uses_the_options_and_selects_by_another_score(tiny_data_dir, tmp_path):
    config = make_tiny_config(
        tiny_data_dir,
        **{
            "loss.class_weights": "balanced",
            "loss.logit_adjustment": 0.5,
            "data.sampling": "balanced",
            "train.select_by": "loss",
        },
    )
    assert (
        FusionTask.from_data(config).split("train", num_shards=1, shuffle=True).plan.weights
        is not None
    )
    progress = train(config, tmp_path, quiet=True)
    losses_per_epoch = [
        record["validation/cross_entropy"]
        for record in read_metric_records(tmp_path)
        if "validation/cross_entropy" in record
    ]
    assert progress.best_epochs == [1 + int(np.argmin(losses_per_epoch))]
    assert progress.best_scores == pytest.approx([-min(losses_per_epoch)])


@pytest.mark.parametrize("select_by", [*metrics.SCORE_NAMES, "loss"])
def test_the_best_epoch_is_the_best_by_the_selected_score(select_by):
    options = TrainConfig(epochs=3, select_by=select_by)
    values = [
        {**dict.fromkeys(metrics.SCORE_NAMES, 0.9), "cross_entropy": 0.1, select_by: 0.2},
        {**dict.fromkeys(metrics.SCORE_NAMES, 0.1), "cross_entropy": 5.0, select_by: 0.8},
        {**dict.fromkeys(metrics.SCORE_NAMES, 0.9), "cross_entropy": 0.1, select_by: 0.7},
    ]
    if select_by == "loss":
        values = [{"cross_entropy": value} for value in (5.0, 3.0, 4.0)]
    progress = TrainProgress.initial(1)
    for epoch_values in values:
        progress.complete_epoch(options.selection_scores(epoch_values), options)
    assert progress.best_epochs == [2]


def test_the_last_epoch_may_be_used_whatever_its_scores():
    options = TrainConfig(epochs=2, select_by="last")
    progress = TrainProgress.initial(2)
    for loss in (0.1, 5.0):
        progress.complete_epoch(options.selection_scores({"cross_entropy": [loss] * 2}), options)
    assert progress.best_epochs == [2, 2]
    with pytest.raises(ValueError, match="patience needs a select_by other than 'last'"):
        TrainConfig(epochs=2, select_by="last", patience=1)


def test_scores_of_training_dialogues_cannot_select_the_epoch(tiny_data_dir):
    config = make_tiny_config(
        tiny_data_dir, **{"data.validate_on_train": True, "data.folds": "dialogue:3"}
    )
    with pytest.raises(InputError, match=r"validate_on_train needs config\.train"):
        FusionTask.from_data(config)


def test_an_unknown_selection_score_is_refused():
    with pytest.raises(
        ValueError, match=r"select_by='f1'; allowed: weighted_f1, macro_f1, .* loss"
    ):
        TrainConfig(epochs=1, select_by="f1")


@pytest.mark.parametrize("numbers", [[1, 2, 0.5], (1.0, 2.0, 0.5), np.array([1, 2, 0.5])])
def test_class_weights_may_be_a_sequence_of_numbers(numbers):
    expected = imbalance.class_weights("1,2,0.5", COUNTS)
    np.testing.assert_array_equal(imbalance.class_weights(numbers, COUNTS), expected)
    with pytest.raises(InputError, match=r"weights=1,2; allowed: .* 3 positive numbers"):
        imbalance.class_weights([1, 2], COUNTS, "weights")


@pytest.mark.parametrize("method", ["balanced", "effective_number", "1,2,4"])
def test_class_weights_without_a_labeled_item_raise(method):
    with pytest.raises(InputError, match=f"weights={method} needs labels, but no item has one"):
        imbalance.class_weights(method, np.zeros(3, int), "weights")
