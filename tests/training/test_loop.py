"""The training loop as a user runs it: resumed, killed, stopped and misused."""

import collections
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time

import chex
import jax
import numpy as np
import pytest

from mister_jax import data
from mister_jax import workdir as workdirs
from mister_jax.checkpoint import BEST, LATEST, Checkpoints
from mister_jax.errors import InputError
from mister_jax.parallel.partitioning import JitPartitioner
from mister_jax.parallel.sharding import data_mesh
from mister_jax.predictor import Predictor
from mister_jax.training import loop
from mister_jax.training.loop import TrainConfig, TrainingDivergedError, TrainProgress, train
from tests.helpers.training import (
    assert_same_bits,
    assert_same_checkpoint,
    make_tiny_config,
    read_latest_checkpoint,
    read_metric_records,
)


def test_a_run_leaves_what_its_users_look_for(finished_workdir):
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


def test_the_test_split_is_not_opened(tiny_data_dir, tmp_path, monkeypatch):
    opened = []

    def load(name, split, *options):
        opened.append(split)
        return data.load(name, split, *options)

    monkeypatch.setattr("mister_jax.tasks.fusion.load", load)
    train(make_tiny_config(tiny_data_dir, **{"train.epochs": 1}), tmp_path, quiet=True)
    assert set(opened) == {"train", "validation"}


def test_predictions_of_one_class_are_warned_of_once(tiny_data_dir, tmp_path, capsys):
    splits = {name: data.load("tiny", name, tiny_data_dir) for name in ("train", "validation")}
    labels = np.zeros_like(splits["train"].label)
    splits["train"] = dataclasses.replace(splits["train"], label=labels)
    data.write(splits, "one_class", tmp_path)
    changes = {"data.name": "one_class", "train.epochs": 8, "optimizer.learning_rate": 0.1}
    train(make_tiny_config(tmp_path, **changes), tmp_path / "run")
    assert read_metric_records(tmp_path / "run")[-1]["validation/predicted_classes"] == 1
    printed = capsys.readouterr().out
    assert printed.count("WARNING: seed 0 has predicted one class") == 1


def test_a_finished_run_stays_as_it_is(tiny_data_dir, finished_workdir):
    before = (
        read_latest_checkpoint(finished_workdir),
        (finished_workdir / "metrics.jsonl").read_text(),
    )
    assert train(make_tiny_config(tiny_data_dir), finished_workdir, quiet=True).finished
    assert_same_bits(read_latest_checkpoint(finished_workdir), before[0])
    assert (finished_workdir / "metrics.jsonl").read_text() == before[1]


def test_seed_decides_the_run(tiny_data_dir, finished_workdir, tmp_path):
    train(make_tiny_config(tiny_data_dir), tmp_path / "same", quiet=True)
    assert_same_bits(
        read_latest_checkpoint(tmp_path / "same"), read_latest_checkpoint(finished_workdir)
    )
    train(make_tiny_config(tiny_data_dir, seed=1), tmp_path / "other", quiet=True)
    kernel = next(
        name
        for name in read_latest_checkpoint(finished_workdir)[0]
        if "params" in name and "kernel" in name
    )
    assert (
        read_latest_checkpoint(tmp_path / "other")[0][kernel]
        != read_latest_checkpoint(finished_workdir)[0][kernel]
    ).any()


@dataclasses.dataclass(frozen=True)
class Signal:
    """A signal that a training process sends to itself.

    Attributes:
      after: "step", or "latest" or "best" for the start of a checkpoint.
      count: Step number for "step"; otherwise how many such checkpoints have been started.
      name: Name of the signal.
      delay: Seconds between the event and the signal.
    """

    after: str
    count: int
    name: str = "SIGKILL"
    delay: float = 0.0

    def hooks(self):
        """Returns `on_step` and `on_save` for `train`."""
        num_saves = collections.Counter()

        def on_step(step):
            if (self.after, self.count) == ("step", step):
                self._send()

        def on_save(kind, step, state, progress):
            num_saves[kind] += 1
            if (self.after, self.count) == (kind, num_saves[kind]):
                self._send()

        return {"on_step": on_step, "on_save": on_save}

    def _send(self):
        number = getattr(signal, self.name)
        if self.delay:
            threading.Timer(self.delay, os.kill, (os.getpid(), number)).start()
        else:
            os.kill(os.getpid(), number)


STOPPED = 15
STEPS_PER_EPOCH = 4


def two_bucket_config(tiny_data_dir, **changes):
    """Returns the config of a training with batches of two lengths."""
    return make_tiny_config(tiny_data_dir, **{"data.num_buckets": 2, **changes})


