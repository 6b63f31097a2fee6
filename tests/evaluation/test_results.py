"""Scores, predictions and the missing-modality study of a trained work directory."""

import collections
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from sklearn.metrics import f1_score

from mister_jax import data, metrics
from mister_jax import predictor as predictor_module
from mister_jax.calibration import (
    CALIBRATION_FILE,
    Calibration,
    fit_calibration,
    write_calibration,
)
from mister_jax.data.standardizer import Standardizer
from mister_jax.errors import InputError
from mister_jax.evaluation.calibration import fit_on_validation
from mister_jax.evaluation.missing_modality import drop_modalities, missing_modality_study
from mister_jax.evaluation.results import evaluate
from mister_jax.evaluation.scores import score_predictions
from mister_jax.io import read_json_lines, write_json
from mister_jax.models import EXPERTS
from mister_jax.predictor import Predictor
from mister_jax.workdir import FORMAT
from tests.helpers.training import read_validation_scores, write_untrained_workdir


def read_predictions(folder, split):
    """Returns the lines of `predictions.jsonl` of one split."""
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def results_folder(finished_workdir, tmp_path_factory):
    """A folder with the results of the evaluation on two splits."""
    output = tmp_path_factory.mktemp("results")
    for split in ("validation", "test"):
        evaluate(finished_workdir, split, output=output, quiet=True)
    return output


def test_results_hold_each_split_once(finished_workdir, results_folder, tiny_data_dir):
    evaluate(finished_workdir, "test", output=results_folder, quiet=True)
    metrics = read_metrics(results_folder)
    assert set(metrics) == {"validation", "test"}
    for split in metrics:
        features = data.load_features("tiny", split, tiny_data_dir)
        ids = [row["utterance"] for row in read_predictions(results_folder, split)]
        assert ids == features.utterance_ids.tolist()
    assert (results_folder / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_scores_agree_with_the_predictions(results_folder):
    for split, scores in read_metrics(results_folder).items():
        pairs = [
            (row["label"], row["emotion"])
            for row in read_predictions(results_folder, split)
            if row["label"] is not None
        ]
        label, predicted = zip(*pairs, strict=True)
        expected = f1_score(label, predicted, average="weighted", zero_division=0)
        assert scores["weighted_f1"] == pytest.approx(expected)
        for name in metrics.SCORE_NAMES:
            interval = scores["intervals"][name]
            assert interval["low"] < scores[name] < interval["high"]
        assert scores["reference_scores"]["bayes"]["weighted_f1"] > 0


def test_the_validation_score_is_that_of_the_training(finished_workdir, results_folder):
    best = max(read_validation_scores(finished_workdir))
    assert read_metrics(results_folder)["validation"]["weighted_f1"] == pytest.approx(best)


def test_a_split_is_predicted_with_the_program_of_another_split(
    tiny_data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(predictor_module, "_shared_programs", collections.deque(maxlen=1))
    workdir = write_untrained_workdir(tmp_path / "run", tiny_data_dir, "tiny")
    predictor = Predictor(workdir)
    short, long = sorted(
        (predictor.task.features(split) for split in ("validation", "test")),
        key=lambda features: features.lengths.max(),
    )
    batches = predictor.task.batched(short, num_shards=1)
    assert batches.shapes != predictor.task.batched(long, num_shards=1).shapes
    predictor(long, quiet=True)
    program = predictor._programs.predict.function
    num_programs = program._cache_size()
    actual = predictor(short, quiet=True)
    assert program._cache_size() == num_programs
    expected = predictor.predict_batches(batches.batches(), batches.steps, short, quiet=True)
    assert actual.keys() == expected.keys()
    for name, values in actual.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5, err_msg=name)


@pytest.mark.devices
def test_devices_do_not_change_predictions(finished_workdir, results_folder):
    predictor = Predictor(finished_workdir)
    assert predictor.partitioner.num_shards == 8
    predictions = predictor(predictor.task.features("test"), quiet=True)
    rows = read_predictions(results_folder, "test")
    expected = [[row["gate"][name] for name in EXPERTS] for row in rows]
    np.testing.assert_allclose(predictions["gate"], expected, atol=1e-5)


def test_results_of_another_dataset_are_kept_apart(finished_workdir, tiny_data_dir, tmp_path):
    features = data.load_features("tiny", "test", tiny_data_dir)
    ids = np.array([f"a\u2028b{index}" for index in range(len(features.label))])
    other = dataclasses.replace(features, name="other", utterance_ids=ids)
    data.write_features({"test": other}, "other", tiny_data_dir, overwrite=True)
    for dataset in ("tiny", "other", "other"):
        evaluate(finished_workdir, "test", dataset=dataset, output=tmp_path, quiet=True)
    metrics = read_metrics(tmp_path)
    datasets = {key: scores["dataset"] for key, scores in metrics.items()}
    assert datasets == {"test": "tiny", "other/test": "other"}
    assert all(scores["checkpoint"]["epoch"] for scores in metrics.values())
    utterances = [
        (row["dataset"], row["utterance"])
        for row in read_json_lines(tmp_path / "predictions.jsonl")
    ]
    assert utterances == [("tiny", name) for name in features.utterance_ids] + [
        ("other", name) for name in ids
    ]


@pytest.mark.parametrize("name", ["metrics.json", "predictions.jsonl", "missing_modality.json"])
def test_damaged_results_are_refused(finished_workdir, tmp_path, name):
    (tmp_path / name).write_text('{"test": {"weigh')
    with pytest.raises(InputError, match=f"{name}: .*damaged") as error:
        evaluate(finished_workdir, "test", output=tmp_path, report=True, quiet=True)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "damaged"),
        ('{"class_names": ["jo', "damaged"),
        ("[1]", "damaged .it contains a list"),
        (f'{{"format": {FORMAT}, "class_names": []}}', "damaged .KeyError"),
    ],
)
def test_a_damaged_model_description_is_refused(finished_workdir, tmp_path, content, message):
    (tmp_path / "config.json").write_text((finished_workdir / "config.json").read_text())
    if content is not None:
        (tmp_path / "model.json").write_text(content)
    with pytest.raises(InputError, match=f"model.json: {message}") as error:
        evaluate(tmp_path, "test", quiet=True)
    assert "\n" not in str(error.value)


