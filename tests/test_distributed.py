"""Two processes of four CPU devices each compute the numbers of one process of eight devices."""

import functools
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import time
import types

import jax
import numpy as np
import pytest

import mister_jax.training.loop as train_module
from mister_jax import data
from mister_jax.cli import app, cluster
from mister_jax.cli.app import STOPPED_BY_SIGTERM
from mister_jax.evaluation.results import Predictor, evaluate
from mister_jax.extraction import PretrainedText, extract_features
from mister_jax.training.loop import train
from tests.helpers.ports import free_port
from tests.helpers.training import (
    make_tiny_config,
    read_metric_records,
)

HEARTBEAT_TIMEOUT = 15
"""Seconds; shorter than the default, since the test waits that long."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with the dataset `tiny`. Its last batches are not full."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"train": 19, "validation": 5, "test": 6}
    dims = {"speech_dim": 6, "text_dim": 7}
    data.write_features(data.generate_features(seed=1, num_dialogues=sizes, num_classes=3, **dims), "tiny", folder)
    return folder


def config(data_dir):
    return make_tiny_config(data_dir, "tiny,text_only", **{"train.epochs": 4, "data.batch_size": 8})


def after_each_step(callback):
    """Calls `callback` with the number of steps taken, in the training of this process."""
    steps, original = itertools.count(1), train_module.should_stop

    def should_stop(*arguments):
        callback(next(steps))
        return original(*arguments)

    train_module.should_stop = should_stop


def train_to_status(workdir, data_dir):
    return 0 if train(config(data_dir), workdir).finished else STOPPED_BY_SIGTERM


def train_and_kill(workdir, data_dir, process_id):
    """Trains; process 1 is killed in the second epoch."""

    def kill(step):
        if (process_id, step) == (1, 5):
            os.kill(os.getpid(), signal.SIGKILL)

    after_each_step(kill)
    return train_to_status(workdir, data_dir)


def train_and_terminate(workdir, data_dir, process_id):
    """Trains with slow steps; process 1 receives SIGTERM after the first."""

    def terminate(step):
        if (process_id, step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)

    after_each_step(terminate)
    return train_to_status(workdir, data_dir)


def train_evaluate_extract(workdir, data_dir, spoken_dir, encoder_folder, process_id):
    status = train_to_status(workdir, data_dir)
    evaluate(workdir, "test")
    encoder = PretrainedText(encoder_folder, max_tokens=16)
    extract_features(encoder, "manifest/spoken", "spoken_two", spoken_dir)
    return status


def run_process(process_id, port, log, work):
    """Runs `work(process_id)` as one of two processes, the way a command does."""
    with pathlib.Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_num_cpu_devices", 4)
    cluster.HEARTBEAT_TIMEOUT = HEARTBEAT_TIMEOUT
    job = (f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={process_id}")
    sys.argv = ["job", "--distributed", *job]
    main = cluster.distributed(lambda: work(process_id), saves_on_sigterm=True)
    app.run(types.SimpleNamespace(main=main))


@pytest.fixture(scope="module")
def run_job(tmp_path_factory):
    """Returns a function that runs work in two processes.

    It returns their exit statuses, their logs, and the seconds between the first and the last end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_distributed", "tensorflow_datasets"])
    folder = tmp_path_factory.mktemp("logs")

    def start(work, *arguments):
        port = free_port()
        work_of_process = functools.partial(work, *arguments)
        logs = [folder / f"{work.__name__}{index}.txt" for index in range(2)]
        processes = [
            context.Process(target=run_process, args=(index, port, log, work_of_process))
            for index, log in enumerate(logs)
        ]
        for process in processes:
            process.start()
        multiprocessing.connection.wait([process.sentinel for process in processes], timeout=300)
        first_end = time.monotonic()
        for process in processes:
            process.join(timeout=100)
        seconds = time.monotonic() - first_end
        for process in processes:
            process.kill()
        return (
            [process.exitcode for process in processes],
            [log.read_text() for log in logs],
            seconds,
        )

    return start


@pytest.fixture(scope="module")
def single_process_run(data_dir, spoken_dir, bert_folder, tmp_path_factory):
    """The workdir of the same training, evaluation and extraction in this process."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    train(config(data_dir), workdir, quiet=True)
    evaluate(workdir, "test", quiet=True)
    encoder = PretrainedText(bert_folder, max_tokens=16)
    extract_features(encoder, "manifest/spoken", "spoken_one", spoken_dir, quiet=True)
    return workdir


def test_killed_and_terminated_job_resumes_to_the_numbers_of_one_process(
    run_job, single_process_run, data_dir, spoken_dir, bert_folder, tmp_path
):
    workdir = tmp_path / "run"
    statuses, logs, seconds = run_job(train_and_kill, workdir, data_dir)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, STOPPED_BY_SIGTERM) and seconds < 4 * HEARTBEAT_TIMEOUT
    # Either JAX ends process 0, or its own collective operation fails first.
    assert "another task died" in logs[0] or "error: process 0 of 2 failed" in logs[0]

    statuses, logs, _ = run_job(train_and_terminate, workdir, data_dir)
    assert statuses == [STOPPED_BY_SIGTERM, STOPPED_BY_SIGTERM], logs
    assert "stopped by SIGTERM" in logs[0] and "stopped" not in logs[1]
    (step,) = (workdir / "checkpoints" / "latest").iterdir()
    assert int(step.name) % 3, "in the middle of an epoch"

    statuses, logs, _ = run_job(train_evaluate_extract, workdir, data_dir, spoken_dir, bert_folder)
    assert statuses == [0, 0], logs
    assert f"resuming {workdir} at step {step.name}" in logs[0]
    assert "epoch" not in logs[1]
    actual, expected = Predictor(workdir).params, Predictor(single_process_run).params
    for actual_param, param in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual_param, param, atol=1e-5)
    actual, expected = read_metric_records(workdir), read_metric_records(single_process_run)
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    for actual_row, row in zip(actual, expected, strict=True):
        assert actual_row == pytest.approx(row, rel=1e-4)
    actual, expected = (
        json.loads((folder / "metrics.json").read_text())
        for folder in (workdir, single_process_run)
    )
    assert actual["test"]["confusion"] == expected["test"]["confusion"]
    for split in ("train", "validation", "test"):
        actual, expected = (
            data.load_features(name, split, spoken_dir) for name in ("spoken_two", "spoken_one")
        )
        np.testing.assert_allclose(actual.text, expected.text, atol=1e-5)
        np.testing.assert_array_equal(actual.text_present, expected.text_present)
    assert not list(spoken_dir.glob(".extracting*"))
