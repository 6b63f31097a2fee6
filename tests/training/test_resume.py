"""Training runs that are killed, stopped or interrupted resume to the same parameters."""

import collections
import dataclasses
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
import pytest

from mister_jax import data
from mister_jax.checkpoint import BEST, LATEST
from mister_jax.errors import InputError
from mister_jax.parallel.partitioning import JitPartitioner
from mister_jax.parallel.sharding import data_mesh
from mister_jax.schedules import learning_rate_schedule
from mister_jax.training import runs
from mister_jax.training.loop import train
from tests.helpers.commands import SLOW_IMPORTS
from tests.helpers.training import (
    ALL_LAYERS,
    assert_same_bits,
    assert_same_checkpoints,
    make_tiny_config,
    read_checkpoint,
    read_latest_checkpoint,
    read_metric_records,
    read_validation_scores,
)


def test_a_finished_run_is_not_changed(tiny_data_dir, finished_workdir):
    checkpoint = read_latest_checkpoint(finished_workdir)
    metrics = (finished_workdir / "metrics.jsonl").read_text()
    assert train(make_tiny_config(tiny_data_dir), finished_workdir, quiet=True).finished
    assert_same_bits(read_latest_checkpoint(finished_workdir), checkpoint)
    assert (finished_workdir / "metrics.jsonl").read_text() == metrics


@dataclasses.dataclass(frozen=True)
class Signal:
    """A signal that a training process sends to itself.

    Attributes:
      after: Event after which the signal is sent: "step" for a step, "latest" or "best" for the
        start of a checkpoint.
      count: Number of the step, or number of such checkpoints that have been started.
      number: Signal to send.
      delay: Seconds between the event and the signal.
    """

    after: str
    count: int
    number: signal.Signals = signal.SIGKILL
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
        if self.delay:
            threading.Timer(self.delay, os.kill, (os.getpid(), self.number)).start()
        else:
            os.kill(os.getpid(), self.number)


STATUS_OF_STOPPED = 15
STEPS_PER_EPOCH = 3


def two_bucket_config(tiny_data_dir, **changes):
    """Returns a config whose batches have two lengths, and whose epochs are all saved."""
    changes = {"data.num_buckets": 2, "train.min_save_seconds": 0, **changes}
    return make_tiny_config(tiny_data_dir, **changes)


def train_and_signal(tiny_data_dir, workdir, sent_signal, changes):
    """Trains in this process on one device, and sends `sent_signal`, if any, to this process."""
    jax.config.update("jax_num_cpu_devices", 1)
    step_times = []
    hooks = sent_signal.hooks() if sent_signal else {}
    signal_on_step = hooks.pop("on_step", lambda step: None)

    def on_step(step):
        step_times.append(time.monotonic())
        signal_on_step(step)

    config = two_bucket_config(tiny_data_dir, **changes)
    progress = train(config, workdir, quiet=True, on_step=on_step, **hooks)
    if step_times:  # There are no steps if the training was already finished.
        workdir.with_suffix(".seconds").write_text(str(time.monotonic() - step_times[0]))
    sys.exit(0 if progress.finished else STATUS_OF_STOPPED)


