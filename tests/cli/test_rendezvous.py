"""Processes of a job wait for each other, and an error names the process that is missing."""

import concurrent.futures
import socket
import time

import pytest

from mister_jax.cli import rendezvous
from mister_jax.cli.rendezvous import Process, wait_for_all_processes
from mister_jax.errors import InputError
from tests.helpers.ports import free_port


def errors_of(*processes):
    """Runs processes, given as (process_id, num_processes), and returns the error of each, or "".

    Process 0 starts last, so its deadline is also the latest.
    """
    port = free_port()

    def run(process_id, num_processes):
        if process_id == 0:
            time.sleep(0.3)
        try:
            wait_for_all_processes(Process("localhost", port, num_processes, process_id), timeout=2)
        except InputError as error:
            assert "\n" not in str(error)
            return str(error).partition(": ")[2]
        return ""

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(run, *zip(*processes, strict=True)))


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([(0, 3), (1, 3), (2, 3)], ["", "", ""]),
        ([(0, 2), (1, 3)], ["--num_processes is 2 for process 0 and 3 for process 1"] * 2),
        ([(0, 3), (1, 3), (1, 3)], ["two processes have --process_id=1"] * 3),
        ([(0, 3), (2, 3)], ["process 1 of 3 did not start in time"] * 2),
    ],
)
def test_all_processes_get_the_same_error(processes, expected):
    assert errors_of(*processes) == expected


def test_messages_name_missing_processes_while_waiting(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "_FIRST_MESSAGE", 0.2)
    monkeypatch.setattr(rendezvous, "_NEXT_MESSAGE", 0.5)
    errors_of((0, 4), (2, 4))
    lines = capsys.readouterr().err.splitlines()
    messages = [line for line in lines if line.startswith("waiting for process 1, 3 (")]
    assert len(messages) >= 2
    assert any(line.startswith("waiting for process 0 at localhost:") for line in lines)


def test_missing_coordinator_is_named():
    assert errors_of((1, 2))[0].startswith("process 0 does not answer")


def test_occupied_port_is_named():
    with socket.create_server(("", 0)) as occupied:
        process = Process("localhost", occupied.getsockname()[1], 2, 0)
        with pytest.raises(InputError, match="cannot listen"):
            wait_for_all_processes(process, timeout=2)
