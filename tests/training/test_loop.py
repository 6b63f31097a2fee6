"""The training loop: output files, early stopping, warnings and rejected inputs."""

import dataclasses
import json
import math
import shutil
import threading

import chex
import numpy as np
import pytest

from mister_jax import data
from mister_jax.checkpoint import LATEST
from mister_jax.data import batching
from mister_jax.errors import InputError
from mister_jax.parallel.partitioning import CompiledStep, JitPartitioner
from mister_jax.training import loop, runs
from mister_jax.training.loop import TrainingDivergedError, train
from mister_jax.training.progress import TrainConfig, TrainProgress
from tests.helpers.training import (
    assert_same_bits,
    assert_same_checkpoints,
    make_tiny_config,
    read_latest_checkpoint,
    read_metric_records,
)


def test_a_training_writes_its_config_metrics_curves_and_checkpoints(finished_workdir):
    names = {path.name for path in finished_workdir.iterdir()}
    assert {
        "config.json", "model.json", "versions.json", "parameters.txt", "metrics.jsonl",
        "curves.png", "checkpoints",
    } <= names  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in names)
    validation = [
        row for row in read_metric_records(finished_workdir) if "validation/weighted_f1" in row
    ]
    assert len(validation) == 2
    best = max(row["validation/weighted_f1"] for row in validation)
    assert read_latest_checkpoint(finished_workdir)[1]["best_scores"] == [best]


def test_training_does_not_open_the_test_split(tiny_data_dir, tmp_path, monkeypatch):
    opened = []

    def load(name, split, *options):
        opened.append(split)
        return data.load_features(name, split, *options)

    monkeypatch.setattr("mister_jax.tasks.fusion.load_features", load)
    train(make_tiny_config(tiny_data_dir, **{"train.epochs": 1}), tmp_path, quiet=True)
    assert set(opened) == {"train", "validation"}


def test_predicting_one_class_for_several_epochs_warns_once(tiny_data_dir, tmp_path, capsys):
    splits = {
        name: data.load_features("tiny", name, tiny_data_dir) for name in ("train", "validation")
    }
    labels = np.zeros_like(splits["train"].label)
    splits["train"] = dataclasses.replace(splits["train"], label=labels)
    data.write_features(splits, "one_class", tmp_path)
    changes = {"data.name": "one_class", "train.epochs": 8, "optimizer.learning_rate": 0.1}
    train(make_tiny_config(tmp_path, **changes), tmp_path / "run")
    assert read_metric_records(tmp_path / "run")[-1]["validation/predicted_classes"] == 1
    printed = capsys.readouterr().out
    assert printed.count("WARNING: seed 0 has predicted a single class") == 1


def test_the_seed_determines_the_parameters(tiny_data_dir, finished_workdir, tmp_path):
    train(make_tiny_config(tiny_data_dir), tmp_path / "same", quiet=True)
    assert_same_checkpoints(tmp_path / "same", finished_workdir)
    train(make_tiny_config(tiny_data_dir, seed=1), tmp_path / "other", quiet=True)
    arrays, _ = read_latest_checkpoint(finished_workdir)
    other_arrays, _ = read_latest_checkpoint(tmp_path / "other")
    kernel = "['params']['decayed']"
    assert (other_arrays[kernel] != arrays[kernel]).any()


@pytest.mark.parametrize("is_short", [True, False])
def test_only_short_trainings_compile_their_step_with_fewer_optimizations(
    tiny_data_dir, tmp_path, monkeypatch, is_short
):
    choices = []
    compile_step = JitPartitioner.compile_step

    def record(self, step, *, fast_compile=False):
        choices.append(fast_compile)
        return compile_step(self, step, fast_compile=fast_compile)

    monkeypatch.setattr(JitPartitioner, "compile_step", record)
    if not is_short:
        monkeypatch.setattr(batching, "_STEP_COMPILE_COST", 1.0)
    loop.train(make_tiny_config(tiny_data_dir, **{"train.epochs": 1}), tmp_path / "run", quiet=True)
    assert choices == [is_short]


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("patience", -1), ("min_save_seconds", -1.0), ("min_save_seconds", math.nan)],
)
def test_impossible_options_are_rejected(field, value):
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field}={value}; allowed: at least"):
        TrainConfig(**{"epochs": 1, field: value})