@pytest.fixture(scope="module")
def train_in_subprocess():
    """Returns a function that runs `train_and_signal` in a process and returns its exit status."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *SLOW_IMPORTS])

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


def test_a_run_killed_while_training_and_saving_resumes_to_the_same_bits(
    tiny_data_dir, uninterrupted_workdir, tmp_path, train_in_subprocess
):
    workdir = tmp_path / "run"
    kills = (
        Signal("step", 2),  # In the first epoch, before the first checkpoint.
        Signal("step", STEPS_PER_EPOCH),  # Before the first validation.
        Signal(BEST, 1),  # While the best checkpoint is being written.
        Signal(LATEST, 1),  # While the latest checkpoint is being written.
        Signal("step", STEPS_PER_EPOCH + 2),  # In the second epoch.
    )
    for kill in kills:
        assert train_in_subprocess(tiny_data_dir, workdir, kill) == -signal.SIGKILL, kill
    assert train_in_subprocess(tiny_data_dir, workdir) == 0
    assert_same_checkpoints(workdir, uninterrupted_workdir)
    assert read_metric_records(workdir) == read_metric_records(uninterrupted_workdir)


def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(
    tiny_data_dir, uninterrupted_workdir, tmp_path, train_in_subprocess
):
    workdir = tmp_path / "run"
    seconds = float(uninterrupted_workdir.with_suffix(".seconds").read_text())
    kill = Signal("step", 1, delay=random.SystemRandom().uniform(0.001, seconds))
    status = train_in_subprocess(tiny_data_dir, workdir, kill, **{"train.save_every": 1})
    # The training may finish before the signal if it is faster than the uninterrupted run.
    assert status in (-signal.SIGKILL, 0), kill
    assert train_in_subprocess(tiny_data_dir, workdir) == 0, kill
    assert read_metric_records(workdir) == read_metric_records(uninterrupted_workdir), kill
    assert_same_checkpoints(workdir, uninterrupted_workdir)


class InterruptedTrainingError(Exception):
    pass


def test_a_run_on_eight_devices_resumes_on_one(
    tiny_data_dir, uninterrupted_workdir, tmp_path, monkeypatch
):
    def use_devices(number):
        mesh = data_mesh(devices=jax.devices()[:number])
        monkeypatch.setattr(runs, "make_partitioner", lambda *_: JitPartitioner(mesh))

    def interrupt(kind, step, state, progress):
        if (kind, progress["epoch"]) == (LATEST, 1) and step > STEPS_PER_EPOCH:
            raise InterruptedTrainingError

    use_devices(8)
    config = two_bucket_config(tiny_data_dir, **{"train.save_every": 2})
    with pytest.raises(InterruptedTrainingError):
        train(config, tmp_path, quiet=True, on_save=interrupt)
    _, progress = read_latest_checkpoint(tmp_path)
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


def test_resuming_with_changed_data_is_refused(tiny_data_dir, finished_workdir, monkeypatch):
    checkpoint = read_latest_checkpoint(finished_workdir)

    def load(name, split, *options):
        features = data.load_features(name, split, *options)
        return dataclasses.replace(features, text=-features.text) if split == "train" else features

    monkeypatch.setattr("mister_jax.tasks.fusion.load_features", load)
    with pytest.raises(
        InputError, match=r"dataset tiny has changed since .* \(train.fingerprint \w+ -> \w+\)"
    ) as error:
        train(make_tiny_config(tiny_data_dir), finished_workdir, quiet=True)
    assert "\n" not in str(error.value)
    assert_same_bits(read_latest_checkpoint(finished_workdir), checkpoint)


def test_sigterm_saves_and_the_run_resumes(
    tiny_data_dir, uninterrupted_workdir, tmp_path, train_in_subprocess
):
    workdir = tmp_path / "run"
    stop = Signal("step", 1, signal.SIGTERM)
    assert train_in_subprocess(tiny_data_dir, workdir, stop) == STATUS_OF_STOPPED
    _, progress = read_latest_checkpoint(workdir)
    assert progress["epoch"] == 0  # In the middle of the first epoch.
    assert train_in_subprocess(tiny_data_dir, workdir) == 0
    assert_same_checkpoints(workdir, uninterrupted_workdir)


def count_saves(config, workdir, **options):
    """Trains, and returns the number of checkpoints of each kind."""
    num_saves = collections.Counter()
    train(config, workdir, quiet=True, on_save=lambda kind, *_: num_saves.update([kind]), **options)
    return num_saves


@pytest.fixture(scope="module")
def every_epoch_workdir(tiny_data_dir, tmp_path_factory):
    """The work directory of a run with two seeds and checkpoints of all epochs."""
    workdir = tmp_path_factory.mktemp("every_epoch") / "run"
    progress = train(short_epochs_config(tiny_data_dir, 0), workdir, quiet=True)
    assert 1 < min(progress.best_epochs) < max(progress.best_epochs) < 6
    return workdir


def short_epochs_config(tiny_data_dir, min_save_seconds, **changes):
    """Returns a config for two seeds with different best epochs."""
    changes = {
        "num_seeds": 2,
        "train.epochs": 6,
        "train.min_save_seconds": min_save_seconds,
        "optimizer.learning_rate": 0.1,
        **changes,
    }
    return make_tiny_config(tiny_data_dir, "tiny,text_only", **changes)


def test_short_epochs_are_saved_together(tiny_data_dir, every_epoch_workdir, tmp_path):
    config = short_epochs_config(tiny_data_dir, 1000)
    assert count_saves(config, tmp_path) == {BEST: 1, LATEST: 1}
    assert_same_checkpoints(tmp_path, every_epoch_workdir)
    assert read_metric_records(tmp_path) == read_metric_records(every_epoch_workdir)


def test_sigterm_saves_an_epoch_that_is_not_due(tiny_data_dir, every_epoch_workdir, tmp_path):
    config = short_epochs_config(tiny_data_dir, 1000)

    def stop_in_third_epoch(step):
        if step == 2 * STEPS_PER_EPOCH + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert count_saves(config, tmp_path, on_step=stop_in_third_epoch) == {BEST: 1, LATEST: 1}
    _, progress = read_latest_checkpoint(tmp_path)
    assert progress["epoch"] == 2
    assert train(config, tmp_path, quiet=True).finished
    assert_same_checkpoints(tmp_path, every_epoch_workdir)


@pytest.fixture(scope="module")
def newer_best_workdir(tiny_data_dir, tmp_path_factory):
    """The work directory of a run whose best checkpoint is several epochs newer than the latest."""

    def interrupt(kind_and_count):
        num_saves = collections.Counter()

        def on_save(kind, *_):
            num_saves[kind] += 1
            if (kind, num_saves[kind]) == kind_and_count:
                raise InterruptedTrainingError

        return on_save

    workdir = tmp_path_factory.mktemp("newer_best") / "run"
    for min_save_seconds, kind_and_count in ((0, (LATEST, 1)), (1000, (BEST, 1))):
        config = short_epochs_config(tiny_data_dir, min_save_seconds)
        with pytest.raises(InterruptedTrainingError):
            train(config, workdir, quiet=True, on_save=interrupt(kind_and_count))
    _, progress = read_latest_checkpoint(workdir)
    _, best = read_checkpoint(workdir, BEST)
    assert progress["epoch"] == 1 and max(best["epoch"]) > 2
    return workdir


def test_a_run_resumes_if_the_best_checkpoint_is_several_epochs_newer(
    tiny_data_dir, newer_best_workdir, every_epoch_workdir, tmp_path
):
    workdir = shutil.copytree(newer_best_workdir, tmp_path / "run")
    assert train(short_epochs_config(tiny_data_dir, 0), workdir, quiet=True).finished
    assert_same_checkpoints(workdir, every_epoch_workdir)


def test_the_best_parameters_are_those_of_the_resumed_run(
    tiny_data_dir, newer_best_workdir, tmp_path
):
    # The resumed run repeats the epochs after the latest checkpoint. As the number of epochs is
    # different, the schedule gives them other learning rates.
    config = short_epochs_config(tiny_data_dir, 0, **{"train.epochs": 7})
    workdir = shutil.copytree(newer_best_workdir, tmp_path / "run")
    progress = train(config, workdir, quiet=True)
    _, best = read_checkpoint(workdir, BEST)
    assert best["epoch"] == progress.best_epochs
    assert best["weighted_f1"] == progress.best_scores


def test_a_failed_run_keeps_the_best_parameters(tiny_data_dir, every_epoch_workdir, tmp_path):
    config = short_epochs_config(tiny_data_dir, 1000)

    def fail_in_last_epoch(step):
        if step == 5 * STEPS_PER_EPOCH + 1:
            raise InterruptedTrainingError

    with pytest.raises(InterruptedTrainingError):
        train(config, tmp_path, quiet=True, on_step=fail_in_last_epoch)
    assert_same_bits(read_checkpoint(tmp_path, BEST), read_checkpoint(every_epoch_workdir, BEST))
    assert train(config, tmp_path, quiet=True).finished
    assert_same_checkpoints(tmp_path, every_epoch_workdir)


def test_steps_at_the_ends_of_epochs_are_saved_like_others(tiny_data_dir, tmp_path):
    changes = {"train.min_save_seconds": 1000, "train.save_every": 2}
    steps = []
    config = make_tiny_config(tiny_data_dir, "tiny,text_only", **changes)

    def on_save(kind, step, *_):
        if kind == LATEST:
            steps.append(step)

    train(config, tmp_path, quiet=True, on_save=on_save)
    assert steps == list(range(2, 2 * STEPS_PER_EPOCH + 1, 2))


def test_sigterm_stops_a_training_with_a_single_step_per_epoch(tiny_data_dir, tmp_path):
    config = make_tiny_config(tiny_data_dir, **{"data.batch_size": 64, "train.epochs": 5})

    def stop_at_second(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    progress = train(config, tmp_path, quiet=True, on_step=stop_at_second)
    assert progress.epoch == 2 and not progress.finished
    assert train(config, tmp_path, quiet=True).epoch == 5
    assert len(read_validation_scores(tmp_path)) == 5


def test_a_checkpoint_that_a_killed_run_has_not_deleted_is_deleted(
    tiny_data_dir, finished_workdir, tmp_path
):
    workdir = shutil.copytree(finished_workdir, tmp_path / "run")
    latest = workdir / "checkpoints" / "latest"
    (newest,) = latest.iterdir()
    shutil.copytree(newest, latest / str(int(newest.name) - 1))
    assert train(make_tiny_config(tiny_data_dir), workdir, quiet=True).finished
    assert_same_checkpoints(workdir, finished_workdir)


@pytest.fixture
def default_ctrl_c_handler():
    """Installs Python's handler of Ctrl-C, because a shell's background jobs ignore Ctrl-C."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, previous)


