"""Functions in parallel processes: order, look-ahead, exceptions and dead processes."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mister_jax.data import workers
from mister_jax.data.workers import WorkerCrash, ordered_map

ROOT = pathlib.Path(__file__).parents[2]


def late_square(number: int) -> int:
    time.sleep(0.02 * (number % 3 == 0))
    print("not an answer")
    return number**2


def power(number: int, exponent: int) -> int:
    return number**exponent


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        os._exit(7)
    return number


def refuse(number: int) -> int:
    raise ValueError(f"{number} is refused")


def loaded(_: int) -> set[str]:
    return set(sys.modules)


def process_id(_: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_are_in_the_order_of_the_items(num_workers):
    results = ordered_map(late_square, range(30), num_workers=num_workers)
    assert list(results) == [number**2 for number in range(30)]


def test_no_worker_is_started_for_no_items():
    assert list(ordered_map(late_square, [], num_workers=2)) == []


def test_a_function_may_be_partial():
    cube = functools.partial(power, exponent=3)
    assert list(ordered_map(cube, range(4), num_workers=1)) == [0, 1, 8, 27]


def test_the_work_is_done_in_other_processes_that_do_not_outlive_it():
    processes = set(ordered_map(process_id, range(20), num_workers=2))
    assert os.getpid() not in processes
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_workers_import_no_jax_and_no_tensorflow():
    (modules,) = ordered_map(loaded, [0], num_workers=1)
    assert "mister_jax.data.workers" in modules
    assert not {"jax", "flax", "tensorflow"} & modules


def test_a_dead_process_costs_one_result():
    results = list(ordered_map(die, range(8), num_workers=2))
    crashes = {index: str(result) for index, result in enumerate(results) if result != index}
    assert crashes == {
        2: "a worker ended with signal 9",
        4: "a worker ended with exit status 7",
    }
    assert all(isinstance(results[index], WorkerCrash) for index in crashes)


def test_an_exception_of_the_function_is_raised():
    with pytest.raises(ValueError, match="5 is refused"):
        list(ordered_map(refuse, [5], num_workers=1))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_items_are_taken_only_a_little_ahead(num_workers):
    taken = 0

    def items():
        nonlocal taken
        while taken < 40:
            taken += 1
            yield taken

    for index, _ in enumerate(ordered_map(late_square, items(), num_workers=num_workers)):
        assert taken - index <= workers.AHEAD * num_workers
    assert taken == 40


def test_an_iteration_may_be_given_up():
    results = ordered_map(time.sleep, [0, 60, 60], num_workers=1)
    begin = time.monotonic()
    next(results)
    results.close()
    assert time.monotonic() - begin < 30


def test_a_negative_number_of_workers_is_refused_at_once():
    with pytest.raises(ValueError, match="num_workers=-1"):
        ordered_map(late_square, [], num_workers=-1)


def test_the_main_program_need_not_be_a_file():
    program = (
        "from mister_jax.data.workers import ordered_map\n"
        "import math\n"
        "print(list(ordered_map(math.sqrt, [1, 4], num_workers=1)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-"], input=program, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[1.0, 2.0]\n", done.stderr
