"""Several seeds in one program: what one alone would have given, and what they say together."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest

from mister_jax import metrics, multi_seed
from mister_jax.checkpoint import LATEST
from mister_jax.evaluation.results import evaluate
from mister_jax.optim import params_for_evaluation
from mister_jax.parallel.partitioning import PmapPartitioner
from mister_jax.predictor import Predictor
from mister_jax.training.loop import train
from mister_jax.training.steps import initial_state, make_train_step
from tests.helpers.training import (
    TinyTask,
    assert_same_bits,
    make_tiny_config,
    read_latest_checkpoint,
    read_metric_records,
)

SEEDS = (3, 4)


def side_by_side(tiny_data_dir, **changes):
    changes = {"seed": SEEDS[0], "num_seeds": len(SEEDS), **changes}
    return make_tiny_config(tiny_data_dir, "tiny,text_only", **changes)


@pytest.fixture(scope="module")
def together(tiny_data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("together") / "run"
    assert train(side_by_side(tiny_data_dir), workdir, quiet=True).finished
    return workdir


@pytest.fixture(scope="module")
def apart(tiny_data_dir, tmp_path_factory):
    """Work directories of the same seeds, one at a time, on batches in the same order."""
    root = tmp_path_factory.mktemp("apart")
    for seed in SEEDS:
        config = side_by_side(tiny_data_dir, seed=seed, num_seeds=1, **{"data.seed": SEEDS[0]})
        assert train(config, root / str(seed), quiet=True).finished
    return [root / str(seed) for seed in SEEDS]


def test_seeds_at_once_are_trained_as_each_alone(together, apart):
    ours, progress = read_latest_checkpoint(together)
    for index, workdir in enumerate(apart):
        theirs, own = read_latest_checkpoint(workdir)
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name][index], value, atol=1e-5, err_msg=name)
        assert progress["best_epochs"][index] == own["best_epochs"][0]
        assert progress["best_scores"][index] == pytest.approx(own["best_scores"][0])


def test_records_have_each_seed_and_their_mean(together, apart):
    alone = [read_metric_records(workdir) for workdir in apart]
    for row, *own in zip(read_metric_records(together), *alone, strict=True):
        for name in own[0].keys() - {"step", "learning_rate"}:
            values = [each[name] for each in own]
            found = [row[f"{name}/seed_{seed}"] for seed in SEEDS]
            assert found == pytest.approx(values, abs=1e-5)
            assert row[name] == pytest.approx(np.mean(values), abs=1e-5)


def test_evaluation_tells_each_seed_their_mean_and_the_ensemble(together, apart, tmp_path):
    found = evaluate(together, "test", output=tmp_path, quiet=True)
    predictors = [Predictor(workdir) for workdir in apart]
    features = predictors[0].task.features("test")
    alone = [predictor(features, quiet=True) for predictor in predictors]
    ensemble = Predictor(together)(features, quiet=True)
    mean = np.mean([own["probabilities"] for own in alone], axis=0)
    np.testing.assert_allclose(ensemble["probabilities"], mean, atol=1e-5)
    np.testing.assert_allclose(ensemble["gate"].sum(-1), 1, atol=1e-5)
    own = [evaluate(path, "test", output=tmp_path, quiet=True)["weighted_f1"] for path in apart]
    told = found["seeds"]
    assert [told["of_each"][str(seed)]["weighted_f1"] for seed in SEEDS] == pytest.approx(own)
    assert told["mean"]["weighted_f1"] == pytest.approx(np.mean(own))
    assert told["deviation"]["weighted_f1"] == pytest.approx(np.std(own, ddof=1))


def test_a_step_of_two_seeds_by_pmap_is_that_of_each(tiny_config, make_batch):
    # The expert whose loss looks across devices.
    model = dataclasses.replace(tiny_config, experts=("fusion",), fusion_dropout=0.2)
    task, transformation = TinyTask(model), optax.adam(1e-2)
    partitioner = PmapPartitioner()
    made = [initial_state(task, transformation, seed) for seed in SEEDS]
    graph, states = made[0][0], [state for _, state in made]
    step = make_train_step(task, graph, transformation)
    batch = partitioner.put_batch(make_batch([5, 1, 3, 0, 2, 5, 4, 1]))

    def updated(state, count):
        program = partitioner.compile_step(multi_seed.vmap_over_seeds(step, count))
        following, found = program(partitioner.put_state(state), batch)
        return jax.device_get((partitioner.get_state(following)["params"], found))

    ours = multi_seed.unstack_seeds(updated(multi_seed.stack_seeds(states), 2), 2)
    for own, state in zip(ours, states, strict=True):
        for value, theirs in zip(
            jax.tree.leaves(own), jax.tree.leaves(updated(state, 1)), strict=True
        ):
            np.testing.assert_allclose(value, theirs, atol=1e-5)


def test_interrupted_while_the_best_is_saved_it_ends_with_the_same_bits(
    tiny_data_dir,
    together,
    tmp_path,
):
    num_saves = itertools.count(1)

    def interrupt(*_):
        if next(num_saves) == 3:  # The best of the second epoch, before its latest is saved.
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(side_by_side(tiny_data_dir), tmp_path, quiet=True, on_save=interrupt)
    assert train(side_by_side(tiny_data_dir), tmp_path, quiet=True).finished
    assert_same_bits(read_latest_checkpoint(tmp_path), read_latest_checkpoint(together))
    assert read_metric_records(tmp_path) == read_metric_records(together)


def test_each_seed_keeps_its_own_best_and_its_own_patience(tiny_data_dir, tmp_path, monkeypatch):
    pairs = [(0.3, 0.5), (0.4, 0.4), (0.2, 0.6), (0.3, 0.1), (0.9, 0.2), (0.9, 0.9)]
    values = iter([value for pair in pairs for value in pair])

    def scores(*_):
        return {**dict.fromkeys(metrics.SCORE_NAMES, next(values)), "utterances": 1}

    monkeypatch.setattr(metrics, "classification_scores", scores)
    params_by_epoch = {}

    def on_save(kind, step, state, progress):
        if kind == LATEST:
            params = params_for_evaluation(state["params"], state["opt_state"])
            params_by_epoch[progress["epoch"]] = jax.device_get(params)

    changes = {"train.epochs": 9, "train.patience": 2}
    config = side_by_side(tiny_data_dir, **changes)
    progress = train(config, tmp_path, quiet=True, on_save=on_save)
    assert (progress.epoch, progress.best_epochs, progress.best_scores) == (5, [2, 3], [0.4, 0.6])
    predictor = Predictor(tmp_path)
    assert predictor.progress["epoch"] == [2, 3]
    assert predictor.progress["weighted_f1"] == [0.4, 0.6]
    for index, epoch in enumerate(progress.best_epochs):
        expected = jax.tree.leaves(multi_seed.unstack_seeds(params_by_epoch[epoch], 2)[index])
        saved = jax.tree.leaves(predictor.params[index]["trained"])
        for saved_value, value in zip(saved, expected, strict=True):
            np.testing.assert_array_equal(saved_value, value)


def test_an_ensemble_averages_the_mixture_and_its_experts_alike():
    present = np.array([[True, False, False]])
    each = [
        np.array([[[0.9, 0.1, 0.0]]]),
        np.array([[[0.3, 0.4, 0.3]]]),
        np.array([[[0.3, 0.4, 0.3]]]),
    ]
    ensemble = multi_seed.ensemble(
        [
            {
                "probabilities": probabilities[:, 0],
                "expert_probabilities": probabilities,
                "expert_present": present,
            }
            for probabilities in each
        ]
    )
    # Most seeds choose the second class; their mean is the first.
    np.testing.assert_allclose(ensemble["expert_probabilities"], [[[0.5, 0.3, 0.2]]])
    np.testing.assert_array_equal(ensemble["probabilities"], ensemble["expert_probabilities"][:, 0])
    np.testing.assert_array_equal(ensemble["expert_present"], present)


def test_the_only_expert_of_several_seeds_scores_as_the_mixture(together, tmp_path):
    scores = evaluate(together, "test", output=tmp_path, quiet=True)
    assert scores["experts"]["text"]["weighted_f1"] == pytest.approx(scores["weighted_f1"])


def test_of_one_seed_nothing_is_changed():
    tree = {"a": np.ones(3)}
    function = lambda state, batch, axis_name: state  # noqa: E731
    assert multi_seed.stack_seeds([tree]) is tree and multi_seed.unstack_seeds(tree, 1) == [tree]
    assert multi_seed.vmap_over_seeds(function, 1) is function
    assert multi_seed.ensemble([tree]) == tree
