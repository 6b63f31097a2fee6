"""Cross-validation: folds that resume, pooled scores, and no leak of the test fold."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score, recall_score

from mister_jax import data, metrics
from mister_jax.calibration import CALIBRATION_FILE
from mister_jax.data.folds import load_fold, load_pooled
from mister_jax.errors import InputError
from mister_jax.evaluation import variants
from mister_jax.evaluation.confidence_intervals import DialogueBootstrap, Estimate
from mister_jax.evaluation.cross_validation import (
    cross_validate,
    folds_of_dataset,
    folds_of_datasets,
    pool_predictions,
)
from mister_jax.evaluation.results import evaluate
from mister_jax.io import read_json_lines
from mister_jax.predictor import Predictor
from mister_jax.tasks.fusion import FusionTask
from mister_jax.training.loop import train, train_group
from tests.helpers.training import assert_same_checkpoints, make_tiny_config

SPEC = "dialogue:3"


@pytest.fixture(scope="module")
def config(tiny_data_dir):
    return make_tiny_config(
        tiny_data_dir,
        **{
            "train.epochs": 1,
            "data.standardize": "speech,text",
            "loss.class_weights": "balanced",
            "model.experts": ("speech",),  # A single expert compiles faster.
        },
    )


@pytest.fixture(scope="module")
def cross_validation_workdir(config, tmp_path_factory):
    """A cross-validation that was interrupted in its second fold and then resumed."""
    workdir = tmp_path_factory.mktemp("crossval") / "run"
    trained = []

    def stop_at_second(group, **options):
        trained.append(group.workdirs[0].name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train_group(group, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "train_group", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            cross_validate(folds_of_dataset(config, SPEC), workdir, quiet=True)
        assert cross_validate(folds_of_dataset(config, SPEC), workdir, quiet=True)
    assert trained == ["fold_1", "fold_2", "fold_2", "fold_3"]
    return workdir


def test_pooled_scores_are_those_of_all_test_predictions(cross_validation_workdir, tiny_data_dir):
    result = json.loads((cross_validation_workdir / "crossval.json").read_text())
    lines = (cross_validation_workdir / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    pooled = load_pooled("tiny", tiny_data_dir)
    assert sorted(row["utterance"] for row in rows) == sorted(pooled.utterance_ids.tolist())
    # The reference scores of single splits are not those of the folds.
    assert "reference_scores" in data.load_features("tiny", "test", tiny_data_dir).metadata
    assert "reference_scores" not in pooled.metadata
    labeled = [row for row in rows if row["label"] is not None]
    label, predicted = ([row[key] for row in labeled] for key in ("label", "emotion"))
    assert result["pooled"]["weighted_f1"] == pytest.approx(
        f1_score(label, predicted, average="weighted", zero_division=0)
    )
    assert result["pooled"]["uar"] == pytest.approx(
        recall_score(label, predicted, average="macro", zero_division=0)
    )
    interval = result["pooled_intervals"]["uar"]
    assert interval["low"] <= interval["value"] <= interval["high"]
    scores = [row["macro_f1"] for row in result["folds"]]
    assert result["mean"]["macro_f1"] == pytest.approx(np.mean(scores))
    assert result["deviation"]["macro_f1"] == pytest.approx(np.std(scores, ddof=1))
    table = (cross_validation_workdir / "crossval.md").read_text()
    assert "UA (UAR) | WA (accuracy) | macro F1" in table and "| pooled |" in table
    assert (cross_validation_workdir / "crossval.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def at_once_workdir(config, tmp_path_factory):
    """The same cross-validation with all folds in one program."""
    workdir = tmp_path_factory.mktemp("at_once") / "run"
    cross_validate(folds_of_dataset(config, SPEC), workdir, models_at_once=3, quiet=True)
    return workdir


def test_folds_at_once_give_the_scores_of_folds_in_turn(at_once_workdir, cross_validation_workdir):
    workdirs = (at_once_workdir, cross_validation_workdir)
    result, expected = (json.loads((workdir / "crossval.json").read_text()) for workdir in workdirs)
    assert result == expected
    rows = (read_json_lines(workdir / "predictions.jsonl") for workdir in workdirs)
    for row, expected_row in zip(*rows, strict=True):
        assert row["utterance"] == expected_row["utterance"]
        assert row["probabilities"] == pytest.approx(expected_row["probabilities"], abs=1e-5)


@pytest.mark.parametrize(
    ("models_at_once", "fixture"), [(1, "cross_validation_workdir"), (3, "at_once_workdir")]
)
def test_test_utterances_do_not_reach_training(
    config, tiny_data_dir, tmp_path, request, models_at_once, fixture
):
    # The features of the first test fold are changed. Training on the other folds must give the
    # same bits, even if the runs of other folds train on the changed features at the same time.
    tested_ids = load_fold("tiny", "test", SPEC, 0, tiny_data_dir).utterance_ids
    splits = {}
    for split in data.SPLITS:
        features = data.load_features("tiny", split, tiny_data_dir)
        is_tested = np.isin(features.utterance_ids, tested_ids)
        splits[split] = dataclasses.replace(
            features,
            speech=np.where(is_tested[:, None], 1000 * features.speech, features.speech),
            text=np.where(is_tested[:, None], 7, features.text).astype(features.text.dtype),
        )
    data.write_features(splits, "tiny", tmp_path / "data")
    changed = config.copy_and_resolve_references()
    changed.data.data_dir = str(tmp_path / "data")
    folds = folds_of_dataset(changed, SPEC)
    cross_validate(folds, tmp_path / "run", models_at_once=models_at_once, quiet=True)
    workdir = request.getfixturevalue(fixture)
    assert_same_checkpoints(tmp_path / "run" / "fold_1", workdir / "fold_1")
    standardizers = FusionTask.from_data(folds[0].config).standardizers
    train_split = load_fold("tiny", "train", SPEC, 0, tiny_data_dir)
    present = train_split.speech[train_split.speech_present]
    np.testing.assert_allclose(standardizers["speech"].mean, present.mean(0), rtol=1e-4, atol=1e-5)
    weights = FusionTask.from_data(folds[0].config).constants()["class_weights"]
    counts = np.bincount(train_split.label[train_split.label >= 0], minlength=3)
    np.testing.assert_allclose(weights, counts.sum() / (3 * counts), rtol=1e-6)


def test_datasets_with_splits_of_their_own_are_folds(config, tiny_data_dir, tmp_path):
    splits = {split: data.load_features("tiny", split, tiny_data_dir) for split in data.SPLITS}
    for name, order in (("first", data.SPLITS), ("second", data.SPLITS[::-1])):
        parts = {
            split: dataclasses.replace(splits[source], split=split)
            for split, source in zip(data.SPLITS, order, strict=True)
        }
        data.write_features(parts, name, tmp_path / "data")
    changed = config.copy_and_resolve_references()
    changed.data.data_dir = str(tmp_path / "data")
    result = cross_validate(
        folds_of_datasets(changed, ["first", "second"]), tmp_path / "run", quiet=True
    )
    assert [row["fold"] for row in result["folds"]] == ["fold_first", "fold_second"]
    counts = [(splits[name].label >= 0).sum() for name in ("test", "train")]
    assert [row["utterances"] for row in result["folds"]] == counts


def test_scores_of_numbers_and_raters_are_pooled(tiny_data_dir, tmp_path):
    random = np.random.default_rng(0)
    splits = {}
    for split in data.SPLITS:
        features = data.load_features("tiny", split, tiny_data_dir)
        score = random.uniform(-3, 3, len(features.label)).astype(np.float32)
        score[::5] = np.nan
        ratings = random.integers(0, 4, (len(score), 3)).astype(np.float32)
        dialogues = np.repeat(np.arange(len(features.lengths)), features.lengths)
        metadata = np.array([json.dumps({"speaker": f"s{index % 5}"}) for index in dialogues])
        splits[split] = dataclasses.replace(
            features, score=score, ratings=ratings, utterance_metadata=metadata
        )
    data.write_features(splits, "annotated", tmp_path / "data")
    config = make_tiny_config(
        tmp_path / "data", "annotated,score", **{"train.epochs": 1, "model.experts": ("text",)}
    )
    result = cross_validate(folds_of_dataset(config, "speaker:3"), tmp_path / "run", quiet=True)
    pooled = load_pooled("annotated", tmp_path / "data")
    rows = {row["utterance"]: row for row in read_json_lines(tmp_path / "run/predictions.jsonl")}
    rows = [rows[name] for name in pooled.utterance_ids]
    expected = metrics.regression_scores(pooled.score, np.array([row["score"] for row in rows]))
    assert result["pooled"]["regression"]["utterances"] == expected["utterances"]
    for name in ("mae", "pearson_r", "accuracy_7", "accuracy_5"):
        assert result["pooled"]["regression"][name] == pytest.approx(expected[name], abs=1e-5)
    probabilities = np.array([list(row["probabilities"].values()) for row in rows])
    expected = metrics.rater_scores(pooled.ratings, probabilities)
    assert result["pooled"]["raters"] == pytest.approx(expected, abs=1e-5)
    for name in ("mae", "kl_divergence"):
        by_fold = [row[name] for row in result["folds"]]
        assert result["mean"][name] == pytest.approx(np.mean(by_fold))
    *lines, empty, note = (tmp_path / "run" / "crossval.md").read_text().splitlines()
    assert lines[8].startswith("| fold | MAE | Pearson's r |") and "KL divergence" in lines[8]
    mae = result["pooled"]["regression"]["mae"]
    assert lines[-1].startswith(f"| pooled | {mae:.3f} |") and not empty
    # The intervals resample the speakers.
    assert note == "The intervals of the pooled scores are resampled by speaker."
    assert {row["group"] for row in rows} == {f"s{index}" for index in range(5)}
    assert all(row["metadata"]["speaker"] == row["group"] for row in rows)
    bootstrap = DialogueBootstrap(pool_predictions(rows, pooled.class_names))
    assert len(bootstrap.dialogues) == 5
    predicted = np.array([pooled.class_names.index(row["emotion"]) for row in rows])
    expected = Estimate.from_resamples(*bootstrap.scores(predicted)["uar"])
    interval = result["pooled_intervals"]["uar"]
    assert (interval["low"], interval["high"]) == pytest.approx((expected.low, expected.high))
    with (tmp_path / "run" / "crossval.csv").open() as file:
        assert float(next(csv.DictReader(file))["mae"]) == result["folds"][0]["mae"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tiny", "tiny"], "fold_tiny repeated; needed: unique names"),
        (["tiny", "nothing"], "no dataset 'nothing'"),
    ],
)
def test_unusable_datasets_are_refused_before_any_training(config, names, message):
    with pytest.raises(InputError, match=message):
        folds_of_datasets(config, names)


def test_an_encoder_tuned_on_the_same_dataset_is_reported(config, tiny_data_dir, tmp_path, caplog):
    encoder = {"kind": "tuned", "dataset": "calls", "config": {"data": {"name": "calls"}}}
    for name, trained_on in (("leaks", "calls"), ("clean", "other")):
        encoder["config"]["data"]["name"] = trained_on
        splits = {split: data.load_features("tiny", split, tiny_data_dir) for split in data.SPLITS}
        data.write_features(splits, name, tmp_path, metadata={"text": encoder})
        changed = config.copy_and_resolve_references()
        changed.data.update({"name": name, "data_dir": str(tmp_path)})
        caplog.clear()
        folds_of_dataset(changed, SPEC)
        assert ("fine-tuned on calls" in caplog.text) == (name == "leaks")


def test_a_fold_needs_folds(config):
    changed = config.copy_and_resolve_references()
    changed.data.fold = 1
    with pytest.raises(InputError, match=r"data\.fold=1 needs config\.data\.folds"):
        FusionTask.from_data(changed)


def test_models_of_folds_share_their_programs_but_not_their_standardizers(
    cross_validation_workdir,
):
    first, second = (Predictor(cross_validation_workdir / f"fold_{fold}") for fold in (1, 2))
    features = first.task.features("test")
    batches = list(first.task.batched(features, num_shards=1).batches())
    for batch in batches:
        first.predict_batch(batch)
    program = first._programs.predict.function
    num_programs = program._cache_size()
    actual = [second.predict_batch(batch)["probabilities"] for batch in batches]
    assert program._cache_size() == num_programs
    (model,) = second.models()
    for batch, probabilities in zip(batches, actual, strict=True):
        expected, other = (task.predict(model, batch) for task in (second.task, first.task))
        np.testing.assert_allclose(probabilities, expected["probabilities"], atol=1e-5)
        assert np.abs(probabilities - other["probabilities"]).max() > 1e-4


def test_validation_can_be_added_to_training(config, tiny_data_dir):
    changed = config.copy_and_resolve_references()
    changed.data.validate_on_train = True
    changed.train.select_by = "last"
    task = FusionTask.from_data(changed)
    parts = [data.load_features("tiny", split, tiny_data_dir) for split in ("train", "validation")]
    expected = [name for part in parts for name in part.utterance_ids.tolist()]
    assert task.features("train").utterance_ids.tolist() == expected
    assert task.features("train").split == "train"
    assert len(task.features("validation").label) == len(parts[1].label)
    standardizer = task.standardizers["text"]
    vectors = np.concatenate([part.text[part.text_present] for part in parts])
    np.testing.assert_allclose(standardizer.mean, vectors.mean(0), rtol=1e-4, atol=1e-5)


def test_a_model_that_trained_on_validation_is_not_calibrated(config, tmp_path):
    changed = config.copy_and_resolve_references()
    changed.data.validate_on_train = True
    changed.train.select_by = "last"
    assert train(changed, tmp_path, quiet=True).finished
    scores = evaluate(tmp_path, "test", quiet=True)
    assert "calibrated" not in scores["calibration"]
    assert not (tmp_path / CALIBRATION_FILE).exists()
    with pytest.raises(InputError, match="trained on the validation split"):
        evaluate(tmp_path, "test", fit_calibration="temperature", quiet=True)


def test_a_file_as_the_work_directory_is_refused(config, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(InputError, match="file is a file; allowed: a directory"):
        cross_validate(folds_of_dataset(config, SPEC), path, quiet=True)


def test_a_cross_validation_with_another_config_is_refused(config, cross_validation_workdir):
    changed = config.copy_and_resolve_references()
    changed.seed = 5
    with pytest.raises(InputError, match="created with another config"):
        cross_validate(folds_of_dataset(changed, SPEC), cross_validation_workdir, quiet=True)
