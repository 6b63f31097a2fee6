"""Sweeps: grids and their errors, resuming, and scores of only the best point on the test split."""

import csv
import json

import pytest

from mister_jax.configs import fusion
from mister_jax.errors import InputError
from mister_jax.evaluation import variants as study_of_variants
from mister_jax.evaluation.figures import plot_sweep
from mister_jax.evaluation.results import evaluate
from mister_jax.evaluation.sweep import (
    Axis,
    grid_points,
    make_variants,
    parse_grid,
    run_sweep,
)
from mister_jax.training.loop import train
from mister_jax.training.progress import TrainProgress
from tests.helpers.training import make_tiny_config

GRID = ("data.seed=1,2",)  # The points share their compiled programs.


@pytest.fixture(scope="module")
def config(tiny_data_dir):
    changes = {
        "train.epochs": 1,
        "num_seeds": 2,
        "model.experts": ("text",),
        "model.kernel_sizes": (1,),
        "model.gru_layers": 0,
    }
    return make_tiny_config(tiny_data_dir, **changes)


@pytest.fixture(scope="module")
def axes(config):
    return [parse_grid(config, text) for text in GRID]


@pytest.fixture(scope="module")
def evaluated_splits():
    return []


@pytest.fixture(scope="module")
def sweep_workdir(config, axes, evaluated_splits, tmp_path_factory):
    """A sweep that was interrupted at its second point and then resumed."""
    workdir = tmp_path_factory.mktemp("sweep") / "run"
    trained = []

    def stop_at_second(point_config, folder, **options):
        if len(trained) == 1:
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(folder.name)
        return train(point_config, folder, **options)

    def recording_evaluate(folder, split, **options):
        evaluated_splits.append((folder.name, split))
        return evaluate(folder, split, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_of_variants, "train", stop_at_second)
        patch.setattr(study_of_variants, "evaluate", recording_evaluate)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(config, axes, workdir, quiet=True)
        assert run_sweep(config, axes, workdir, quiet=True, evaluate_test=True)
    assert trained == ["seed=1", "stopped", "seed=2"]
    return workdir


