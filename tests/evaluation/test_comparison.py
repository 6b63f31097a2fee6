"""Comparisons of runs: checks of their utterances, paired intervals, and the written files."""

import csv
import io
import json

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score, recall_score

from mister_jax.errors import InputError
from mister_jax.evaluation.comparison import (
    FILES,
    Comparison,
    changed_csv,
    compare_predictions,
    mcnemar_p,
    write_comparison,
)
from mister_jax.evaluation.results import evaluate
from mister_jax.inference.export import export_model
from mister_jax.training.loop import train
from tests.helpers.training import make_tiny_config

CLASSES = ("joy", "anger", "fear")
NUM_DIALOGUES, LENGTH = 12, 6


def make_rows(seed, split="test", accuracy=0.6, dataset="tiny"):
    """Returns rows of `predictions.jsonl`; labels do not depend on the seed."""
    label = np.random.default_rng(0).integers(3, size=(NUM_DIALOGUES, LENGTH))
    random = np.random.default_rng(seed)
    rows = []
    for dialogue in range(NUM_DIALOGUES):
        for position in range(LENGTH):
            probabilities = 0.1 * random.dirichlet(np.ones(3))
            is_right = random.random() < accuracy
            target = label[dialogue, position] if is_right else random.integers(3)
            probabilities[target] += 0.9
            rows.append(
                {
                    "dataset": dataset,
                    "split": split,
                    "dialogue": f"d{dialogue}",
                    "utterance": f"d{dialogue}_{position}",
                    "label": CLASSES[label[dialogue, position]],
                    "emotion": CLASSES[probabilities.argmax()],
                    "probabilities": dict(
                        zip(CLASSES, probabilities.round(6).tolist(), strict=True)
                    ),
                }
            )
    rows[3]["label"] = None
    return rows