def test_a_workdir_of_another_version_is_refused(finished_workdir, tmp_path):
    (tmp_path / "config.json").write_text((finished_workdir / "config.json").read_text())
    description = json.loads((finished_workdir / "model.json").read_text())
    for changes in ({"format": 1}, {"format": None}):
        (tmp_path / "model.json").write_text(json.dumps(description | changes))
        with pytest.raises(InputError, match="written by an older version of mister_jax") as error:
            evaluate(tmp_path, "test", quiet=True)
        assert "\n" not in str(error.value)
    (tmp_path / "model.json").write_text(json.dumps(description | {"format": FORMAT + 1}))
    with pytest.raises(InputError, match="written by a newer version of mister_jax"):
        evaluate(tmp_path, "test", quiet=True)


@pytest.fixture
def run(finished_workdir, tmp_path):
    """A finished run without calibration, which the test may change."""
    folder = shutil.copytree(finished_workdir, tmp_path / "run")
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)
    return folder


def read_probabilities(folder, split="test"):
    rows = read_predictions(folder, split)
    return np.array([list(row["probabilities"].values()) for row in rows])


@pytest.mark.parametrize("first_split", ["validation", "test"])
def test_the_first_evaluation_fits_the_temperature_on_validation(run, first_split):
    evaluate(run, first_split, quiet=True)
    calibration = Predictor(run).calibration
    uncalibrated = Predictor(run, calibrate=False)
    validation = uncalibrated.task.features("validation")
    probabilities = uncalibrated(validation, quiet=True)["probabilities"]
    assert calibration == fit_calibration(probabilities, validation.label)
    assert calibration.bias is None and calibration.temperature != 1
    written = (run / CALIBRATION_FILE).read_text()
    for split in ("validation", "test"):
        summary = evaluate(run, split, quiet=True)["calibration"]
        assert summary["temperature"] == calibration.temperature
        assert summary["calibrated"].keys() == summary["uncalibrated"].keys()
    assert (run / CALIBRATION_FILE).read_text() == written
    summary = read_metrics(run)["validation"]["calibration"]
    before, after = (
        summary[version]["negative_log_likelihood"] for version in ("uncalibrated", "calibrated")
    )
    difference = summary["difference"]["negative_log_likelihood"]
    assert difference["value"] == pytest.approx(after["value"] - before["value"])
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert after["value"] < before["value"] and after["low"] <= after["value"] <= after["high"]


