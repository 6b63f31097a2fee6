"""The ablation study: which variants it runs, and the table it writes."""

import csv
import io

import pytest

import mister_jax.evaluation.ablation as ablate_module
from mister_jax import multi_seed
from mister_jax.errors import InputError
from mister_jax.evaluation.ablation import SPLITS, Variant, ablate, markdown, table_of_values
from mister_jax.metrics import SCORE_NAMES
from mister_jax.training.loop import TrainProgress, train
from tests.test_train import data_dir, tiny  # noqa: F401

NAMES = ("default", "text_only")


@pytest.fixture(scope="module")
def variants(data_dir):  # noqa: F811
    """Two variants that train quickly."""

    def variant(name, only):
        changes = {"train.epochs": 1, "model.experts": (only,)}
        return Variant(name, f"{only} alone", tiny(data_dir, f"tiny,{only}_only", **changes))

    return [variant(name, only) for name, only in zip(NAMES, ("speech", "text"), strict=True)]


@pytest.fixture
def trained(monkeypatch):
    """Names of the variants that are trained, in order."""
    found = []

    def watched(config, workdir, **options):
        found.append(workdir.name)
        return train(config, workdir, **options)

    monkeypatch.setattr(ablate_module, "train", watched)
    return found


def test_what_is_done_is_not_run_again(variants, trained, tmp_path):
    first = ablate(variants, tmp_path, chosen=["text_only"], quiet=True)
    assert [row["variant"] for row in first] == ["text_only"]
    rows = ablate(variants, tmp_path, quiet=True)
    assert [row["variant"] for row in rows] == list(NAMES)
    assert rows[1] == first[0]
    assert ablate(variants, tmp_path, quiet=True) == rows
    assert trained == ["text_only", "default"]
    table = (tmp_path / "ablation.md").read_text()
    assert all(f"{row['test']['mean']['weighted_f1']:.3f}" in table for row in rows)
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    changed = [Variant(v.name, v.change, v.config.copy_and_resolve_references()) for v in variants]
    changed[0].config.seed = 5
    with pytest.raises(InputError, match=r"another config \(seed 0 -> 5\)"):
        ablate(changed, tmp_path, quiet=True)


def test_told_to_stop_it_leaves_the_rest(variants, tmp_path, monkeypatch):
    stopped = TrainProgress([-1.0], [0])
    monkeypatch.setattr(ablate_module, "train", lambda *_, **__: stopped)
    assert ablate(variants, tmp_path, quiet=True) is None
    assert not (tmp_path / "ablation.md").exists()


def test_an_unknown_variant_is_named(variants, tmp_path):
    with pytest.raises(InputError, match="unknown fast; allowed are default, text_only"):
        ablate(variants, tmp_path, chosen=["fast"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def rows():
    """Two variants of two seeds: the first is better on validation, the second on test."""

    def row(name, validation, test):
        scores = {split: [dict.fromkeys(SCORE_NAMES, value) for value in values]
                  for split, values in zip(SPLITS, (validation, test), strict=True)}  # fmt: skip
        told = {
            split: {**multi_seed.summarize_seeds((0, 1), of_split), "together": of_split[0]}
            for split, of_split in scores.items()
        }
        return {"variant": name, "change": "none", "seeds": [0, 1], **told}

    return [row("one", (0.7, 0.8), (0.1, 0.3)), row("two", (0.5, 0.6), (0.8, 0.9))]


def test_the_table_calls_best_what_validation_does(rows):
    lines = markdown(rows, "tiny").splitlines()
    assert "| **one** | none | 0.750 ± 0.071 | 0.200 ± 0.141 | 0.100 |" in lines
    assert "| two | none | 0.550 ± 0.071 | 0.850 ± 0.071 | 0.800 |" in lines


def test_the_values_can_be_read_back(rows):
    one, two = csv.DictReader(io.StringIO(table_of_values(rows)))
    assert (one["variant"], one["seeds"], two["variant"]) == ("one", "2", "two")
    assert float(one["validation_weighted_f1_mean"]) == pytest.approx(0.75)
    assert float(two["test_accuracy_deviation"]) == pytest.approx(0.05 * 2**0.5)
