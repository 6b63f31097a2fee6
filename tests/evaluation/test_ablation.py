"""Tests which variants the ablation study runs, and the tables it writes."""

import csv
import dataclasses
import io

import pytest

from mister_jax import data, multi_seed
from mister_jax.errors import InputError
from mister_jax.evaluation import variants as study_of_variants
from mister_jax.evaluation.ablation import (
    SPLITS,
    ablation_csv,
    ablation_markdown,
    run_ablation,
)
from mister_jax.evaluation.variants import Variant
from mister_jax.metrics import SCORE_NAMES
from mister_jax.training.loop import train
from mister_jax.training.progress import TrainProgress
from tests.helpers.training import make_tiny_config

NAMES = ("default", "text_only")


@pytest.fixture(scope="module")
def variants(tiny_data_dir):
    """Returns two variants that train quickly."""

    def variant(name, only):
        changes = {"train.epochs": 1, "model.experts": (only,)}
        return Variant(
            name, f"{only} alone", make_tiny_config(tiny_data_dir, f"tiny,{only}_only", **changes)
        )

    return [variant(name, only) for name, only in zip(NAMES, ("speech", "text"), strict=True)]


@pytest.fixture
def trained_variants(monkeypatch):
    """Records the names of the trained variants, in order."""
    names = []

    def recording_train(config, workdir, **options):
        names.append(workdir.name)
        return train(config, workdir, **options)

    monkeypatch.setattr(study_of_variants, "train", recording_train)
    return names


def test_completed_variants_are_not_run_again(variants, trained_variants, tmp_path):
    first = run_ablation(variants, tmp_path, names=["text_only"], quiet=True)
    assert [row["variant"] for row in first] == ["text_only"]
    rows = run_ablation(variants, tmp_path, quiet=True)
    assert [row["variant"] for row in rows] == list(NAMES)
    assert rows[1] == first[0]
    assert run_ablation(variants, tmp_path, quiet=True) == rows
    assert trained_variants == ["text_only", "default"]
    table = (tmp_path / "ablation.md").read_text()
    assert all(f"{row['test']['mean']['weighted_f1']:.3f}" in table for row in rows)
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    longer = [Variant(v.name, v.change, v.config.copy_and_resolve_references()) for v in variants]
    longer[0].config.train.epochs = 2
    assert run_ablation(longer, tmp_path, quiet=True)[1] == rows[1]
    assert trained_variants == ["text_only", "default", "default"]
    changed = [Variant(v.name, v.change, v.config.copy_and_resolve_references()) for v in variants]
    changed[0].config.seed = 5
    with pytest.raises(InputError, match=r"another config \(seed 0 -> 5\)"):
        run_ablation(changed, tmp_path, quiet=True)


def test_variants_are_not_trained_on_other_data_than_completed_variants(
    variants, trained_variants, tiny_data_dir, tmp_path
):
    run_ablation(variants, tmp_path / "study", names=["text_only"], quiet=True)
    splits = {
        name: data.load_features("tiny", name, tiny_data_dir)
        for name in ("train", "validation", "test")
    }
    splits["train"] = dataclasses.replace(splits["train"], text=2 * splits["train"].text)
    data.write_features(splits, "tiny", tmp_path / "data")
    other = [Variant(v.name, v.change, v.config.copy_and_resolve_references()) for v in variants]
    for variant in other:
        variant.config.data.data_dir = str(tmp_path / "data")
    with pytest.raises(InputError, match="text_only: dataset tiny has changed since the workdir"):
        run_ablation(other, tmp_path / "study", quiet=True)
    assert trained_variants == ["text_only"]


def test_sigterm_stops_the_study(variants, tmp_path, monkeypatch):
    stopped = TrainProgress([-1.0], [0])
    monkeypatch.setattr(study_of_variants, "train", lambda *_, **__: stopped)
    assert run_ablation(variants, tmp_path, quiet=True) is None
    assert not (tmp_path / "ablation.md").exists()


def test_unknown_variant_is_named(variants, tmp_path):
    with pytest.raises(InputError, match=r"fast unknown, or .* allowed: default, text_only"):
        run_ablation(variants, tmp_path, names=["fast"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def rows():
    """Returns two variants with two seeds: one wins on validation, and the other wins on test."""

    def row(name, validation, test):
        scores = {split: [dict.fromkeys(SCORE_NAMES, value) for value in values]
                  for split, values in zip(SPLITS, (validation, test), strict=True)}  # fmt: skip
        summary = {
            split: {**multi_seed.summarize_seeds((0, 1), seed_scores), "ensemble": seed_scores[0]}
            for split, seed_scores in scores.items()
        }
        return {"variant": name, "change": "none", "seeds": [0, 1], **summary}

    return [row("one", (0.7, 0.8), (0.1, 0.3)), row("two", (0.5, 0.6), (0.8, 0.9))]


def test_best_variant_is_selected_on_validation(rows):
    lines = ablation_markdown(rows, "tiny").splitlines()
    assert "| **one** | none | 0.750 ± 0.071 | 0.200 ± 0.141 | 0.100 |" in lines
    assert "| two | none | 0.550 ± 0.071 | 0.850 ± 0.071 | 0.800 |" in lines


def test_csv_has_all_scores(rows):
    one, two = csv.DictReader(io.StringIO(ablation_csv(rows)))
    assert (one["variant"], one["seeds"], two["variant"]) == ("one", "2", "two")
    assert float(one["validation_weighted_f1_mean"]) == pytest.approx(0.75)
    assert float(two["test_accuracy_deviation"]) == pytest.approx(0.05 * 2**0.5)
