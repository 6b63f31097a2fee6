"""Runs that train together in one program give the results of separate training runs."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from mister_jax import data, metrics
from mister_jax.checkpoint import BEST, LATEST
from mister_jax.evaluation.cross_validation import folds_of_dataset
from mister_jax.tasks.fusion import FusionTask
from mister_jax.training.loop import TrainingDivergedError, train, train_group
from mister_jax.training.runs import RunBatches, batch_shapes, plan_groups, shared_shapes
from tests.helpers.training import (
    assert_same_checkpoints,
    make_tiny_config,
    read_latest_checkpoint,
    read_metric_records,
)

NUM_SEEDS = 2


@pytest.fixture(scope="module")
def folds(tiny_data_dir):
    """Three folds. One of them has more steps per epoch than the others."""
    config = make_tiny_config(
        tiny_data_dir,
        **{
            "num_seeds": NUM_SEEDS,
            "train.epochs": 3,
            "train.save_every": 2,
            "train.min_save_seconds": 0,
            "data.batch_size": 4,
            "data.num_buckets": 2,
            "data.standardize": "speech,text",
            "model.experts": ("speech",),  # A single expert compiles faster.
            "model.gru_layers": 1,
            "loss.class_weights": "balanced",
            "loss.logit_adjustment": 0.5,
            "optimizer.schedule": "cosine",
            "optimizer.warmup_fraction": 0.2,
            "optimizer.average_decay": 0.9,
        },
    )
    return folds_of_dataset(config, "dialogue:4")[1:]


def train_folds(folds, workdir, models_at_once=3 * NUM_SEEDS, **options):
    configs = [fold.config for fold in folds]
    workdirs = [workdir / fold.name for fold in folds]
    progress = []
    for group in plan_groups(configs, workdirs, models_at_once):
        progress += train_group(group, **{"quiet": True} | options)
    return progress


@pytest.fixture(scope="module")
def together_workdir(folds, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("together")
    assert all(progress.finished for progress in train_folds(folds, workdir))
    return workdir


@pytest.fixture(scope="module")
def separate_workdir(folds, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("separate")
    for fold in folds:
        train(fold.config, workdir / fold.name, quiet=True)
    return workdir


def assert_equal_up_to_rounding(workdir, expected_workdir):
    arrays, progress = read_latest_checkpoint(workdir)
    expected_arrays, expected_progress = read_latest_checkpoint(expected_workdir)
    assert arrays.keys() == expected_arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_allclose(values, expected_arrays[name], atol=1e-5, err_msg=name)
    assert progress["best_epochs"] == expected_progress["best_epochs"]
    assert progress["best_scores"] == pytest.approx(expected_progress["best_scores"])
    for record, expected in zip(
        read_metric_records(workdir), read_metric_records(expected_workdir), strict=True
    ):
        assert record == pytest.approx(expected, abs=1e-5)


def test_folds_that_train_together_equal_folds_one_by_one(
    folds, together_workdir, separate_workdir
):
    steps = {
        FusionTask.from_data(fold.config).split("train", num_shards=1, shuffle=True).steps
        for fold in folds
    }
    assert len(steps) > 1
    for fold in folds:
        assert_equal_up_to_rounding(together_workdir / fold.name, separate_workdir / fold.name)


def test_runs_share_one_training_program(folds, separate_workdir, tmp_path, capsys):
    train_folds(folds, tmp_path / "at_once", quiet=False)
    printed = capsys.readouterr().out
    assert "3 runs at once, 2 seeds, 3 epochs of 4 steps" in printed
    assert printed.count("compiling 2 programs") == 1  # one for training, and one for validation
    train_folds(folds, tmp_path / "in_turn", models_at_once=1, quiet=False)
    printed = capsys.readouterr().out
    assert printed.count("training on") == 3 and "at once" not in printed
    # Two programs for training and two for validation, one for each padded length.
    assert sum(map(int, re.findall(r"compiling (\d)", printed))) == 4
    for fold in folds:
        assert_equal_up_to_rounding(tmp_path / "in_turn" / fold.name, separate_workdir / fold.name)


def test_a_group_with_short_epochs_is_saved_at_the_end(folds, together_workdir, tmp_path):
    changes = {"train.min_save_seconds": 1000, "train.save_every": 0}
    changed_folds = []
    for fold in folds:
        config = fold.config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        changed_folds.append(dataclasses.replace(fold, config=config))
    saved = []
    train_folds(changed_folds, tmp_path, on_save=lambda kind, *_: saved.append(kind))
    assert saved == [BEST, LATEST] * len(folds)
    for fold in folds:
        assert_same_checkpoints(tmp_path / fold.name, together_workdir / fold.name)


@pytest.mark.parametrize("num_saves", [2, 9])
def test_an_interrupted_group_resumes_to_the_same_bits(
    folds, together_workdir, tmp_path, num_saves
):
    # Depending on `num_saves`, the runs are interrupted after different epochs.
    saves = itertools.count(1)

    def interrupt(*_):
        if next(saves) == num_saves:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_folds(folds, tmp_path, on_save=interrupt)
    assert all(progress.finished for progress in train_folds(folds, tmp_path))
    for fold in folds:
        assert_same_checkpoints(tmp_path / fold.name, together_workdir / fold.name)
        assert read_metric_records(tmp_path / fold.name) == read_metric_records(
            together_workdir / fold.name
        )


def test_runs_can_resume_alone(folds, separate_workdir, tmp_path):
    saves = itertools.count(1)

    def interrupt(kind, *_):
        if kind == LATEST and next(saves) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_folds(folds, tmp_path, on_save=interrupt)
    first, second, third = folds
    train(first.config, tmp_path / first.name, quiet=True)
    train_folds([second, third], tmp_path)
    for fold in folds:
        assert_equal_up_to_rounding(tmp_path / fold.name, separate_workdir / fold.name)


def test_pmap_trains_the_same_models(folds, together_workdir, tmp_path):
    changed = []
    for fold in folds:
        config = fold.config.copy_and_resolve_references()
        config.parallel.backend = "pmap"
        changed.append(dataclasses.replace(fold, config=config))
    train_folds(changed, tmp_path)
    for fold in folds:
        for record, expected in zip(
            read_metric_records(tmp_path / fold.name),
            read_metric_records(together_workdir / fold.name),
            strict=True,
        ):
            assert record == pytest.approx(expected, rel=1e-3, abs=1e-5)


def group_sizes(groups):
    return [len(group.configs) for group in groups]


@pytest.mark.parametrize(
    ("models_at_once", "expected"),
    [(1, [1, 1, 1]), (NUM_SEEDS, [1, 1, 1]), (2 * NUM_SEEDS + 1, [2, 1]), (99, [3])],
)
def test_the_number_of_models_at_once_is_bounded(folds, tmp_path, models_at_once, expected):
    workdirs = [tmp_path / fold.name for fold in folds]
    groups = plan_groups([fold.config for fold in folds], workdirs, models_at_once)
    assert group_sizes(groups) == expected
    assert all(group.shared is groups[0].shared is not None for group in groups)


def test_only_runs_with_the_same_steps_share_them(folds, tiny_data_dir, tmp_path):
    splits = {
        split: dataclasses.replace(features, speech=features.speech[:, :4])
        for split in data.SPLITS
        for features in [data.load_features("tiny", split, tiny_data_dir)]
    }
    data.write_features(splits, "narrow", tmp_path / "data")
    narrow = folds[0].config.copy_and_resolve_references()
    narrow.data.update({"name": "narrow", "data_dir": str(tmp_path / "data")})
    slower = folds[0].config.copy_and_resolve_references()
    slower.optimizer.learning_rate = 1e-5
    configs = [folds[0].config, folds[1].config, narrow, slower]
    workdirs = [tmp_path / name for name in ("first", "second", "narrow", "slower")]
    groups = plan_groups(configs, workdirs, models_at_once=99)
    assert group_sizes(groups) == [2, 1, 1]
    assert [group.shared is None for group in groups] == [False, True, True]


def test_a_diverging_run_is_named(folds, tmp_path, monkeypatch):
    (first, second) = folds[:2]
    from_data = FusionTask.from_data

    def with_broken_standardizer(config):
        task = from_data(config)
        if config.data.fold == second.config.data.fold:
            standardizer = task.standardizers["speech"]
            mean = np.full_like(standardizer.mean, np.nan)
            task.standardizers["speech"] = dataclasses.replace(standardizer, mean=mean)
        return task

    monkeypatch.setattr(FusionTask, "from_data", with_broken_standardizer)
    with pytest.raises(TrainingDivergedError, match=rf"{second.name}: non-finite .*loss"):
        train_folds([first, second], tmp_path)


def test_progress_follows_the_runs_that_have_not_stopped_early(folds, tmp_path, monkeypatch):
    changed = []
    for fold in folds:
        config = fold.config.copy_and_resolve_references()
        config.num_seeds = 1
        config.train.update({"patience": 1, "epochs": 4})
        changed.append(dataclasses.replace(fold, config=config))
    # After the first epoch, the first run's scores get worse, and the other runs' scores improve.
    num_runs = len(folds)
    scores = (
        dict.fromkeys(metrics.SCORE_NAMES, 0.1 * epoch if run else -0.1 * epoch)
        for epoch in range(1, 5)
        for run in range(0 if epoch <= 2 else 1, num_runs)
    )
    monkeypatch.setattr(
        metrics, "classification_scores", lambda *_: {**next(scores), "utterances": 1}
    )
    steps = []
    progress = train_folds(changed, tmp_path, on_step=steps.append)
    assert [run.epoch for run in progress] == [2, 4, 4]
    assert [run.best_epochs for run in progress] == [[1], [4], [4]]
    # The first run is the longest, with 16 steps. When it stops after 8 steps, the other runs have
    # 6 steps left, so the reported step jumps from 8 to 11.
    assert steps == sorted(set(steps)) and steps[-1] == 16


def test_a_warm_start_survives_an_interruption_before_the_first_checkpoint(
    folds, together_workdir, tmp_path
):
    def interrupt(step):
        raise KeyboardInterrupt

    config = folds[0].config.copy_and_resolve_references()
    config.train.init_from = str(together_workdir / folds[1].name)
    train(config, tmp_path / "expected", quiet=True)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", quiet=True, on_step=interrupt)
    train(config, tmp_path / "run", quiet=True)
    assert_same_checkpoints(tmp_path / "run", tmp_path / "expected")


def test_batches_of_several_runs_share_shapes(folds):
    splits = [
        FusionTask.from_data(fold.config).split("train", num_shards=1, shuffle=True)
        for fold in folds
    ]
    shapes = shared_shapes([batch_shapes(split) for split in splits])
    assert len(shapes) == 2
    batches = RunBatches(splits, shapes)
    rows, length = batches.largest_shape
    assert batches.shapes_by_first_use(0, 0) == [(rows, length)]
    combined = list(batches.epoch({0: (0, 0), 2: (1, 1)}))
    assert len(combined) == max(splits[0].steps, splits[2].steps - 1)
    separate = [list(splits[0].batches(0)), [], list(splits[2].batches(1, 1))]
    for step, (batch, active) in enumerate(combined):
        assert batch["speech"].shape[:3] == (rows, 3, length)
        assert active == tuple(index for index in range(3) if step < len(separate[index]))
        for index in range(3):
            taken = {name: values[:, index] for name, values in batch.items()}
            if index in active:
                assert_padded(taken, separate[index][step])
            else:
                assert not taken["mask"].any() and (taken["label"] == -1).all()


def test_batches_of_a_single_run_are_padded_no_further_than_needed(folds):
    splits = [
        FusionTask.from_data(fold.config).split("train", num_shards=1, shuffle=True)
        for fold in folds
    ]
    shapes = shared_shapes([batch_shapes(split) for split in splits])
    for split in splits:
        batches = RunBatches([split], shapes)
        assert set(batches.shapes_by_first_use(0, 0)) == set(shapes)
        for (batch, _), expected in zip(batches.epoch({0: (0, 0)}), split.batches(0), strict=True):
            num_rows, length = batch["mask"].shape
            assert (num_rows, length) == next(
                shape for shape in shapes if shape[1] >= expected["mask"].shape[1]
            )
            assert_padded(batch, expected)


def test_consecutive_epochs_of_a_run_share_one_pipeline(folds, monkeypatch):
    split = FusionTask.from_data(folds[0].config).split("train", num_shards=1, shuffle=True)
    expected = [[*split.batches(epoch)] for epoch in range(4)]
    starts = []
    make_batches = type(split).batches

    def count(self, *position):
        starts.append(position)
        return make_batches(self, *position)

    monkeypatch.setattr(type(split), "batches", count)
    batches = RunBatches([split], num_epochs=3)
    next(batches.epoch({0: (0, 0)}))  # An interrupted epoch.
    for epoch, start_step in ((0, 1), (1, 0), (2, 0), (3, 0), (1, 0)):
        taken = [batch for batch, _ in batches.epoch({0: (epoch, start_step)})]
        for batch, other in zip(taken, expected[epoch][start_step:], strict=True):
            np.testing.assert_array_equal(batch["row"], other["row"])
    assert starts == [(0, 0, 3), (0, 1, 3), (3, 0, 1), (1, 0, 2)]


def assert_padded(batch, expected):
    num_rows, length = expected["mask"].shape
    assert not batch["mask"][num_rows:].any() and not batch["mask"][:, length:].any()
    np.testing.assert_array_equal(batch["row"][:num_rows], expected["row"])
    np.testing.assert_array_equal(batch["speech"][:num_rows, :length], expected["speech"])