def test_a_run_with_bfloat16_parameters_resumes_with_its_float32_average(tiny_data_dir, tmp_path):
    changes = {"model.param_dtype": "bfloat16", "optimizer.average_decay": 0.9}
    config = make_tiny_config(tiny_data_dir, **changes)

    def interrupt(kind, *_):
        if kind == LATEST:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "resumed", quiet=True, on_save=interrupt)
    for name in ("resumed", "complete"):
        assert train(config, tmp_path / name, quiet=True).finished
    assert_same_checkpoints(tmp_path / "resumed", tmp_path / "complete")
    arrays, _ = read_latest_checkpoint(tmp_path / "complete")
    average = {value.dtype.name for name, value in arrays.items() if "average" in name}
    params = {value.dtype.name for name, value in arrays.items() if "'params'" in name}
    assert average == {"float32"} and params == {"bfloat16"}
    best, _ = read_checkpoint(tmp_path / "complete", BEST)
    assert {value.dtype.name for value in best.values()} == {"bfloat16"}


def test_ctrl_c_saves_the_step_and_a_second_one_stops_immediately(
    tiny_data_dir, finished_workdir, tmp_path, capfd, default_ctrl_c_handler
):
    def press_at(*steps):
        def on_step(step):
            if step in steps:
                for _ in range(steps.count(step)):
                    signal.raise_signal(signal.SIGINT)

        return on_step

    def latest_steps():
        return [path.name for path in (tmp_path / "checkpoints" / "latest").iterdir()]

    config = make_tiny_config(tiny_data_dir)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, on_step=press_at(2))
    assert latest_steps() == ["2"]
    output = capfd.readouterr()
    assert "stopped by Ctrl-C; the state of step 2 is saved" in output.out
    assert "press Ctrl-C again to stop immediately" in output.err
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, quiet=True, on_step=press_at(3, 3))
    assert latest_steps() == ["2"]
    assert signal.getsignal(signal.SIGINT) is default_ctrl_c_handler
    train(config, tmp_path, quiet=True)
    assert_same_checkpoints(tmp_path, finished_workdir)


