"""Scores, predictions and the missing-modality study of a trained work directory."""

import dataclasses
import json
import re

import numpy as np
import pytest
from sklearn.metrics import f1_score

from mister_jax import data
from mister_jax.data.standardizer import Standardizer
from mister_jax.errors import InputError
from mister_jax.evaluation.missing_modality import drop_modalities, missing_modality_study
from mister_jax.evaluation.results import evaluate
from mister_jax.evaluation.scores import score_predictions
from mister_jax.io import read_json_lines
from mister_jax.models import EXPERTS
from mister_jax.predictor import Predictor


def rows(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(finished_workdir, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    for split in ("validation", "test"):
        evaluate(finished_workdir, split, output=output, quiet=True)
    return output


def test_files_hold_each_split_once(finished_workdir, evaluated, tiny_data_dir):
    evaluate(finished_workdir, "test", output=evaluated, quiet=True)
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert set(metrics) == {"validation", "test"}
    for split in metrics:
        features = data.load_features("tiny", split, tiny_data_dir)
        found = [row["utterance"] for row in rows(evaluated) if row["split"] == split]
        assert found == features.utterance_ids.tolist()
    assert (evaluated / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_those_of_the_predictions(evaluated):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    for split, found in metrics.items():
        pairs = [
            (row["label"], row["predicted"])
            for row in rows(evaluated)
            if row["split"] == split and row["label"] is not None
        ]
        label, predicted = zip(*pairs, strict=True)
        expected = f1_score(label, predicted, average="weighted", zero_division=0)
        assert found["weighted_f1"] == pytest.approx(expected)
        assert found["reference_scores"]["bayes"]["weighted_f1"] > 0


def test_validation_score_is_that_of_the_training(finished_workdir, evaluated):
    lines = (finished_workdir / "metrics.jsonl").read_text().splitlines()
    best = max(json.loads(line).get("validation/weighted_f1", 0) for line in lines)
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert metrics["validation"]["weighted_f1"] == pytest.approx(best)


@pytest.mark.devices
def test_devices_do_not_change_predictions(finished_workdir, evaluated):
    predictor = Predictor(finished_workdir)
    assert predictor.partitioner.num_shards == 8
    found = predictor(predictor.task.features("test"), quiet=True)
    told = [row for row in rows(evaluated) if row["split"] == "test"]
    gate = [[row["gate"][name] for name in EXPERTS] for row in told]
    np.testing.assert_allclose(found["gate"], gate, atol=1e-5)


def test_another_dataset_is_told_apart(finished_workdir, tiny_data_dir, tmp_path):
    features = data.load_features("tiny", "test", tiny_data_dir)
    ids = np.array([f"a\u2028b{index}" for index in range(len(features.label))])
    other = dataclasses.replace(features, name="other", utterance_ids=ids)
    data.write_features({"test": other}, "other", tiny_data_dir, overwrite=True)
    for dataset in ("tiny", "other", "other"):
        evaluate(finished_workdir, "test", dataset=dataset, output=tmp_path, quiet=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {key: found["dataset"] for key, found in metrics.items()} == {
        "test": "tiny",
        "other/test": "other",
    }
    assert all(found["checkpoint"]["epoch"] for found in metrics.values())
    found = [
        (row["dataset"], row["utterance"])
        for row in read_json_lines(tmp_path / "predictions.jsonl")
    ]
    assert found == [("tiny", name) for name in features.utterance_ids] + [
        ("other", name) for name in ids
    ]


@pytest.mark.parametrize("name", ["metrics.json", "predictions.jsonl", "missing_modality.json"])
def test_damaged_results_are_named(finished_workdir, tmp_path, name):
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
        ('{"format": 2, "class_names": []}', "damaged .KeyError"),
    ],
)
def test_a_damaged_description_of_the_model_is_named(finished_workdir, tmp_path, content, message):
    (tmp_path / "config.json").write_text((finished_workdir / "config.json").read_text())
    if content is not None:
        (tmp_path / "model.json").write_text(content)
    with pytest.raises(InputError, match=f"model.json: {message}") as error:
        evaluate(tmp_path, "test", quiet=True)
    assert "\n" not in str(error.value)


def test_a_prediction_is_a_distribution_and_missing_experts_have_no_weight(
    evaluated,
    tiny_data_dir,
):
    features = data.load_features("tiny", "test", tiny_data_dir)
    found = [row for row in rows(evaluated) if row["split"] == "test"]
    assert not features.speech_present.all()
    for row, speech in zip(found, features.speech_present, strict=True):
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert sum(row["gate"].values()) == pytest.approx(1, abs=1e-5)
        assert max(row["probabilities"], key=row["probabilities"].get) == row["predicted"]
        assert (row["experts"]["speech"] is not None) == speech
        assert (row["gate"]["speech"] > 0) == speech


def test_a_report_shows_the_scores_and_the_checkpoint(finished_workdir, tmp_path):
    found = evaluate(finished_workdir, "test", output=tmp_path, report=True, quiet=True)
    text = (tmp_path / "report.html").read_text()
    assert f"{found['weighted_f1']:.3f}" in text
    assert f"epoch {found['checkpoint']['epoch']} of 2" in text
    assert re.search(r"saved \d{4}-\d\d-\d\d \d\d:\d\d UTC", text)


def test_a_report_has_a_study_of_its_checkpoint(finished_workdir, tmp_path):
    def reported():
        evaluate(finished_workdir, "test", output=tmp_path, report=True, quiet=True)
        return (tmp_path / "report.html").read_text()

    assert 'id="missing"' in reported()
    path = tmp_path / "missing_modality.json"
    study = json.loads(path.read_text())
    dropped = {(point["drop_speech"] > 0, point["drop_text"] > 0) for point in study["points"]}
    assert dropped == {(True, False), (False, True)}
    # What was measured is kept; what is of another checkpoint is measured anew.
    study["points"] = [{**study["points"][0], "weighted_f1": 0.1234}]
    path.write_text(json.dumps(study))
    assert "0.123" in reported()
    # Another run in the same folder, whose best epoch is the same.
    other = {**study["checkpoint"], "weighted_f1": 0.123}
    path.write_text(json.dumps({**study, "checkpoint": other}))
    assert "0.123" not in reported()


def test_dropping_flags_the_chosen_share(tiny_data_dir):
    features = data.load_features("tiny", "train", tiny_data_dir)
    dropped = drop_modalities(features, 0.5, 0.0, seed=0)
    assert (dropped.text_present == features.text_present).all()
    assert not (dropped.speech_present & ~features.speech_present).any()
    share = 1 - dropped.speech_present.sum() / features.speech_present.sum()
    assert share == pytest.approx(0.5, abs=0.15)


def test_dropping_to_zeros_tells_the_model_nothing(tiny_data_dir):
    features = data.load_features("tiny", "train", tiny_data_dir)
    standardizer = Standardizer.fit(features.speech[features.speech_present])
    zero_fill_values = {"speech": standardizer.mean, "text": 0.0}
    dropped = drop_modalities(features, 0.5, 0.3, seed=0, zero_fill_values=zero_fill_values)
    flagged = drop_modalities(features, 0.5, 0.3, seed=0)
    for modality in ("speech", "text"):
        present = getattr(features, f"{modality}_present")
        assert (getattr(dropped, f"{modality}_present") == present).all()
        before, after = getattr(features, modality), getattr(dropped, modality)
        assert after.dtype == before.dtype
        kept = getattr(flagged, f"{modality}_present")
        assert (after[kept] == before[kept]).all()
        read = standardizer(after) if modality == "speech" else after
        assert (read[present & ~kept] == 0).all()


def test_missing_modality_study(finished_workdir, evaluated):
    points = missing_modality_study(
        finished_workdir, "test", drop_speech=[0.0, 1.0], draws=2, output=evaluated, quiet=True
    )
    complete = json.loads((evaluated / "metrics.json").read_text())["test"]["weighted_f1"]
    assert points[0]["weighted_f1"] == pytest.approx(complete)
    assert points[0]["deviation"] == points[1]["deviation"] == 0
    assert (evaluated / "missing_modality.png").exists()
    assert json.loads((evaluated / "missing_modality.json").read_text())["points"] == points


def test_a_study_with_zeros_stands_beside_the_other(finished_workdir, tiny_data_dir, tmp_path):
    both = {"drop_speech": [1.0], "drop_text": [1.0], "draws": 1, "output": tmp_path, "quiet": True}
    flagged = missing_modality_study(finished_workdir, "test", **both)
    (zeros,) = missing_modality_study(finished_workdir, "test", as_zeros=True, **both)
    for name, points in (("missing_modality", flagged), ("missing_modality_as_zeros", [zeros])):
        assert json.loads((tmp_path / f"{name}.json").read_text())["points"] == points
        assert (tmp_path / f"{name}.png").exists()
    features = data.load_features("tiny", "test", tiny_data_dir)
    nothing = dataclasses.replace(
        features, speech=np.zeros_like(features.speech), text=np.zeros_like(features.text)
    )
    expected = score_predictions(nothing, Predictor(finished_workdir)(nothing, quiet=True))
    assert zeros["weighted_f1"] == pytest.approx(expected["weighted_f1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_speech": [1.5]}, r"drop_speech=\[1.5\]; allowed are 0 <= rate <= 1"),
        ({"drop_speech": [0.1, 0.2], "drop_text": [0.1, 0.2, 0.3]}, "2 rates; allowed are 1 or 3"),
    ],
)
def test_rates_that_make_no_sense_are_refused(finished_workdir, options, message):
    with pytest.raises(InputError, match=message):
        missing_modality_study(finished_workdir, "test", quiet=True, **options)