def test_early_stopping_waits_for_the_patience():
    options = TrainConfig(epochs=9, patience=2)
    progress = TrainProgress.initial(1)
    scores = iter([0.3, 0.5, 0.4, 0.4, 0.9])
    while not progress.finished:
        progress.complete_epoch(np.array([next(scores)]), options)
    assert (progress.epoch, progress.best_epochs, progress.best_scores) == (4, [2], [0.5])


def test_equal_scores_are_no_improvement_for_early_stopping():
    options = TrainConfig(epochs=9, patience=2)
    progress = TrainProgress.initial(1)
    while not progress.finished:
        progress.complete_epoch(np.array([0.5]), options)
    assert (progress.epoch, progress.best_epochs, progress.best_scores) == (3, [3], [0.5])


def test_a_tie_goes_to_the_later_epoch():
    progress = TrainProgress.initial(1)
    for score in (0.5, 0.5, 0.4):
        progress.complete_epoch(np.array([score]), TrainConfig(epochs=9))
    assert progress.best_epochs == [2]


def test_a_diverging_training_stops_and_keeps_the_last_good_state(
    tiny_data_dir, finished_workdir, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    shutil.copytree(finished_workdir, workdir)
    good = read_latest_checkpoint(workdir)
    # The run continues for another epoch, on features that are NaN.
    (step,) = (workdir / "checkpoints" / LATEST).iterdir()
    progress_file = step / "progress" / "metadata"
    progress_file.write_text(json.dumps({**good[1], "finished": False}))

    def load(name, split, *options):
        features = data.load_features(name, split, *options)
        return dataclasses.replace(features, speech=np.full_like(features.speech, np.nan))

    monkeypatch.setattr("mister_jax.tasks.fusion.load_features", load)
    monkeypatch.setattr(runs, "check_config", lambda *_: None)
    monkeypatch.setattr(runs, "check_data", lambda *_: None)
    with pytest.raises(TrainingDivergedError, match=r"non-finite .*loss.* between steps") as error:
        train(make_tiny_config(tiny_data_dir, **{"train.epochs": 3}), workdir, quiet=True)
    assert "\n" not in str(error.value)
    assert_same_bits((read_latest_checkpoint(workdir)[0], good[1]), good)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.name": "nowhere"}, "nowhere"),
        ({"data.batch_size": 0}, "batch_size 0"),
        ({"train.epochs": 0}, "epochs"),
        ({"task": "speaking"}, "'speaking'; allowed: fusion"),
        ({"optimizer.name": "sgd"}, "'sgd'; allowed: adam, adamw"),
        ({"optimizer.learning_rate": -1.0}, "learning_rate"),
        ({"parallel.backend": "threads"}, "'threads'; allowed: 'jit', 'pmap'"),
        ({"loss.gamma": -1.0}, "gamma=-1.0"),
        ({"model.attention_dim": 7}, "attention"),
        ({"model.input_dropout": 1.5}, "rate"),
        ({"num_seeds": 0}, "num_seeds=0; allowed: 1 or more"),
        (
            {"num_seeds": 2, "task": "text_encoder"},
            "num_seeds=2; the task text_encoder supports only 1",
        ),
        ({"data.seed": -1}, "data.seed=-1"),
        ({"seed": 2**31}, "config.seed=2147483648; allowed: 0 to"),
        ({"data.batchsize": 4}, "config.data: unknown batchsize; allowed: batch_size, data_dir, "),
        ({"optimizer": None}, "config.optimizer=None; needed: a section with fields"),
        ({"extra": 4}, "config: unknown extra; allowed: data, encoder, head, loss"),
        ({"data.num_buckets": 0}, "num_buckets 0; allowed"),
        ({"data.fold_splits": "train"}, "fold_splits=train needs config.data.folds"),
        ({"optimizer.b1": 2.0}, "b1=2.0; allowed: 0 <= rate < 1"),
        ({"optimizer.eps": -1.0}, "eps=-1.0; allowed: at least 0"),
        ({"model.layer_norm_epsilon": -1.0}, "layer_norm_epsilon=-1.0; allowed: at least 0"),
        ({"model.attention_implementation": "x"}, "implementation='x'; allowed: None, xla, cudnn"),
        ({"loss.weights.gate": -1.0}, "LossWeights.gate=-1.0; allowed: finite numbers of at least"),
    ],
)
def test_an_unusable_config_is_refused(tiny_data_dir, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        train(make_tiny_config(tiny_data_dir, **changes), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_two_trainings_in_one_workdir_are_refused(tiny_data_dir, tmp_path):
    config = make_tiny_config(tiny_data_dir)

    def train_again(_step):
        with pytest.raises(InputError, match="another process is training in this work directory"):
            train(config, tmp_path, quiet=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, quiet=True, on_step=train_again)
    assert train(config, tmp_path, quiet=True).finished


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (None, "no split 'validation'; allowed: train"),
        (-1, "dataset mute, split validation: no utterance has a label"),
    ],
)
def test_a_dataset_without_validation_labels_is_refused(
    tiny_data_dir, tmp_path, validation, message
):
    splits = {"train": data.load_features("tiny", "train", tiny_data_dir)}
    if validation is not None:
        features = data.load_features("tiny", "validation", tiny_data_dir)
        splits["validation"] = dataclasses.replace(
            features, label=np.full_like(features.label, validation)
        )
    data.write_features(splits, "mute", tmp_path / "data")
    with pytest.raises(InputError, match=message) as error:
        train(make_tiny_config(tmp_path / "data", "mute"), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_each_step_is_traced_once_per_batch_shape(tiny_data_dir, tmp_path, monkeypatch):
    chex.clear_trace_counter()
    num_shapes = 2
    for name in ("make_train_step", "make_eval_step"):
        make_step = getattr(loop, name)

        def make_counted_step(*arguments, make_step=make_step):
            return chex.assert_max_traces(make_step(*arguments), n=num_shapes)

        monkeypatch.setattr(loop, name, make_counted_step)
    changes = {"data.num_buckets": num_shapes, "train.epochs": 3, "train.save_every": 2}
    config = make_tiny_config(tiny_data_dir, "tiny,text_only", **changes)
    assert train(config, tmp_path, quiet=True).epoch == 3


def test_the_first_step_does_not_wait_for_other_programs(tiny_data_dir, tmp_path, monkeypatch):
    config = make_tiny_config(tiny_data_dir, **{"data.num_buckets": 2})
    train(config, tmp_path / "expected", quiet=True)
    first_step_done = threading.Event()
    num_waited = []
    compile_step = CompiledStep.compile

    class LateExecutor:
        """Starts every job only after the first training step."""

        def __init__(self, executor):
            self.executor = executor

        def submit(self, job):
            def wait_and_run():
                num_waited.append(first_step_done.wait(60))
                return job()

            return self.executor.submit(wait_and_run)

    def compile_late(self, executor, state, batch):
        if compiled_shapes:
            executor = LateExecutor(executor)
        compiled_shapes.append(batch["mask"].shape)
        return compile_step(self, executor, state, batch)

    compiled_shapes = []
    monkeypatch.setattr(CompiledStep, "compile", compile_late)
    train(config, tmp_path / "late", quiet=True, on_step=lambda step: first_step_done.set())
    assert len(compiled_shapes) > 2
    assert num_waited == [True] * (len(compiled_shapes) - 1)
    assert_same_checkpoints(tmp_path / "late", tmp_path / "expected")


def test_unknown_config_fields_are_refused(tiny_data_dir, tmp_path):
    config = make_tiny_config(tiny_data_dir)
    config.model.widht = 3
    with pytest.raises(InputError, match=r"config.model: unknown widht; allowed: .*fusion_dim"):
        train(config, tmp_path / "run", quiet=True)


def test_pmap_and_jit_train_the_same_model(tiny_data_dir, finished_workdir, tmp_path):
    train(make_tiny_config(tiny_data_dir, **{"parallel.backend": "pmap"}), tmp_path, quiet=True)
    for record, expected in zip(
        read_metric_records(tmp_path), read_metric_records(finished_workdir), strict=True
    ):
        assert record == pytest.approx(expected, rel=1e-3)