def test_resuming_with_another_config_is_refused(tiny_data_dir, finished_workdir):
    checkpoint = read_latest_checkpoint(finished_workdir)
    with pytest.raises(InputError, match=r"another config \(seed 0 -> 7\)"):
        train(make_tiny_config(tiny_data_dir, seed=7), finished_workdir, quiet=True)
    assert_same_bits(read_latest_checkpoint(finished_workdir), checkpoint)


def test_a_finished_run_continues_with_more_epochs(
    tiny_data_dir, finished_workdir, tmp_path, capsys
):
    workdir = shutil.copytree(finished_workdir, tmp_path / "run")
    longer = make_tiny_config(
        tiny_data_dir, **{"train.epochs": 4, "optimizer.schedule": "constant"}
    )
    with pytest.raises(InputError, match=r"another config \(optimizer.schedule cosine -> constant"):
        train(longer, workdir, quiet=True)
    longer.optimizer.schedule = "cosine"
    assert train(longer, workdir).epoch == 4
    output = capsys.readouterr().out
    assert f"continuing {workdir} after 2 epochs, until epoch 4" in output
    assert "training on " in output and "4 epochs of 3 steps" in output
    records = read_metric_records(workdir)
    # From the third epoch on, the learning rate is the same as in a training run of four epochs.
    schedule = learning_rate_schedule(
        longer.optimizer.learning_rate,
        12,
        name="cosine",
        warmup_fraction=longer.optimizer.warmup_fraction,
    )
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    assert rates[6:] == pytest.approx([float(schedule(step)) for step in range(6, 12)])
    with pytest.raises(InputError, match=r"train.epochs=4, got 2; allowed: at least as many"):
        train(make_tiny_config(tiny_data_dir), workdir, quiet=True)


@pytest.mark.parametrize(
    "model", [{}, {"causal": True, **ALL_LAYERS}], ids=["small", "causal with all layers"]
)
def test_with_a_constant_learning_rate_a_continued_run_equals_a_longer_one(
    tiny_data_dir, tmp_path, model
):
    changes = {
        **{f"model.{name}": value for name, value in model.items()},
        "optimizer.schedule": "constant",
        "optimizer.warmup_fraction": 0.0,
        # The number of length buckets is chosen for the epochs planned at the start of the run. It
        # stays the same when the run continues with more epochs.
        "data.num_buckets": None,
    }
    for workdir, epochs in (("run", 1), ("run", 2), ("whole", 2)):
        config = make_tiny_config(tiny_data_dir, **changes, **{"train.epochs": epochs})
        train(config, tmp_path / workdir, quiet=True)
    assert_same_checkpoints(tmp_path / "run", tmp_path / "whole")
