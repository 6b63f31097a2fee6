"""Sentiment as a number: scores, loss, training, and bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

from mister_jax import data, losses, metrics
from mister_jax.errors import InputError
from mister_jax.evaluation import sweep
from mister_jax.evaluation.results import evaluate
from mister_jax.models import MisterE, MisterEConfig
from mister_jax.training.loop import train
from tests.helpers.training import make_tiny_config


@pytest.fixture
def rng():
    return np.random.default_rng(0)


SMALL = {
    "num_classes": 3,
    "speech_dim": 6,
    "text_dim": 7,
    "context_dim": 8,
    "fusion_dim": 8,
    "fusion_layers": 1,
    "attention_dim": 6,
    "gru_layers": 1,
}


def test_scores_equal_those_of_scikit_learn_and_scipy(rng):
    score = np.round(rng.uniform(-3, 3, 200) * 5) / 5
    predicted = score + rng.normal(size=200)
    score[:5] = np.nan
    result = metrics.regression_scores(score, predicted)
    y, p = score[5:], predicted[5:]
    assert result["utterances"] == 195
    assert result["mae"] == pytest.approx(mean_absolute_error(y, p))
    assert result["pearson_r"] == pytest.approx(scipy.stats.pearsonr(y, p)[0])
    for limit, name in ((3, "accuracy_7"), (2, "accuracy_5")):
        rounded = [np.round(np.clip(values, -limit, limit)) for values in (y, p)]
        assert result[name] == pytest.approx(accuracy_score(*rounded))
    nonzero = y != 0
    for name, label, positive in (
        ("negative_nonnegative", y >= 0, p >= 0),
        ("negative_positive_without_zero", y[nonzero] > 0, p[nonzero] > 0),
    ):
        binary = result["binary"][name]
        assert binary["accuracy"] == pytest.approx(accuracy_score(label, positive))
        assert binary["weighted_f1"] == pytest.approx(f1_score(label, positive, average="weighted"))


def test_scores_of_hand_made_values():
    result = metrics.regression_scores(
        np.array([-3.0, -0.4, 0.0, 2.4, np.nan]), np.array([-5.0, 0.0, 0.0, 3.4, 9.0])
    )
    assert result["mae"] == pytest.approx((2 + 0.4 + 0 + 1) / 4)
    assert result["accuracy_7"] == 0.75  # 2.4 is rounded to 2, and 3.4 to 3.
    assert result["accuracy_5"] == 1.0
    assert result["binary"]["negative_nonnegative"]["accuracy"] == 0.75
    assert result["binary"]["negative_positive_without_zero"]["utterances"] == 3


@pytest.mark.parametrize("count", [0, 1, 3])
def test_correlation_is_none_where_it_is_not_defined(count):
    result = metrics.regression_scores(np.ones(count), np.arange(count))
    assert result["utterances"] == count and result.get("pearson_r") is None


@pytest.fixture(scope="module")
def model():
    return MisterE(MisterEConfig(**SMALL, predict_score=True), rngs=nnx.Rngs(0))


def make_batch(rng, length=4):
    mask = np.arange(length) < np.array([[length], [2]])
    speech = rng.normal(size=(2, length, 6)).astype(np.float32)
    text = rng.normal(size=(2, length, 7)).astype(np.float32)
    return speech, text, mask


def test_mixture_score_is_the_gated_sum_and_independent_of_padding(model, rng):
    speech, text, mask = make_batch(rng)
    output = nnx.jit(model)(speech, text, mask)
    assert output.logits.shape == (2, 4, 3) and output.expert_scores.shape == (2, 4, 3)
    expected = (output.gate * output.expert_scores).sum(-1)
    np.testing.assert_allclose(output.score[mask], expected[mask], rtol=1e-6)
    speech[~mask], text[~mask] = 7.0, np.nan
    changed = nnx.jit(model)(speech, text, mask)
    np.testing.assert_allclose(changed.score[mask], output.score[mask], rtol=1e-6)


def test_loss_is_the_mean_absolute_error_and_ignores_missing_scores(model, rng):
    speech, text, mask = make_batch(rng)
    scores = rng.uniform(-3, 3, mask.shape).astype(np.float32)
    scores[0, 1] = np.nan
    output = nnx.jit(model)(speech, text, mask)
    counted = mask & ~np.isnan(scores)
    expected = np.abs(output.score - scores)[counted].mean()
    for expert in range(3):
        expected += np.abs(output.expert_scores[..., expert] - scores)[counted].mean()
    assert float(losses.score_error(output, scores, mask)) == pytest.approx(expected, rel=1e-6)

    def total(model):
        labels = jnp.zeros(mask.shape, int)
        weights = losses.LossWeights(score=1.0)
        return losses.mister_e(model(speech, text, mask), labels, mask, weights, scores=scores)[0]

    gradients = jax.tree.leaves(nnx.jit(nnx.grad(total))(model))
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_score_error_needs_a_model_that_predicts_scores(model, rng):
    speech, text, mask = make_batch(rng)
    output = dataclasses.replace(nnx.jit(model)(speech, text, mask), score=None)
    with pytest.raises(ValueError, match="predict_score=True"):
        losses.score_error(output, np.zeros(mask.shape), mask)


@pytest.fixture(scope="module")
def scored_data_dir(tmp_path_factory):
    """A folder with three datasets. The scores in `scored` are a clipped text dimension or NaN."""
    folder = tmp_path_factory.mktemp("scored")
    splits = data.generate_features(
        seed=3,
        num_dialogues={"train": 40, "validation": 10, "test": 10},
        num_classes=2,
        speech_dim=3,
        text_dim=4,
    )
    scored = {}
    for name, split in splits.items():
        score = np.clip(split.text[:, 0].astype(np.float32), -3, 3)
        score[::7] = np.nan
        scored[name] = dataclasses.replace(split, score=score, class_names=("negative", "positive"))
    data.write_features(scored, "scored", folder)
    data.write_features(splits, "unscored", folder)
    no_scores = np.full_like(scored["validation"].score, np.nan)
    scored["validation"] = dataclasses.replace(scored["validation"], score=no_scores)
    data.write_features(scored, "unscored_validation", folder)
    return folder


def test_training_selects_the_epoch_by_the_error_and_reports_the_scores(scored_data_dir, tmp_path):
    config = make_tiny_config(
        scored_data_dir,
        "scored,score",
        **{
            "model.experts": ("text",),
            "model.input_dropout": 0.0,
            "model.modality_dropout": 0.0,
            "model.gru_layers": 0,
            "train.epochs": 10,
            "optimizer.learning_rate": 0.02,
        },
    )
    assert train(config, tmp_path, quiet=True).finished
    scores = evaluate(tmp_path, "test", report=True, quiet=True)
    regression = scores["regression"]
    features = data.load_features("scored", "test", scored_data_dir)
    spread = np.nanmean(np.abs(features.score - np.nanmedian(features.score)))
    assert regression["mae"] < 0.6 * spread and regression["pearson_r"] > 0.8
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    error = np.abs(np.array([row["score"] for row in rows]) - features.score)
    assert np.nanmean(error) == pytest.approx(regression["mae"], abs=1e-5)
    assert "Pearson" in (tmp_path / "report.html").read_text()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    errors = [record["validation/mae"] for record in records if "validation/mae" in record]
    best = evaluate(tmp_path, "validation", quiet=True)["regression"]["mae"]
    assert min(errors) == pytest.approx(best, abs=1e-4)


def test_a_sweep_checks_values_that_depend_on_each_other_together(scored_data_dir):
    config = make_tiny_config(scored_data_dir, "scored")
    grid = ["train.select_by=mae", "model.predict_score=true", "loss.weights.score=0.5,1"]
    axes = [sweep.parse_grid(config, text) for text in grid]
    assert len(sweep.make_variants(config, axes, sweep.grid_points(axes))) == 2
    with pytest.raises(
        InputError, match=r"^train\.select_by=mae: .*needs config\.model\.predict_score"
    ):
        sweep.make_variants(config, axes[:1], sweep.grid_points(axes[:1]))


@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        ("unscored,score", {}, "dataset unscored has no scores"),
        ("unscored_validation,score", {}, "split validation: no utterance has a score"),
        ("scored,score", {"loss.weights.score": 0.0}, r"score=0\.0; needed: a positive number"),
        ("scored", {"loss.weights.score": 1.0}, "needs config.model.predict_score=True"),
        ("scored", {"train.select_by": "mae"}, "select_by=mae needs config.model.predict_score"),
    ],
)
def test_bad_input_is_one_line(scored_data_dir, tmp_path, dataset, changes, message):
    config = make_tiny_config(scored_data_dir, dataset, **changes)
    with pytest.raises(InputError, match=message):
        train(config, tmp_path, quiet=True)