def test_a_split_that_is_not_there_is_named(finished_workdir):
    with pytest.raises(InputError, match="dev"):
        evaluate(finished_workdir, "dev", quiet=True)


def test_a_dataset_that_does_not_fit_the_model_is_refused(finished_workdir, tiny_data_dir):
    splits = data.generate_features(0, {"test": 2}, num_classes=3, speech_dim=9, text_dim=7)
    data.write_features(splits, "wider", tiny_data_dir, overwrite=True)
    with pytest.raises(InputError, match="wider, split test: speech width 9; the model takes 6"):
        evaluate(finished_workdir, "test", dataset="wider", quiet=True)


def test_a_folder_that_is_no_workdir_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config.json: no such file"):
        evaluate(tmp_path, "test", quiet=True)


@pytest.mark.parametrize(
    "class_names", [("negative", "positive"), ("non_negative", "negative"), ("calm", "angry")]
)
def test_scores_of_sentiment_go_by_the_names_of_the_classes(tiny_data_dir, class_names):
    features = data.load_features("tiny", "test", tiny_data_dir)
    count = len(features.label)
    label = (np.arange(count) % 2).astype(np.int32)
    positive = label == (1 if class_names[1] == "positive" else 0)
    two = dataclasses.replace(
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
    found = score_predictions(two, predictions)
    if class_names == ("calm", "angry"):
        assert "sentiment" not in found
    else:
        assert {row["weighted_f1"] for row in found["sentiment"].values()} == {1.0}
    assert found["experts"]["fusion"]["weighted_f1"] == 1.0