def test_calibration_is_applied_to_predictions_and_can_be_switched_off(run):
    scores = evaluate(run, "test", calibrate=False, quiet=True)
    assert not (run / CALIBRATION_FILE).exists()
    assert list(scores["calibration"]) == ["uncalibrated"]
    before = read_probabilities(run)
    calibrated = evaluate(run, "test", quiet=True)
    after = read_probabilities(run)
    expected = Predictor(run).calibration(before)
    np.testing.assert_allclose(after, expected, atol=1e-5)
    assert np.abs(after - before).max() > 1e-3
    assert calibrated["weighted_f1"] == scores["weighted_f1"]
    assert calibrated["calibration"]["uncalibrated"] == scores["calibration"]["uncalibrated"]
    value = calibrated["calibration"]["calibrated"]["brier_score"]["value"]
    assert calibrated["brier_score"] == pytest.approx(value)
    evaluate(run, "test", calibrate=False, quiet=True)
    np.testing.assert_array_equal(read_probabilities(run), before)


def test_changed_validation_data_give_a_warning_and_no_calibration(
    run, tiny_data_dir, tmp_path, caplog
):
    splits = {
        name: data.load_features("tiny", name, tiny_data_dir)
        for name in ("train", "validation", "test")
    }
    splits["validation"] = dataclasses.replace(splits["test"], split="validation")
    data.write_features(splits, "tiny", tmp_path)
    for split, has_changed in (("test", False), ("validation", True)):
        caplog.clear()
        evaluate(run, split, data_dir=tmp_path, output=tmp_path, quiet=True)
        warning = "dataset tiny: the split validation has changed since the training\n"
        assert (warning in caplog.text) == has_changed
        assert "calibration.json is not written: dataset tiny: the split val" in caplog.text
    assert not (run / CALIBRATION_FILE).exists()
    with pytest.raises(InputError, match="the split validation has changed since the training"):
        evaluate(run, "test", data_dir=tmp_path, fit_calibration="bias", quiet=True)


def test_a_calibration_that_makes_a_split_worse_is_reported(run, caplog):
    evaluate(run, "validation", quiet=True)
    assert "makes the probabilities worse" not in caplog.text
    write_calibration(run, Calibration(0.05), Predictor(run).progress)
    scores = evaluate(run, "test", quiet=True)
    assert scores["calibration"]["difference"]["negative_log_likelihood"]["low"] > 0
    assert "dataset tiny, split test: calibration makes the probabilities worse" in caplog.text


def test_biases_are_fitted_on_request(run):
    scores = evaluate(run, "test", fit_calibration="bias", quiet=True)
    assert list(scores["calibration"]["bias"]) == list(scores["per_class"])
    assert Predictor(run).calibration.bias is not None
    evaluate(run, "validation", fit_calibration="temperature", quiet=True)
    assert Predictor(run).calibration.bias is None
    with pytest.raises(InputError, match="fit_calibration='warm'; allowed: 'temperature', 'bias'"):
        evaluate(run, "test", fit_calibration="warm", quiet=True)


def test_a_calibration_of_other_parameters_is_fitted_again(run):
    write_calibration(run, Calibration(9.0), {"epoch": 77})
    assert Predictor(run).calibration is None
    assert evaluate(run, "test", quiet=True)["calibration"]["temperature"] != 9.0


def test_without_validation_data_the_evaluation_is_not_calibrated(
    run, tiny_data_dir, tmp_path, caplog
):
    test = data.load_features("tiny", "test", tiny_data_dir)
    other = dataclasses.replace(test, name="elsewhere")
    data.write_features({"test": other}, "elsewhere", tmp_path / "data")
    options = {"dataset": "elsewhere", "data_dir": str(tmp_path / "data"), "quiet": True}
    scores = evaluate(run, "test", output=tmp_path / "results", **options)
    assert list(scores["calibration"]) == ["uncalibrated"]
    assert f"{CALIBRATION_FILE} is not written" in caplog.text
    with pytest.raises(InputError, match="tiny"):
        evaluate(run, "test", fit_calibration="temperature", **options)


