"""Two processes of four CPU devices each, on this machine: the numbers of one process of eight."""

import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import socket
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags

import mister_jax.training.loop as train_module
from launch import TERMINATED, cluster, run
from mister_jax import data
from mister_jax.errors import InputError
from mister_jax.evaluation.results import Predictor, evaluate
from mister_jax.extract import PretrainedText, extract
from mister_jax.training.loop import train
from tests.test_train import records, tiny

HEARTBEAT_TIMEOUT = 15
"""Shorter than users have it: the test has nothing else to do meanwhile."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with the dataset `tiny`, whose dialogues leave the last batches short."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"train": 19, "validation": 5, "test": 6}
    widths = {"speech_dim": 6, "text_dim": 7}
    data.write(data.generate(seed=1, num_dialogues=sizes, num_classes=3, **widths), "tiny", folder)
    return folder


def config(data_dir):
    return tiny(data_dir, "tiny,text_only", **{"train.epochs": 4, "data.batch_size": 8})


def each_step(change):
    """Calls `change` with the number of the step before each step of a training."""
    steps, original = itertools.count(1), train_module._stop_together

    def watched(*arguments):
        change(next(steps))
        return original(*arguments)

    train_module._stop_together = watched


def trained(workdir, data_dir):
    return 0 if train(config(data_dir), workdir).finished else TERMINATED


def killed(workdir, data_dir, index):
    """The second process is killed in the second epoch."""

    def change(step):
        if (index, step) == (1, 5):
            os.kill(os.getpid(), signal.SIGKILL)

    each_step(change)
    return trained(workdir, data_dir)


def terminated(workdir, data_dir, index):
    """The second process gets SIGTERM at once; steps take their time."""

    def change(step):
        if (index, step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)

    each_step(change)
    return trained(workdir, data_dir)


def all_of_it(workdir, data_dir, spoken_dir, folder, index):
    """A training to its end, an evaluation, an extraction."""
    status = trained(workdir, data_dir)
    evaluate(workdir, "test")
    extract(PretrainedText(folder, max_tokens=16), "manifest/spoken", "spoken_two", spoken_dir)
    return status


def process(index, port, log, work):
    """One of the two processes of a job, as a script in `launch/` runs it."""
    with pathlib.Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_num_cpu_devices", 4)
    cluster.HEARTBEAT_TIMEOUT = HEARTBEAT_TIMEOUT
    place = (f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={index}")
    sys.argv = ["job", "--distributed", *place]

    run(cluster.member(lambda: work(index), saves_on_sigterm=True))


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def last_line(log):
    return (log.splitlines() or [""])[-1]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Runs work in two processes.

    Gives their exit statuses, what they wrote, and the seconds from the first's end to the last's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_distributed", "tensorflow_datasets"])
    folder = tmp_path_factory.mktemp("logs")

    def start(work, *arguments):
        port = free_port()
        logs = [folder / f"{work.__name__}{index}.txt" for index in range(2)]
        both = [
            context.Process(
                target=process, args=(index, port, log, functools.partial(work, *arguments))
            )
            for index, log in enumerate(logs)
        ]
        for one in both:
            one.start()
        multiprocessing.connection.wait([one.sentinel for one in both], timeout=300)
        first = time.monotonic()
        for one in both:
            one.join(timeout=100)
        seconds = time.monotonic() - first
        for one in both:
            one.kill()
        # What a process has left to say of its own end comes after it.
        failed = [
            log for one, log in zip(both, logs, strict=True) if one.exitcode not in (0, TERMINATED)
        ]
        words = time.monotonic() + 20
        while not all(last_line(log.read_text()).startswith("error: ") for log in failed):
            if time.monotonic() > words:
                break
            time.sleep(0.1)
        return [one.exitcode for one in both], [log.read_text() for log in logs], seconds

    return start


@pytest.fixture(scope="module")
def alone(data_dir, spoken_dir, bert_folder, tmp_path_factory):
    """The same in this process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(config(data_dir), workdir, quiet=True)
    evaluate(workdir, "test", quiet=True)
    extract(
        PretrainedText(bert_folder, max_tokens=16),
        "manifest/spoken",
        "spoken_one",
        spoken_dir,
        quiet=True,
    )
    return workdir


