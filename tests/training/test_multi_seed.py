"""Several seeds in one program match separate training runs, and form an ensemble."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mister_jax import metrics, multi_seed
from mister_jax.checkpoint import LATEST
from mister_jax.evaluation.results import evaluate
from mister_jax.optim import ParamVectors, params_for_evaluation
from mister_jax.parallel.partitioning import PmapPartitioner
from mister_jax.predictor import Predictor
from mister_jax.training.loop import train
from mister_jax.training.steps import initial_state, make_train_step
from tests.helpers.training import (
    ALL_LAYERS,
    TinyTask,
    assert_same_bits,
    make_tiny_config,
    read_latest_checkpoint,
    read_metric_records,
)

SEEDS = (3, 4)


def make_seeds_config(tiny_data_dir, **changes):
    """Returns a config that trains all seeds in one program."""
    layers = {f"model.{name}": number for name, number in ALL_LAYERS.items()}
    changes = {"seed": SEEDS[0], "num_seeds": len(SEEDS), **layers, **changes}
    changes = {"train.min_save_seconds": 0, **changes}
    return make_tiny_config(tiny_data_dir, "tiny,text_only", **changes)


@pytest.fixture(scope="module")
def joint_workdir(tiny_data_dir, tmp_path_factory):
    """The work directory of a run that trains all seeds in one program."""
    workdir = tmp_path_factory.mktemp("joint") / "run"
    assert train(make_seeds_config(tiny_data_dir), workdir, quiet=True).finished
    return workdir


@pytest.fixture(scope="module")
def separate_workdirs(tiny_data_dir, tmp_path_factory):
    """The work directories of separate training runs of the seeds, with the same batch order."""
    root = tmp_path_factory.mktemp("separate")
    for seed in SEEDS:
        changes = {"seed": seed, "num_seeds": 1, "data.seed": SEEDS[0]}
        config = make_seeds_config(tiny_data_dir, **changes)
        assert train(config, root / str(seed), quiet=True).finished
    return [root / str(seed) for seed in SEEDS]


def test_joint_training_gives_the_parameters_of_separate_trainings(
    joint_workdir, separate_workdirs
):
    joint_arrays, joint_progress = read_latest_checkpoint(joint_workdir)
    for index, workdir in enumerate(separate_workdirs):
        arrays, progress = read_latest_checkpoint(workdir)
        for name, value in arrays.items():
            np.testing.assert_allclose(joint_arrays[name][index], value, atol=1e-5, err_msg=name)
        assert joint_progress["best_epochs"][index] == progress["best_epochs"][0]
        assert joint_progress["best_scores"][index] == pytest.approx(progress["best_scores"][0])


def test_metric_records_have_each_seed_and_the_mean(joint_workdir, separate_workdirs):
    separate_records = [read_metric_records(workdir) for workdir in separate_workdirs]
    for joint, *separate in zip(read_metric_records(joint_workdir), *separate_records, strict=True):
        for name in separate[0].keys() - {"step", "learning_rate"}:
            values = [record[name] for record in separate]
            joint_values = [joint[f"{name}/seed_{seed}"] for seed in SEEDS]
            assert joint_values == pytest.approx(values, abs=1e-5)
            assert joint[name] == pytest.approx(np.mean(values), abs=1e-5)


def test_evaluation_reports_each_seed_the_mean_and_the_ensemble(
    joint_workdir, separate_workdirs, tmp_path
):
    scores = evaluate(joint_workdir, "test", output=tmp_path, report=True, quiet=True)
    epochs = ", ".join(map(str, scores["checkpoint"]["epoch"]))
    assert f"epochs {epochs} of" in (tmp_path / "report.html").read_text()
    seed_scores = scores["seeds"]
    predictors = [Predictor(workdir, calibrate=False) for workdir in separate_workdirs]
    features = predictors[0].task.features("test")
    separate = [predictor(features, quiet=True) for predictor in predictors]
    ensemble = Predictor(joint_workdir, calibrate=False)(features, quiet=True)
    mean = np.mean([predictions["probabilities"] for predictions in separate], axis=0)
    np.testing.assert_allclose(ensemble["probabilities"], mean, atol=1e-5)
    np.testing.assert_allclose(ensemble["gate"].sum(-1), 1, atol=1e-5)
    joint = Predictor(joint_workdir)  # Evaluation has fitted the calibration to the mean.
    calibrated = joint(features, quiet=True)["probabilities"]
    np.testing.assert_allclose(calibrated, joint.calibration(mean), atol=1e-5)
    separate_f1 = [
        evaluate(workdir, "test", output=tmp_path, quiet=True)["weighted_f1"]
        for workdir in separate_workdirs
    ]
    joint_f1 = [seed_scores["of_each"][str(seed)]["weighted_f1"] for seed in SEEDS]
    assert joint_f1 == pytest.approx(separate_f1)
    assert seed_scores["mean"]["weighted_f1"] == pytest.approx(np.mean(separate_f1))
    assert seed_scores["deviation"]["weighted_f1"] == pytest.approx(np.std(separate_f1, ddof=1))


def test_a_joint_step_under_pmap_gives_the_parameters_of_separate_steps(tiny_config, make_batch):
    # The contrastive loss of the fusion expert reads the rows of all devices.
    model = dataclasses.replace(tiny_config, experts=("fusion",), fusion_dropout=0.2)
    task, optimizer = TinyTask(model), optax.adam(1e-2)
    partitioner = PmapPartitioner()
    pairs = [initial_state(task, optimizer, seed) for seed in SEEDS]
    template, states = pairs[0][0], [state for _, state in pairs]
    step = make_train_step(task, template, optimizer)
    batch = partitioner.put_batch(make_batch([5, 1, 3, 0, 2, 5, 4, 1]))

    def take_step(state, num_seeds):
        compiled_step = partitioner.compile_step(multi_seed.vmap_over_models(step, 1, num_seeds))
        new_state, metrics = compiled_step(partitioner.put_state(state), batch)
        return jax.device_get((partitioner.get_state(new_state)["params"], metrics))

    joint = multi_seed.unstack_seeds(take_step(multi_seed.stack_seeds(states), 2), 2)
    for seed_result, state in zip(joint, states, strict=True):
        for value, expected in zip(
            jax.tree.leaves(seed_result), jax.tree.leaves(take_step(state, 1)), strict=True
        ):
            np.testing.assert_allclose(value, expected, atol=1e-5)


def test_a_training_interrupted_while_saving_the_best_resumes_to_the_same_bits(
    tiny_data_dir, joint_workdir, tmp_path
):
    num_saves = itertools.count(1)

    def interrupt(*_):
        if next(num_saves) == 3:  # Epoch 2: after the best checkpoint, before the latest.
            raise KeyboardInterrupt

    config = make_seeds_config(tiny_data_dir)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, quiet=True, on_save=interrupt)
    assert train(config, tmp_path, quiet=True).finished
    assert_same_bits(read_latest_checkpoint(tmp_path), read_latest_checkpoint(joint_workdir))
    assert read_metric_records(tmp_path) == read_metric_records(joint_workdir)


def test_each_seed_has_its_own_best_epoch_and_patience(tiny_data_dir, tmp_path, monkeypatch):
    scores_by_epoch = [(0.3, 0.5), (0.4, 0.4), (0.2, 0.6), (0.3, 0.1), (0.9, 0.2), (0.9, 0.9)]
    scores = itertools.chain.from_iterable(scores_by_epoch)

    def next_scores(*_):
        return {**dict.fromkeys(metrics.SCORE_NAMES, next(scores)), "utterances": 1}

    monkeypatch.setattr(metrics, "classification_scores", next_scores)
    params_by_epoch = {}

    def on_save(kind, step, state, progress):
        if kind == LATEST:
            params = params_for_evaluation(state["params"], state["opt_state"])
            params_by_epoch[progress["epoch"]] = jax.device_get(params)

    changes = {"train.epochs": 9, "train.patience": 2}
    config = make_seeds_config(tiny_data_dir, **changes)
    progress = train(config, tmp_path, quiet=True, on_save=on_save)
    assert (progress.epoch, progress.best_epochs, progress.best_scores) == (5, [2, 3], [0.4, 0.6])
    predictor = Predictor(tmp_path)
    assert predictor.progress["epoch"] == [2, 3]
    assert predictor.progress["weighted_f1"] == [0.4, 0.6]
    for index, epoch in enumerate(progress.best_epochs):
        expected = multi_seed.unstack_seeds(params_by_epoch[epoch], 2)[index]
        params = predictor.params[index]["trained"]
        saved = ParamVectors(params).flatten(params)
        jax.tree.map(np.testing.assert_array_equal, saved, expected)


def test_an_ensemble_averages_the_mixture_and_its_experts_alike():
    present = np.array([[True, False, False]])
    expert_probabilities = [
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
            for probabilities in expert_probabilities
        ]
    )
    # Most seeds choose the second class, but the first class has the highest mean probability.
    np.testing.assert_allclose(ensemble["expert_probabilities"], [[[0.5, 0.3, 0.2]]])
    np.testing.assert_array_equal(ensemble["probabilities"], ensemble["expert_probabilities"][:, 0])
    np.testing.assert_array_equal(ensemble["expert_present"], present)


def test_a_single_expert_scores_as_the_ensemble(joint_workdir, tmp_path):
    scores = evaluate(joint_workdir, "test", output=tmp_path, quiet=True)
    assert scores["experts"]["text"]["weighted_f1"] == pytest.approx(scores["weighted_f1"])


def test_one_seed_passes_through_unchanged():
    tree = {"a": np.ones(3)}
    function = lambda state, batch, axis_name: state  # noqa: E731
    assert multi_seed.stack_seeds([tree]) is tree and multi_seed.unstack_seeds(tree, 1) == [tree]
    assert multi_seed.join_runs([tree], 3) is tree and multi_seed.split_runs(tree, 1, 3) == [tree]
    assert multi_seed.vmap_over_models(function, 1, 1)(tree, None, None) is tree
    assert multi_seed.ensemble([tree]) == tree


@pytest.mark.parametrize("kind", [np.ndarray, jax.Array])
def test_selected_seeds_are_arrays_of_the_kind_of_the_new_ones(kind):
    make = np.asarray if kind is np.ndarray else jnp.asarray
    new, old = {"a": make([[1.0, 2.0], [3.0, 4.0]])}, {"a": jnp.zeros((2, 2))}
    selected = multi_seed.select_seeds(np.array([False, True]), new, old)["a"]
    assert isinstance(selected, kind)
    np.testing.assert_array_equal(selected, [[0, 0], [3, 4]])
