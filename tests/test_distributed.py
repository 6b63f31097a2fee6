"""Two processes with four CPU devices each give the results of one process with one device."""

import contextlib
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

from mister_jax import data
from mister_jax.cli import app, cluster
from mister_jax.cli.app import STOPPED_BY_SIGTERM
from mister_jax.errors import InputError
from mister_jax.evaluation.results import evaluate
from mister_jax.extraction import PretrainedText, extract_features
from mister_jax.predictor import Predictor
from mister_jax.training.loop import train
from mister_jax.training.runs import plan_run
from mister_jax.workdir import lock
from tests.helpers.commands import SLOW_IMPORTS
from tests.helpers.ports import free_port
from tests.helpers.training import make_tiny_config, read_metric_records

HEARTBEAT_TIMEOUT = 15
"""Seconds; shorter than the default, because the test waits until the timeout expires."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with the dataset `tiny`. None of its batches is full."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"train": 19, "validation": 5, "test": 6}
    splits = data.generate_features(
        seed=1, num_dialogues=sizes, num_classes=3, speech_dim=6, text_dim=7
    )
    data.write_features(splits, "tiny", folder)
    return folder


def make_config(data_dir):
    changes = {"train.epochs": 4, "data.batch_size": 8, "num_seeds": 2}
    return make_tiny_config(data_dir, "tiny,text_only", **changes)


def train_to_status(workdir, data_dir, on_step=None):
    """Trains and returns the exit status of the command."""
    progress = train(make_config(data_dir), workdir, on_step=on_step)
    return 0 if progress.finished else STOPPED_BY_SIGTERM


def train_and_kill(workdir, data_dir, process_id):
    """Trains, and kills process 1 in the third epoch. The first epoch has been saved by then."""

    def kill(step):
        if (process_id, step) == (1, 8):
            os.kill(os.getpid(), signal.SIGKILL)

    return train_to_status(workdir, data_dir, on_step=kill)


def train_and_terminate(workdir, data_dir, process_id):
    """Resumes training with slow steps; process 1 receives SIGTERM after its first step."""
    num_steps = itertools.count(1)

    def terminate(step):
        if (process_id, next(num_steps)) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2.0)  # The processes need seconds to agree on the last step.

    return train_to_status(workdir, data_dir, on_step=terminate)


def train_evaluate_extract(workdir, data_dir, spoken_dir, encoder_folder, process_id):
    status = train_to_status(workdir, data_dir)
    evaluate(workdir, "test")
    encoder = PretrainedText(encoder_folder, max_tokens=16)
    extract_features(encoder, "manifest/spoken", "spoken_two", spoken_dir)
    config = make_config(data_dir)
    config.seed = process_id
    with pytest.raises(InputError, match=r"config\.seed is 0 in process 0 and 1 in process 1"):
        plan_run(config, workdir.with_name("other"))
    with contextlib.ExitStack() as stack:
        if process_id == 0:
            stack.enter_context(lock(workdir))
        with pytest.raises(InputError, match="another process is training in this work directory"):
            train(make_config(data_dir), workdir, quiet=True)
    return status


def run_process(process_id, port, log, work):
    """Runs `work(process_id)` as a command in one process of a job with two processes."""
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

    The function returns the exit statuses, the logs, and the seconds between the ends of the two
    processes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *SLOW_IMPORTS])
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
def single_process_workdir(data_dir, spoken_dir, bert_folder, tmp_path_factory):
    """The work directory of the same training, evaluation and extraction in this process."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    train(make_config(data_dir), workdir, quiet=True)
    evaluate(workdir, "test", quiet=True)
    encoder = PretrainedText(bert_folder, max_tokens=16)
    extract_features(encoder, "manifest/spoken", "spoken_one", spoken_dir, quiet=True)
    return workdir


def test_a_killed_and_terminated_job_resumes_to_the_results_of_one_process(
    run_job, single_process_workdir, data_dir, spoken_dir, bert_folder, tmp_path
):
    workdir = tmp_path / "run"
    statuses, logs, seconds = run_job(train_and_kill, workdir, data_dir)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, STOPPED_BY_SIGTERM) and seconds < 4 * HEARTBEAT_TIMEOUT
    # Either JAX ends process 0, or a collective operation of process 0 fails first.
    assert "another task died" in logs[0] or "error: process 0 of 2 failed" in logs[0]

    statuses, logs, _ = run_job(train_and_terminate, workdir, data_dir)
    assert statuses == [STOPPED_BY_SIGTERM, STOPPED_BY_SIGTERM], logs
    assert f"resuming {workdir} at step" in logs[0]
    assert "stopped by SIGTERM" in logs[0] and "stopped" not in logs[1]
    (step,) = (workdir / "checkpoints" / "latest").iterdir()
    assert int(step.name) % 3, "in the middle of an epoch"

    statuses, logs, _ = run_job(train_evaluate_extract, workdir, data_dir, spoken_dir, bert_folder)
    assert statuses == [0, 0], logs
    assert f"resuming {workdir} at step {step.name}" in logs[0]
    assert "epoch" not in logs[1]
    assert_same_results(workdir, single_process_workdir)
    assert_same_features("spoken_two", "spoken_one", spoken_dir)
    assert not list(spoken_dir.glob(".extracting*"))


def assert_same_results(workdir, expected_workdir):
    """Checks that parameters, metric records and confusion matrix are equal up to rounding."""
    params, expected_params = (
        jax.tree.leaves(Predictor(path).params) for path in (workdir, expected_workdir)
    )
    for value, expected in zip(params, expected_params, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)
    records, expected_records = map(read_metric_records, (workdir, expected_workdir))
    for record, expected in zip(records, expected_records, strict=True):
        assert record["step"] == expected["step"]
        assert record == pytest.approx(expected, rel=1e-4)
    confusion, expected_confusion = (
        json.loads((path / "metrics.json").read_text())["test"]["confusion"]
        for path in (workdir, expected_workdir)
    )
    assert confusion == expected_confusion


def assert_same_features(name, expected_name, data_dir):
    for split in ("train", "validation", "test"):
        features = data.load_features(name, split, data_dir)
        expected = data.load_features(expected_name, split, data_dir)
        np.testing.assert_allclose(features.text, expected.text, atol=1e-5)
        np.testing.assert_array_equal(features.text_present, expected.text_present)