def test_a_job_killed_and_stopped_ends_with_the_numbers_of_one_process(
    job, alone, data_dir, spoken_dir, bert_folder, tmp_path
):
    workdir = tmp_path / "run"
    statuses, logs, seconds = job(killed, workdir, data_dir)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, TERMINATED) and seconds < 4 * HEARTBEAT_TIMEOUT
    assert last_line(logs[0]).startswith("error: process 0 of 2 has failed, or lost the others")

    statuses, logs, _ = job(terminated, workdir, data_dir)
    assert statuses == [TERMINATED, TERMINATED], logs
    assert "stopped by SIGTERM" in logs[0] and "stopped" not in logs[1]
    (step,) = (workdir / "checkpoints" / "latest").iterdir()
    assert int(step.name) % 3, "in the middle of an epoch"

    statuses, logs, _ = job(all_of_it, workdir, data_dir, spoken_dir, bert_folder)
    assert statuses == [0, 0], logs
    assert f"resuming {workdir} at step {step.name}" in logs[0]
    assert "epoch" not in logs[1]
    ours, theirs = Predictor(workdir).params, Predictor(alone).params
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert [row["step"] for row in records(workdir)] == [row["step"] for row in records(alone)]
    for ours, theirs in zip(records(workdir), records(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = (
        json.loads((folder / "metrics.json").read_text()) for folder in (workdir, alone)
    )
    assert ours["test"]["confusion"] == theirs["test"]["confusion"]
    for split in ("train", "validation", "test"):
        ours, theirs = (data.load(name, split, spoken_dir) for name in ("spoken_two", "spoken_one"))
        np.testing.assert_allclose(ours.text, theirs.text, atol=1e-5)
        np.testing.assert_array_equal(ours.text_present, theirs.text_present)
    assert not list(spoken_dir.glob(".extracting*"))


TWO = ("--num_processes=2",)


@pytest.fixture
def given():
    """Function that parses flags for one test."""
    saved = flags.FLAGS.__dict__["__flags"]
    before = {name: (saved[name].value, saved[name].present) for name in saved}

    def parse(*arguments):
        flags.FLAGS(["job", *arguments])

    yield parse
    for name, (value, present) in before.items():
        saved[name].value, saved[name].present = value, present


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--process_id=0",), "--process_id goes with --distributed"),
        (("--distributed", *TWO), "allowed are all of --coordinator"),
        (
            ("--distributed", "--coordinator=here", "--num_processes=2", "--process_id=0"),
            "HOST:PORT",
        ),
        (("--distributed", "--coordinator=h:1", "--num_processes=2", "--process_id=2"), "0 to 1"),
    ],
)
def test_flags_that_do_not_go_together_are_named(given, arguments, message):
    given(*arguments)
    with pytest.raises(InputError, match=message) as error:
        cluster.join()
    assert "\n" not in str(error.value)


def test_a_machine_alone_does_not_ask_for_others(given, monkeypatch):
    given()
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("called"))
    cluster.join()


def meeting(*processes):
    """What each process of (number, number of all) is told, where all meet at one place.

    Process 0 is the last to come, and so the last that stops waiting.
    """
    port = free_port()

    def told(number, count):
        if number == 0:
            time.sleep(0.3)
        try:
            cluster.meet(cluster.Place("localhost", port, count, number), timeout=2)
        except InputError as error:
            assert "\n" not in str(error)
            return str(error).partition(": ")[2]
        return ""

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(told, *zip(*processes, strict=True)))


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([(0, 3), (1, 3), (2, 3)], ["", "", ""]),
        ([(0, 2), (1, 3)], ["--num_processes is 2 for process 0, 3 for process 1"] * 2),
        ([(0, 3), (1, 3), (1, 3)], ["two processes have --process_id=1"] * 3),
        ([(0, 3), (2, 3)], ["of 3 processes 1 did not come in time"] * 2),
    ],
)
def test_processes_that_do_not_fit_each_other_are_told_so(processes, expected):
    assert meeting(*processes) == expected


def test_who_is_missing_is_said_while_a_process_waits(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "_FIRST_MESSAGE", 0.2)
    monkeypatch.setattr(cluster, "_NEXT_MESSAGE", 0.5)
    meeting((0, 4), (2, 4))
    lines = capsys.readouterr().err.splitlines()
    waiting = [line for line in lines if line.startswith("waiting for process 1, 3 (")]
    assert len(waiting) >= 2
    assert any(line.startswith("waiting for process 0 at localhost:") for line in lines)


def test_a_coordinator_that_is_not_there_is_named():
    assert meeting((1, 2))[0].startswith("process 0 does not answer")


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        place = cluster.Place("localhost", taken.getsockname()[1], 2, 0)
        with pytest.raises(InputError, match="cannot be listened at"):
            cluster.meet(place, timeout=2)