def train_and_signal(tiny_data_dir, workdir, sent_signal, changes):
    """Trains in this process on one device, and sends it a signal."""
    jax.config.update("jax_num_cpu_devices", 1)
    step_times = []
    hooks = sent_signal.hooks() if sent_signal else {}
    signal_on_step = hooks.pop("on_step", lambda step: None)

    def on_step(step):
        step_times.append(time.monotonic())
        signal_on_step(step)

    config = two_bucket_config(tiny_data_dir, **changes)
    progress = train(config, workdir, quiet=True, on_step=on_step, **hooks)
    workdir.with_suffix(".seconds").write_text(str(time.monotonic() - step_times[0]))
    sys.exit(0 if progress.finished else STOPPED)


@pytest.fixture(scope="module")
def train_in_subprocess():
    """Runs `train_and_signal` in a process of its own and returns its exit status."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.training.test_loop", "tensorflow", "tensorflow_datasets"]
    )

    def run(tiny_data_dir, workdir, sent_signal=None, **changes):
        arguments = (tiny_data_dir, workdir, sent_signal, changes)
        process = context.Process(target=train_and_signal, args=arguments)
        process.start()
        process.join(timeout=200)
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def uninterrupted_workdir(tiny_data_dir, tmp_path_factory, train_in_subprocess):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train_in_subprocess(tiny_data_dir, workdir) == 0
    return workdir


def test_a_run_killed_while_training_and_saving_ends_with_the_same_bits(
    tiny_data_dir, uninterrupted_workdir, tmp_path, train_in_subprocess
):
    workdir = tmp_path / "run"
    kills = (
        Signal("step", 2),  # In the first epoch, before the first checkpoint.
        Signal("step", STEPS_PER_EPOCH),  # Before the first validation.
        Signal(BEST, 1),  # While the best is being written and before the latest is.
        Signal(LATEST, 1),  # While the latest is being written.
        Signal("step", STEPS_PER_EPOCH + 2),  # In the second epoch.
    )
    for kill in kills:
        assert train_in_subprocess(tiny_data_dir, workdir, kill) == -signal.SIGKILL, kill
    assert train_in_subprocess(tiny_data_dir, workdir) == 0
    assert_same_checkpoint(workdir, uninterrupted_workdir)
    assert read_metric_records(workdir) == read_metric_records(uninterrupted_workdir)


def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(
    tiny_data_dir, uninterrupted_workdir, tmp_path, train_in_subprocess
):
    workdir = tmp_path / "run"
    seconds = float(uninterrupted_workdir.with_suffix(".seconds").read_text())
    kill = Signal("step", 1, delay=random.SystemRandom().uniform(0.001, seconds))
    status = train_in_subprocess(tiny_data_dir, workdir, kill, **{"train.save_every": 1})
    # On a busy machine the training may have finished by then.
    assert status in (-signal.SIGKILL, 0), kill
    assert train_in_subprocess(tiny_data_dir, workdir) == 0, kill
    assert read_metric_records(workdir) == read_metric_records(uninterrupted_workdir), kill
    assert_same_checkpoint(workdir, uninterrupted_workdir)


class Interrupted(Exception):
    pass


def test_a_run_on_eight_devices_resumes_on_one(
    tiny_data_dir, uninterrupted_workdir, tmp_path, monkeypatch
):
    def use_devices(number):
        mesh = data_mesh(devices=jax.devices()[:number])
        monkeypatch.setattr(loop, "make_partitioner", lambda *_: JitPartitioner(mesh))

    def interrupt(kind, step, state, progress):
        if (kind, progress["epoch"]) == (LATEST, 1) and step > STEPS_PER_EPOCH:
            raise Interrupted

    use_devices(8)
    config = two_bucket_config(tiny_data_dir, **{"train.save_every": 2})
    with pytest.raises(Interrupted):
        train(config, tmp_path, quiet=True, on_save=interrupt)
    arrays, progress = read_latest_checkpoint(tmp_path)
    assert progress["epoch"] == 1
    use_devices(1)
    train(two_bucket_config(tiny_data_dir), tmp_path, quiet=True)
    arrays, progress = read_latest_checkpoint(tmp_path)
    expected_arrays, expected_progress = read_latest_checkpoint(uninterrupted_workdir)
    assert progress == expected_progress
    chex.assert_trees_all_close(arrays, expected_arrays, atol=1e-5)
    records, expected_records = (
        read_metric_records(workdir) for workdir in (tmp_path, uninterrupted_workdir)
    )
    for record, expected in zip(records, expected_records, strict=True):
        assert record == pytest.approx(expected, rel=1e-4)


def test_other_data_of_the_same_name_is_refused(tiny_data_dir, finished_workdir, monkeypatch):
    before = read_latest_checkpoint(finished_workdir)

    def load(name, split, *options):
        features = data.load(name, split, *options)
        return dataclasses.replace(features, text=-features.text) if split == "train" else features

    monkeypatch.setattr("mister_jax.tasks.fusion.load", load)
    with pytest.raises(
        InputError, match=r"other data than dataset tiny has now \(train.fingerprint \w+ -> \w+\)"
    ) as error:
        train(make_tiny_config(tiny_data_dir), finished_workdir, quiet=True)
    assert "\n" not in str(error.value)
    assert_same_bits(read_latest_checkpoint(finished_workdir), before)


def test_sigterm_saves_and_the_run_resumes(
    tiny_data_dir, uninterrupted_workdir, tmp_path, train_in_subprocess
):
    workdir = tmp_path / "run"
    stop = Signal("step", 1, "SIGTERM")
    assert train_in_subprocess(tiny_data_dir, workdir, stop) == STOPPED
    _, progress = read_latest_checkpoint(workdir)
    assert progress["epoch"] == 0  # In the middle of the first epoch.
    assert train_in_subprocess(tiny_data_dir, workdir) == 0
    assert_same_checkpoint(workdir, uninterrupted_workdir)


def test_early_stopping_waits_for_the_patience():
    options = TrainConfig(epochs=9, patience=2)
    progress = TrainProgress.initial(1)
    scores = iter([0.3, 0.5, 0.4, 0.4, 0.9])
    while not progress.finished:
        progress.complete_epoch(np.array([next(scores)]), options)
    assert (progress.epoch, progress.best_epochs, progress.best_scores) == (4, [2], [0.5])


def test_a_tie_goes_to_the_later_epoch():
    progress = TrainProgress.initial(1)
    for score in (0.5, 0.5, 0.4):
        progress.complete_epoch(np.array([score]), TrainConfig(epochs=9))
    assert progress.best_epochs == [2]


def test_a_run_that_diverges_stops_and_keeps_the_last_good_state(
    tiny_data_dir, finished_workdir, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    shutil.copytree(finished_workdir, workdir)
    step, progress = read_latest_checkpoint(workdir)[1], workdir / "checkpoints" / LATEST
    good = read_latest_checkpoint(workdir)
    # The run goes on for an epoch more than it was made for, on features that overflow.
    (saved,) = progress.iterdir()
    path = saved / "progress" / "metadata"
    path.write_text(json.dumps({**step, "finished": False}))

    def load(name, split, *options):
        features = data.load(name, split, *options)
        return dataclasses.replace(features, speech=np.full_like(features.speech, np.nan))

    monkeypatch.setattr("mister_jax.tasks.fusion.load", load)
    monkeypatch.setattr(workdirs, "check_config", lambda *_: None)
    monkeypatch.setattr(workdirs, "check_data", lambda *_: None)
    with pytest.raises(TrainingDivergedError, match="not finite between steps") as error:
        train(make_tiny_config(tiny_data_dir, **{"train.epochs": 3}), workdir, quiet=True)
    assert "\n" not in str(error.value)
    assert_same_bits((read_latest_checkpoint(workdir)[0], good[1]), good)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.name": "nowhere"}, "nowhere"),
        ({"data.batch_size": 0}, "batch_size 0"),
        ({"train.epochs": 0}, "epochs"),
        ({"task": "speaking"}, "'speaking'; allowed are fusion"),
        ({"optimizer.name": "sgd"}, "'sgd'; allowed: adam, adamw"),
        ({"optimizer.learning_rate": -1.0}, "learning_rate"),
        ({"parallel.backend": "threads"}, "'threads': allowed are 'jit', 'pmap'"),
        ({"loss.gamma": -1.0}, "gamma -1.0"),
        ({"model.attention_dim": 7}, "attention"),
        ({"model.input_dropout": 1.5}, "rate"),
        ({"num_seeds": 0}, "num_seeds=0; allowed: 1 or more"),
        (
            {"num_seeds": 2, "task": "text_encoder"},
            "num_seeds=2; allowed for the task text_encoder",
        ),
        ({"data.seed": -1}, "data.seed=-1"),
    ],
)
def test_a_config_that_cannot_be_used_says_so(tiny_data_dir, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        train(make_tiny_config(tiny_data_dir, **changes), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (None, "no split 'validation'; allowed: train"),
        (-1, "dataset mute, split validation: no utterance has a label"),
    ],
)
def test_a_dataset_without_a_validation_to_judge_by_is_refused(
    tiny_data_dir, tmp_path, validation, message
):
    splits = {"train": data.load("tiny", "train", tiny_data_dir)}
    if validation is not None:
        features = data.load("tiny", "validation", tiny_data_dir)
        splits["validation"] = dataclasses.replace(
            features, label=np.full_like(features.label, validation)
        )
    data.write(splits, "mute", tmp_path / "data")
    with pytest.raises(InputError, match=message) as error:
        train(make_tiny_config(tmp_path / "data", "mute"), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_nothing_is_compiled_after_the_first_step(tiny_data_dir, tmp_path, monkeypatch):
    chex.clear_trace_counter()
    # Traced once for each of two shapes; the later epochs, the validations and saves add nothing.
    for name, shapes in (("make_train_step", 2), ("make_eval_step", 2)):
        make = getattr(loop, name)

        def counted(*arguments, make=make, shapes=shapes):
            return chex.assert_max_traces(make(*arguments), n=shapes)

        monkeypatch.setattr(loop, name, counted)
    changes = {"data.num_buckets": 2, "train.epochs": 3, "train.save_every": 2}
    assert (
        train(
            make_tiny_config(tiny_data_dir, "tiny,text_only", **changes), tmp_path, quiet=True
        ).epoch
        == 3
    )


def test_unknown_fields_are_named_with_the_allowed(tiny_data_dir, tmp_path):
    config = make_tiny_config(tiny_data_dir)
    config.model.widht = 3
    with pytest.raises(InputError, match=r"config.model: unknown widht; allowed are .*fusion_dim"):
        train(config, tmp_path / "run", quiet=True)


def test_a_workdir_of_another_config_is_refused(tiny_data_dir, finished_workdir):
    before = read_latest_checkpoint(finished_workdir)
    with pytest.raises(InputError, match=r"another config \(seed 0 -> 7\)"):
        train(make_tiny_config(tiny_data_dir, seed=7), finished_workdir, quiet=True)
    assert_same_bits(read_latest_checkpoint(finished_workdir), before)


@pytest.mark.parametrize("kind", [LATEST, BEST])
def test_a_truncated_checkpoint_is_named(tiny_data_dir, tmp_path, kind):
    train(make_tiny_config(tiny_data_dir, **{"train.epochs": 1}), tmp_path, quiet=True)
    (step,) = (tmp_path / "checkpoints" / kind).iterdir()
    for path in step.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(InputError, match=f"{kind}/{step.name}: the checkpoint is damaged") as error:
        if kind == LATEST:
            train(make_tiny_config(tiny_data_dir, **{"train.epochs": 1}), tmp_path, quiet=True)
        else:
            Predictor(tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_a_cut_file_is_read_whole_or_refused(tmp_path, caplog):
    state = {"kernel": np.arange(3000.0), "head": {"bias": np.ones(5, np.float32)}}
    with Checkpoints(tmp_path / "whole") as checkpoints:
        checkpoints.save(LATEST, 3, state, {"epoch": 1})
    caplog.clear()
    refused = set()
    for whole in sorted((tmp_path / "whole").rglob("*")):
        name = whole.relative_to(tmp_path / "whole")
        if whole.is_dir() or "ocdbt.process_0" in name.parts:  # Those are joined in the others.
            continue
        cut = tmp_path / "cut"
        shutil.copytree(tmp_path / "whole", cut)
        (cut / name).write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        try:
            with Checkpoints(cut, read_only=True) as checkpoints:
                restored = checkpoints.restore(LATEST, state)
        except InputError as error:
            assert "\n" not in str(error) and "latest/3: the checkpoint is damaged" in str(error)
            refused.add(name.parts[-1] if "d" not in name.parts else "d")
        else:
            chex.assert_trees_all_equal(restored, (state, {"epoch": 1}))
        shutil.rmtree(cut)
    assert refused == {"_METADATA", "manifest.ocdbt", "d", "metadata"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_pmap_and_jit_train_the_same_model(tiny_data_dir, finished_workdir, tmp_path):
    train(make_tiny_config(tiny_data_dir, **{"parallel.backend": "pmap"}), tmp_path, quiet=True)
    for ours, theirs in zip(
        read_metric_records(tmp_path), read_metric_records(finished_workdir), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_what_a_killed_save_left_goes_with_the_next_training(tmp_path):
    state = {"kernel": np.arange(3.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, 3, state, {})
    half = tmp_path / "checkpoints" / LATEST / "4.orbax-checkpoint-tmp"
    half.mkdir()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored, _ = checkpoints.restore(LATEST, state)
    np.testing.assert_array_equal(restored["kernel"], state["kernel"])
    assert half.exists(), "a training that runs beside an evaluation may be writing it"
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(LATEST, state)
    assert [path.name for path in half.parent.iterdir()] == ["3"]


def test_a_checkpoint_of_other_shapes_is_refused(finished_workdir):
    saved = Checkpoints(finished_workdir, read_only=True)
    with saved, pytest.raises(InputError, match="another model"):
        saved.restore(BEST, {"wrong": np.zeros(3)})