def test_without_labels_in_validation_there_is_no_calibration(run, monkeypatch, caplog):
    predictor = Predictor(run)
    validation = predictor.task.features("validation")
    unlabeled = dataclasses.replace(validation, label=np.full_like(validation.label, -1))
    monkeypatch.setattr(predictor.task, "features", lambda split: unlabeled)
    (run / "data.json").unlink()  # has the fingerprint of the labeled split
    fit_on_validation(predictor, quiet=True)
    assert predictor.calibration is None and not (run / CALIBRATION_FILE).exists()
    assert "no utterance of validation has a label" in caplog.text


def test_probabilities_sum_to_1_and_missing_experts_have_no_weight(results_folder, tiny_data_dir):
    features = data.load_features("tiny", "test", tiny_data_dir)
    rows = read_predictions(results_folder, "test")
    assert not features.speech_present.all()
    for row, has_speech in zip(rows, features.speech_present, strict=True):
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert sum(row["gate"].values()) == pytest.approx(1, abs=1e-5)
        assert max(row["probabilities"], key=row["probabilities"].get) == row["emotion"]
        assert (row["experts"]["speech"] is not None) == has_speech
        assert (row["gate"]["speech"] > 0) == has_speech


def test_a_report_shows_the_scores_and_the_checkpoint(finished_workdir, tmp_path):
    scores = evaluate(finished_workdir, "test", output=tmp_path, report=True, quiet=True)
    text = (tmp_path / "report.html").read_text()
    assert f"{scores['weighted_f1']:.3f}" in text
    assert f"epoch {scores['checkpoint']['epoch']} of 2, the best on validation" in text
    assert re.search(r"saved \d{4}-\d\d-\d\d \d\d:\d\d UTC", text)


def test_a_report_has_a_missing_modality_study_of_its_checkpoint(finished_workdir, tmp_path):
    def make_report():
        evaluate(finished_workdir, "test", output=tmp_path, report=True, quiet=True)
        return (tmp_path / "report.html").read_text()

    assert 'id="missing"' in make_report()
    path = tmp_path / "missing_modality.json"
    study = json.loads(path.read_text())
    dropped = {(point["drop_speech"] > 0, point["drop_text"] > 0) for point in study["points"]}
    assert dropped == {(True, False), (False, True)}
    # A stored study of the same checkpoint is reused.
    study["points"] = [{**study["points"][0], "weighted_f1": 0.9876}]
    path.write_text(json.dumps(study))
    assert "0.988" in make_report()
    # A study of other features of this split, such as adapted features, is replaced.
    path.write_text(json.dumps({**study, "fingerprint": "0123456789abcdef"}))
    assert "0.988" not in make_report()
    # A study of another run in the same folder, with the same best epoch, is replaced.
    other_checkpoint = {**study["checkpoint"], "weighted_f1": 0.123}
    path.write_text(json.dumps({**study, "checkpoint": other_checkpoint}))
    assert "0.988" not in make_report()


def test_dropping_removes_the_chosen_share_of_a_modality(tiny_data_dir):
    features = data.load_features("tiny", "train", tiny_data_dir)
    dropped = drop_modalities(features, 0.5, 0.0, seed=0)
    assert (dropped.text_present == features.text_present).all()
    assert not (dropped.speech_present & ~features.speech_present).any()
    share = 1 - dropped.speech_present.sum() / features.speech_present.sum()
    assert share == pytest.approx(0.5, abs=0.15)


def test_dropping_to_zeros_keeps_the_presence_flags(tiny_data_dir):
    features = data.load_features("tiny", "train", tiny_data_dir)
    standardizer = Standardizer.fit(features.speech[features.speech_present])
    zero_fill_values = {"speech": standardizer.mean, "text": 0.0}
    zeroed = drop_modalities(features, 0.5, 0.3, seed=0, zero_fill_values=zero_fill_values)
    flagged = drop_modalities(features, 0.5, 0.3, seed=0)
    for modality in ("speech", "text"):
        present = getattr(features, f"{modality}_present")
        assert (getattr(zeroed, f"{modality}_present") == present).all()
        before, after = getattr(features, modality), getattr(zeroed, modality)
        assert after.dtype == before.dtype
        remaining = getattr(flagged, f"{modality}_present")
        assert (after[remaining] == before[remaining]).all()
        model_input = standardizer(after) if modality == "speech" else after
        assert (model_input[present & ~remaining] == 0).all()


