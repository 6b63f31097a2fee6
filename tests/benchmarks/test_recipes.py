"""Comparison of recipes: folds without the test split, references, and bad input."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from benchmarks import recipes
from benchmarks.recipes import FoldedSet, Recipe, compare_recipes, predict_by_regression
from mister_jax import data
from mister_jax.data import load_features
from mister_jax.data.folds import load_pooled, make_folds, select_fold
from mister_jax.errors import InputError
from mister_jax.io import read_json

TINY = (
    "train.epochs=1",
    "data.num_buckets=1",
    "model.context_dim=4",
    "model.fusion_dim=4",
    "model.attention_dim=3",
    "model.gru_layers=0",
    "model.fusion_layers=0",
)
SET = FoldedSet("tiny", "dialogue:3")


def test_compares_recipes_on_all_dialogues_but_those_of_the_test_split(
    tiny_data_dir, tmp_path, monkeypatch
):
    baseline = Recipe("two", ("text_only",), ("model.experts=(speech,text)", *TINY))
    other = Recipe("text", ("text_only",), TINY)
    options = {"data_dir": str(tiny_data_dir), "quiet": True}
    result = compare_recipes([SET], [baseline, other], tmp_path, **options)
    rows = {row["name"]: row for row in result["sets"]["tiny"]["rows"]}
    assert list(rows) == [
        "two",
        "text",
        "two, speech expert",
        "two, text expert",
        "logistic regression",
    ]
    assert "difference" not in rows["two"]
    for name in ("text", "two, text expert", "logistic regression"):
        difference = rows[name]["difference"]
        assert difference["low"] <= difference["value"] <= difference["high"]
    for name in ("text", "logistic regression"):
        assert rows[name]["difference"]["value"] == pytest.approx(
            rows[name]["weighted_f1"] - rows["two"]["weighted_f1"]
        )
    lines = (tmp_path / "tiny" / "two" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    predicted = {row["utterance"] for row in predictions}
    # An expert is compared with the mixture on the utterances that have the expert's modality.
    voted = [row for row in predictions if row["label"] and row["experts"]["text"]]
    assert len(voted) < len([row for row in predictions if row["label"]])
    label = [row["label"] for row in voted]
    expert, mixture = (
        f1_score(label, values, average="weighted", zero_division=0)
        for values in (
            [row["experts"]["text"] for row in voted],
            [row["emotion"] for row in voted],
        )
    )
    assert rows["two, text expert"]["weighted_f1"] == pytest.approx(expert)
    assert rows["two, text expert"]["difference"]["value"] == pytest.approx(expert - mixture)
    expected = {
        utterance
        for split in recipes.SPLITS
        for utterance in load_features("tiny", split, tiny_data_dir).utterance_ids.tolist()
    }
    assert predicted == expected
    assert "2 recipes tried: two, text." in (tmp_path / "recipes.md").read_text()
    # A repeated comparison reuses the trained folds.
    monkeypatch.setattr("mister_jax.evaluation.variants.train_group", None)
    assert compare_recipes([SET], [baseline, other], tmp_path, **options) == result


def test_a_choice_is_confirmed_on_the_test_split(tiny_data_dir, tmp_path):
    recipe = Recipe("text", ("text_only",), TINY)
    options = {"data_dir": str(tiny_data_dir), "quiet": True, "num_seeds": 2}
    result = compare_recipes([FoldedSet("tiny", "test")], [recipe], tmp_path, **options)
    config = recipe.config(FoldedSet("tiny", "test"), "", 1)
    assert config.train.select_by == "weighted_f1" and not config.data.validate_on_train
    rows = {row["name"]: row for row in result["sets"]["tiny_test"]["rows"]}
    scores = read_json(tmp_path / "tiny_test" / "text" / "fold_tiny" / "metrics.json")["test"]
    assert rows["text"]["weighted_f1"] == pytest.approx(scores["weighted_f1"])
    by_seed = [seed["weighted_f1"] for seed in scores["seeds"]["of_each"].values()]
    assert rows["text"]["single_seeds"] == pytest.approx(by_seed)
    train, validation, test = (load_features("tiny", split, tiny_data_dir) for split in data.SPLITS)
    regression = recipes._Regression(train, *recipes._choose_regression(train, validation))
    labeled = test.label >= 0
    expected = f1_score(
        test.label[labeled], regression.predict(test)[labeled], average="weighted", zero_division=0
    )
    assert rows["logistic regression"]["weighted_f1"] == pytest.approx(expected)
    assert "tiny, test split:" in (tmp_path / "recipes.md").read_text()


def test_regression_reads_the_neighbors_of_the_same_dialogue(tiny_data_dir):
    features = load_pooled("tiny", tiny_data_dir, recipes.SPLITS)
    folds = make_folds(features, SET.folds)
    train = select_fold(features, folds, 0, "train", validate_on_train=True)
    test = select_fold(features, folds, 0, "test")

    def inputs(split):
        vectors = []
        for name in ("speech", "text"):
            fitted = getattr(train, name)[getattr(train, f"{name}_present")].astype(np.float64)
            values = (getattr(split, name) - fitted.mean(0)) / fitted.std(0)
            vectors.append(np.where(getattr(split, f"{name}_present")[:, None], values, 0))
        vectors = np.concatenate(vectors, 1)
        ends = np.cumsum(split.lengths)
        rows = []
        for start, end in zip(ends - split.lengths, ends, strict=True):
            padded = np.pad(vectors[start:end], ((1, 1), (0, 0)))
            rows += [np.concatenate(padded[index : index + 3]) for index in range(end - start)]
        return np.array(rows)

    labeled = train.label >= 0
    expected = LogisticRegression(C=0.1, max_iter=300).fit(
        inputs(train)[labeled], train.label[labeled]
    )
    actual = recipes._Regression(train, 1, 0.1)
    np.testing.assert_array_equal(actual.predict(test), expected.predict(inputs(test)))


def test_regression_predicts_every_labeled_utterance_once(tiny_data_dir):
    features = load_pooled("tiny", tiny_data_dir, recipes.SPLITS)
    predicted = predict_by_regression(recipes._parts(SET, tiny_data_dir, fold_seed=0))
    labeled = features.utterance_ids[features.label >= 0].tolist()
    assert sorted(utterance for _, utterance in predicted) == sorted(map(str, labeled))


def test_recipe_is_parsed_and_applied():
    recipe = Recipe.parse("wide: text_only model.context_dim=256 model.kernel_sizes=(1,3)")
    assert recipe == Recipe(
        "wide", ("text_only",), ("model.context_dim=256", "model.kernel_sizes=(1,3)")
    )
    config = recipe.config(SET, "/data", 3)
    assert config.model.experts == ("text",)
    assert (config.model.context_dim, config.model.kernel_sizes) == (256, (1, 3))
    assert (config.num_seeds, config.data.data_dir) == (3, "/data")
    assert config.data.fold_splits == "train,validation"
    assert config.train.select_by == "last" and config.data.validate_on_train
    assert Recipe.parse("default") == Recipe("default")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FoldedSet.parse("tiny"), "--set=tiny; needed: DATASET@FOLDS"),
        (lambda: Recipe.parse("../up"), "the name '../up'; allowed: letters"),
        (
            lambda: Recipe.parse("a: nothing").config(SET, "", 1),
            "unknown variant 'nothing'",
        ),
        (
            lambda: Recipe.parse("a: model.widths=3").config(SET, "", 1),
            "recipe a: model.widths: no such field 'widths'",
        ),
        (
            lambda: Recipe.parse("a: model.context_dim=3,4").config(SET, "", 1),
            "recipe a: model.context_dim=3,4; allowed: one value per field",
        ),
        (
            lambda: compare_recipes([SET], [Recipe("a"), Recipe("a")], "/nowhere"),
            "a repeated; needed: each set and recipe once",
        ),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError) as raised:
        call()
    assert message in str(raised.value) and "\n" not in str(raised.value)