def write_run(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(lines)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two runs. The second has another order of its rows, and additional rows of another split."""
    first = write_run(tmp_path / "a", make_rows(1, accuracy=0.5))
    rows = make_rows(2, accuracy=0.8, dataset="other features of the corpus")
    second = write_run(tmp_path / "b", [*make_rows(3, "validation"), *rows[::-1]])
    return first, second


def test_scores_are_those_of_the_labeled_utterances(runs):
    result = compare_predictions(*Comparison.from_runs(runs, "test").predictions)
    labeled = [index for index, row in enumerate(make_rows(1)) if row["label"] is not None]
    rows = {"first": make_rows(1, accuracy=0.5), "second": make_rows(2, accuracy=0.8)}
    label = [rows["first"][index]["label"] for index in labeled]
    predicted = {name: [run[index]["emotion"] for index in labeled] for name, run in rows.items()}
    right = {name: np.array(values) == label for name, values in predicted.items()}
    for name, values in predicted.items():
        scores = {score: row[name] for score, row in result["scores"].items()}
        assert scores["weighted_f1"] == pytest.approx(f1_score(label, values, average="weighted"))
        assert scores["uar"] == pytest.approx(recall_score(label, values, average="macro"))
        per_class = f1_score(label, values, average=None, labels=CLASSES)
        assert [row[name] for row in result["per_class"].values()] == pytest.approx(per_class)
        counts = [row[name] for row in result["dialogues"]]
        assert sum(counts) == right[name].sum()
    assert result["utterances"] == {
        "both": (right["first"] & right["second"]).sum(),
        "only_first": (right["first"] & ~right["second"]).sum(),
        "only_second": (right["second"] & ~right["first"]).sum(),
        "neither": (~right["first"] & ~right["second"]).sum(),
    }
    gains = [abs(row["second"] - row["first"]) for row in result["dialogues"]]
    assert gains == sorted(gains, reverse=True)
    difference = result["scores"]["accuracy"]["difference"]
    assert difference["value"] == pytest.approx(right["second"].mean() - right["first"].mean())
    assert 0 < difference["low"] < difference["value"] < difference["high"]


def test_differences_are_paired(runs):
    comparison = Comparison.from_runs([runs[0], runs[0]], "test")
    result = compare_predictions(*comparison.predictions)
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    rows = [*result["scores"].values(), *result["per_class"].values()]
    assert all(row["difference"] == zero for row in rows)
    assert (result["mcnemar_p"], result["agreement"]) == (1, 1)


@pytest.mark.parametrize("counts", [(0, 0), (3, 3), (1, 9), (12, 4), (400, 350), (5000, 3000)])
def test_mcnemar_is_the_exact_binomial_test(counts):
    expected = binomtest(counts[0], sum(counts)).pvalue if sum(counts) else 1
    assert mcnemar_p(*counts) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_files_of_three_runs(runs, tmp_path):
    third = write_run(tmp_path / "c", make_rows(4))
    comparison = Comparison.from_runs([*runs, third], "test")
    first, *others = comparison.predictions
    results = [compare_predictions(first, other) for other in others]
    write_comparison(comparison, results, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["runs"] == {"A": str(runs[0]), "B": str(runs[1]), "C": str(third)}
    assert [pair["second"] for pair in written["comparisons"]] == ["B", "C"]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO(changed_csv(comparison, {"d0_0": "Hello, you!"}))))
    by_id = [{row["utterance"]: row for row in make_rows(*args)} for args in ((1, "test", 0.5),)]
    assert all(len({row["A"], row["B"], row["C"]}) > 1 for row in rows)
    assert len(rows) == sum(
        np.any([other.predicted != first.predicted for other in others], axis=0)
    )
    for row in rows:
        source = by_id[0][row["utterance"]]
        assert (row["label"], row["A"]) == (source["label"], source["emotion"])
        assert float(row["A_probability"]) == source["probabilities"][row["A"]]
        assert float(row["A_label_probability"]) == source["probabilities"][row["label"]]
        assert row["text"] == ("Hello, you!" if row["utterance"] == "d0_0" else "")


def change_first(rows, **changes):
    return [{**rows[0], **changes}, *rows[1:]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (make_rows(2, "validation"), "b: split 'test' is not evaluated; run `mister-jax evaluate "),
        (
            make_rows(2)[1:],
            r"b: 1 of the 71 labeled utterances of .*a are missing, for example d0_0 \(dialogue",
        ),
        (
            [*make_rows(2), {**make_rows(2)[0], "utterance": "new"}],
            r"a: 1 of the 72 labeled utterances of .*b are missing, for example new \(dialogue",
        ),
        (
            change_first(make_rows(2), label="joy"),
            r"b and .*a: 1 of 71 labels differ, for example joy and fear for utterance d0_0 \(",
        ),
        ([*make_rows(2), make_rows(2)[0]], "utterance d0_0 .* occurs twice"),
        ([{**row, "label": None} for row in make_rows(2)], "split 'test' has no labels"),
        (
            [{**row, "probabilities": {**row["probabilities"], "calm": 0}} for row in make_rows(2)],
            "b: classes anger, calm, fear, joy; needed: the classes of .*a, anger, fear, joy",
        ),
    ],
)
def test_runs_that_cannot_be_compared_give_one_line_errors(tmp_path, rows, message):
    paths = [write_run(tmp_path / "a", make_rows(1)), write_run(tmp_path / "b", rows)]
    with pytest.raises(InputError, match=message) as error:
        Comparison.from_runs(paths, "test")
    assert "\n" not in str(error.value)


def test_datasets_of_a_cross_validation_may_have_the_same_ids(tmp_path):
    rows = [
        [*make_rows(seed, dataset="fold_1"), *make_rows(seed + 1, dataset="fold_2")]
        for seed in (1, 3)
    ]
    paths = [write_run(tmp_path / name, run) for name, run in zip("ab", rows, strict=True)]
    first, _ = Comparison.from_runs(paths, "test").predictions
    assert len(first.dialogue_ids) == 2 * NUM_DIALOGUES
    assert first.dialogue_ids[0] == "fold_1/d0"
    first, _ = Comparison.from_runs(paths, "test", "fold_2").predictions
    assert len(first.dialogue_ids) == NUM_DIALOGUES


def test_folders_without_predictions_give_one_line_errors(runs, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        Comparison.from_runs([runs[0], tmp_path / "nowhere"], "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"run `mister-jax evaluate --workdir=.*empty --split=test"
    ):
        Comparison.from_runs([runs[0], tmp_path / "empty"], "test")
    with pytest.raises(InputError, match="1 runs; needed: 2 to 26"):
        Comparison.from_runs(runs[:1], "test")


def test_a_dialogue_alone_has_no_intervals(tmp_path):
    paths = [
        write_run(tmp_path / name, [row for row in make_rows(seed) if row["dialogue"] == "d1"])
        for name, seed in (("a", 1), ("b", 2))
    ]
    comparison = Comparison.from_runs(paths, "test")
    result = compare_predictions(*comparison.predictions)
    assert result["scores"]["uar"]["difference"]["low"] is None
    write_comparison(comparison, [result], tmp_path / "out")
    assert (tmp_path / "out" / "comparison.png").exists()


def test_scores_from_before_a_longer_training_are_not_used(tiny_data_dir, tmp_path):
    for epochs in (1, 2):
        changes = {"train.epochs": epochs, "train.select_by": "last", "model.experts": ("text",)}
        train(make_tiny_config(tiny_data_dir, **changes), tmp_path / "run", quiet=True)
        if epochs == 1:
            evaluate(tmp_path / "run", "test", quiet=True)
            Comparison.from_runs([tmp_path / "run"] * 2, "test")
    with pytest.raises(InputError, match="of epoch 1, but the best epoch is now 2"):
        Comparison.from_runs([tmp_path / "run"] * 2, "test")
    export_model(tmp_path / "run", tmp_path / "outdated")
    assert "| UAR |" not in (tmp_path / "outdated" / "README.md").read_text()
    evaluate(tmp_path / "run", "test", quiet=True)
    Comparison.from_runs([tmp_path / "run"] * 2, "test")
    export_model(tmp_path / "run", tmp_path / "current")
    assert "| UAR |" in (tmp_path / "current" / "README.md").read_text()