def test_missing_modality_study(finished_workdir, results_folder):
    points = missing_modality_study(
        finished_workdir, "test", drop_speech=[0.0, 1.0], draws=2, output=results_folder, quiet=True
    )
    complete = read_metrics(results_folder)["test"]["weighted_f1"]
    assert points[0]["weighted_f1"] == pytest.approx(complete)
    assert points[0]["deviation"] == points[1]["deviation"] == 0
    assert points[0]["loss"] == pytest.approx({"value": 0, "low": 0, "high": 0})
    assert (results_folder / "missing_modality.png").exists()
    study = json.loads((results_folder / "missing_modality.json").read_text())
    assert study["points"] == points


def test_a_study_with_zeros_has_files_of_its_own(finished_workdir, tiny_data_dir, tmp_path):
    options = {"drop_speech": [1.0], "drop_text": [1.0], "draws": 1}
    options |= {"output": tmp_path, "quiet": True}
    flagged = missing_modality_study(finished_workdir, "test", **options)
    (zeroed,) = missing_modality_study(finished_workdir, "test", as_zeros=True, **options)
    for name, points in (("missing_modality", flagged), ("missing_modality_as_zeros", [zeroed])):
        assert json.loads((tmp_path / f"{name}.json").read_text())["points"] == points
        assert (tmp_path / f"{name}.png").exists()
    features = data.load_features("tiny", "test", tiny_data_dir)
    zeros = dataclasses.replace(
        features, speech=np.zeros_like(features.speech), text=np.zeros_like(features.text)
    )
    expected = score_predictions(zeros, Predictor(finished_workdir)(zeros, quiet=True))
    assert zeroed["weighted_f1"] == pytest.approx(expected["weighted_f1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_speech": [1.5]}, r"drop_speech=\[1.5\]; allowed: rates from 0 to 1"),
        ({"drop_speech": [0.1, 0.2], "drop_text": [0.1, 0.2, 0.3]}, "2 rates; allowed: 1 or 3"),
    ],
)
def test_unusable_drop_rates_are_refused(finished_workdir, options, message):
    with pytest.raises(InputError, match=message):
        missing_modality_study(finished_workdir, "test", quiet=True, **options)


def test_a_missing_split_is_refused(finished_workdir):
    with pytest.raises(InputError, match="dev"):
        evaluate(finished_workdir, "dev", quiet=True)


def test_features_of_another_dimension_are_refused(finished_workdir, tiny_data_dir):
    splits = data.generate_features(0, {"test": 2}, num_classes=3, speech_dim=9, text_dim=7)
    data.write_features(splits, "wider", tiny_data_dir, overwrite=True)
    with pytest.raises(InputError, match="wider, split test: speech width 9; the model takes 6"):
        evaluate(finished_workdir, "test", dataset="wider", quiet=True)


def test_a_folder_without_a_training_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config.json: no such file"):
        evaluate(tmp_path, "test", quiet=True)


def test_a_config_with_missing_fields_is_refused(finished_workdir, tmp_path):
    values = json.loads((finished_workdir / "config.json").read_text())
    del values["seed"], values["data"]["name"]
    write_json(tmp_path / "config.json", values)
    with pytest.raises(InputError, match=r"config.json: seed, data.name missing; needed: the"):
        evaluate(tmp_path, "test", quiet=True)


@pytest.mark.parametrize(
    "class_names", [("negative", "positive"), ("non_negative", "negative"), ("calm", "angry")]
)
def test_sentiment_scores_need_classes_named_positive_or_negative(tiny_data_dir, class_names):
    features = data.load_features("tiny", "test", tiny_data_dir)
    count = len(features.label)
    label = (np.arange(count) % 2).astype(np.int32)
    positive = label == (1 if class_names[1] == "positive" else 0)
    two_classes = dataclasses.replace(
        features,
        class_names=class_names,
        label=label,
        score=np.where(positive, 1.5, -0.5).astype(np.float32),
    )
    predictions = {
        "probabilities": np.eye(2)[label],
        "gate": np.full((count, 3), 1 / 3),
        "expert_probabilities": np.stack([np.eye(2)[label]] * 3, axis=1),
        "expert_present": np.ones((count, 3), bool),
    }
    scores = score_predictions(two_classes, predictions)
    if class_names == ("calm", "angry"):
        assert "sentiment" not in scores
    else:
        assert {row["weighted_f1"] for row in scores["sentiment"].values()} == {1.0}
    assert scores["experts"]["fusion"]["weighted_f1"] == 1.0