def test_the_points_are_sorted_by_validation(sweep_workdir):
    result = json.loads((sweep_workdir / "sweep.json").read_text())
    means = [point["validation"]["mean"]["weighted_f1"] for point in result["points"]]
    assert means == sorted(means, reverse=True) and len(means) == 2
    assert result["best"] == result["points"][0]["point"]
    for point in result["points"]:
        scores = json.loads((sweep_workdir / point["point"] / "metrics.json").read_text())
        assert point["validation"]["mean"] == scores["validation"]["seeds"]["mean"]
        assert len(point["validation"]["of_each"]) == 2
    with (sweep_workdir / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["point"] for row in rows] == [point["point"] for point in result["points"]]
    assert {row["data.seed"] for row in rows} == {"1", "2"}
    assert float(rows[0]["validation_weighted_f1_mean"]) == pytest.approx(means[0])
    assert (sweep_workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_test_is_scored_for_the_best_point_only(sweep_workdir, evaluated_splits):
    result = json.loads((sweep_workdir / "sweep.json").read_text())
    assert sorted(evaluated_splits) == sorted(
        [(point["point"], "validation") for point in result["points"]] + [(result["best"], "test")]
    )
    scores = json.loads((sweep_workdir / result["best"] / "metrics.json").read_text())
    assert result["test"]["mean"] == scores["test"]["seeds"]["mean"]


def test_a_larger_grid_uses_completed_points_again(config, sweep_workdir, monkeypatch):
    trained = []

    def interrupted(_, folder, **options):
        trained.append(folder.name)
        return TrainProgress([-1.0], [0])

    monkeypatch.setattr(study_of_variants, "train", interrupted)
    larger = [parse_grid(config, "data.seed=1,3,2")]
    assert run_sweep(config, larger, sweep_workdir, quiet=True) is None
    assert trained == ["seed=3"]


def test_a_sweep_with_another_config_is_refused(config, axes, sweep_workdir):
    changed = config.copy_and_resolve_references()
    changed.num_seeds = 3
    with pytest.raises(InputError, match=r"another config \(num_seeds 2 -> 3\)"):
        run_sweep(changed, axes, sweep_workdir, quiet=True)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer.learning_rate=1e-4,3e-4,1", (1e-4, 3e-4, 1.0)),
        ("config.model.context_dim=64,128", (64, 128)),
        ("model.causal=true,False", (True, False)),
        ("model.kernel_sizes=(1,3),(1),()", ((1, 3), (1,), ())),
        ("model.experts=(speech),('speech','text')", (("speech",), ("speech", "text"))),
        ("data.standardize=none,(speech,text)", ("none", "speech,text")),
        ("data.num_buckets=none,2", (None, 2)),
    ],
)
def test_values_have_the_type_of_their_field(text, values):
    parsed = parse_grid(fusion.get_config("tiny"), text).values
    assert parsed == values
    assert [type(value) for value in parsed] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.learning_rate", "needed: FIELD=VALUE,VALUE"),
        ("optimizer.learning_rate=", "empty value"),
        ("optimizer.learning_rate=1e-3,,1", "empty value"),
        ("optimizer.learning_rat=1", "no such field 'learning_rat'; allowed: average_decay, b1"),
        ("optimizers.learning_rate=1", "no such field 'optimizers'; allowed: data, loss, model"),
        ("optimizer.name.x=1", "no such field 'x'; allowed: none"),
        ("optimizer=1", "a section of the config; allowed: its fields optimizer.average_decay"),
        ("optimizer.learning_rate=fast", "value 'fast'; allowed: finite numbers"),
        ("optimizer.learning_rate=nan", "value 'nan'; allowed: finite numbers"),
        ("model.context_dim=64.5", "value '64.5'; allowed: integers"),
        ("model.causal=1", "value '1'; allowed: true, false"),
        ("model.kernel_sizes=1,3", r"value '1'; allowed: values in parentheses, such as \(1,3\)"),
        ("model.kernel_sizes=(1,x)", r"value '\(1,x\)'; allowed: "),
        ("model.kernel_sizes=(1,3", "unbalanced parentheses"),
        ("model.kernel_sizes=1),3", "unbalanced parentheses"),
        ("optimizer.learning_rate=1e-3,0.001", "the value 0.001 is repeated"),
        ("data.name=a,b", "--grid=data.name: cannot be varied"),
        ("seed=0,1", "--grid=seed: cannot be varied"),
    ],
)
def test_invalid_grids_give_one_line_errors(config, text, message):
    with pytest.raises(InputError, match=message) as error:
        parse_grid(config, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        (
            ["optimizer.learning_rate=1e-3,-1"],
            "learning_rate=-1.0: config.optimizer: OptimizerConfig.learning_rate=-1.0; all",
        ),
        (["model.attention_dim=6,7"], "attention_dim=7: config.model: .* a multiple of"),
        (["model.mixture=gate,vote"], "MisterEConfig.mixture='vote'; allowed: gate, "),
        (
            ["model.experts=(speech),(video)"],
            "experts=video: config.model: MisterEConfig.experts=.*; all",
        ),
        (["model.kernel_sizes=(1),(2)"], r"model.kernel_sizes=\(2\): kernel_sizes="),
        (["loss.class_weights=none,(1,2)"], "loss.class_weights=1,2: "),
        (["loss.target=label,ratings"], "loss.target=ratings: .*has no ratings"),
        (["data.sampling=shuffle,foo"], "data.sampling=foo: "),
        (["parallel.model_parallelism=1,3"], "model_parallelism=3: .*divisors of 8"),
        (["train.select_by=mae"], "train.select_by=mae: .*needs config.model.predict_score"),
        (["optimizer.b1=0.5,0.9", "optimizer.b1=0.1"], "optimizer.b1: used twice"),
    ],
)
def test_all_points_are_checked_before_any_is_trained(config, grids, message, tmp_path):
    axes = [parse_grid(config, text) for text in grids]
    with pytest.raises(InputError, match=message) as error:
        run_sweep(config, axes, tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_random_points_are_different_and_extend_each_other():
    axes = [Axis("a", tuple(range(50))), Axis("b", tuple(range(50)))]
    points = grid_points(axes, 40, seed=1)
    assert len(set(points)) == 40
    assert grid_points(axes, 10, seed=1) == points[:10]
    assert grid_points(axes, 10, seed=2) != points[:10]
    small = [Axis("a", (1, 2)), Axis("b", (3, 4))]
    assert sorted(grid_points(small, 99)) == grid_points(small)
    with pytest.raises(InputError, match="2500 points; allowed: up to 1000"):
        grid_points(axes)


def test_points_have_names_without_special_characters(config):
    axes = [
        parse_grid(config, text)
        for text in ("model.kernel_sizes=(1,3),()", "data.standardize=(speech,text)")
    ]
    names = [variant.name for variant in make_variants(config, axes, grid_points(axes))]
    assert names == [
        "kernel_sizes=1-3,standardize=speech%2Ctext",
        "kernel_sizes=none,standardize=speech%2Ctext",
    ]


@pytest.mark.parametrize(
    "axes",
    [
        {"one": (1, 10, 100)},
        {"one": ("a", "b")},
        {"one": (1, 2), "two": ("x", "y", "z")},
        {"one": (1, 2), "two": ("x", "y"), "three": (True, False)},
        {"one": (1,)},
    ],
)
def test_incomplete_sweeps_have_a_picture(axes, tmp_path):
    points = grid_points([Axis(name, values) for name, values in axes.items()])
    for count in (1, len(points)):
        scores = {point: (0.1 * number, 0.02) for number, point in enumerate(points[:count])}
        plot_sweep(axes, scores, "validation weighted F1", tmp_path / "sweep.png")
        assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
