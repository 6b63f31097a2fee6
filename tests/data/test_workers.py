"""`ordered_map`: order, look-ahead, exceptions and crashes of processes."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mister_jax.data import workers
from mister_jax.data.workers import WorkerCrashError, ordered_map

ROOT = pathlib.Path(__file__).parents[2]


def slow_square(number: int) -> int:
    time.sleep(0.02 * (number % 3 == 0))
    print("not a result")
    return number**2


def power(number: int, exponent: int) -> int:
    return number**exponent


def crash(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        os._exit(7)
    return number


def fail(number: int) -> int:
    raise ValueError(f"{number} failed")


def loaded_modules(_: int) -> set[str]:
    return set(sys.modules)


def process_id(_: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_are_in_order_of_items(num_workers):
    results = ordered_map(slow_square, range(30), num_workers=num_workers)
    assert list(results) == [number**2 for number in range(30)]


def test_no_items_give_no_results():
    assert list(ordered_map(slow_square, [], num_workers=2)) == []


def test_function_may_be_partial():
    cube = functools.partial(power, exponent=3)
    assert list(ordered_map(cube, range(4), num_workers=1)) == [0, 1, 8, 27]


def test_worker_processes_end_with_the_iteration():
    processes = set(ordered_map(process_id, range(20), num_workers=2))
    assert os.getpid() not in processes
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_workers_import_no_jax_and_no_tensorflow():
    (modules,) = ordered_map(loaded_modules, [0], num_workers=1)
    assert "mister_jax.data.workers" in modules
    assert not {"jax", "flax", "tensorflow"} & modules


def test_crash_affects_only_its_own_item():
    results = list(ordered_map(crash, range(8), num_workers=2))
    crashes = {index: str(result) for index, result in enumerate(results) if result != index}
    assert crashes == {
        2: "a worker ended with signal 9",
        4: "a worker ended with exit status 7",
    }
    assert all(isinstance(results[index], WorkerCrashError) for index in crashes)


def test_exception_of_function_is_raised():
    with pytest.raises(ValueError, match="5 failed"):
        list(ordered_map(fail, [5], num_workers=1))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_number_of_items_taken_ahead_is_bounded(num_workers):
    num_taken = 0

    def items():
        nonlocal num_taken
        while num_taken < 40:
            num_taken += 1
            yield num_taken

    for index, _ in enumerate(ordered_map(slow_square, items(), num_workers=num_workers)):
        assert num_taken - index <= workers.QUEUED_PER_WORKER * num_workers
    assert num_taken == 40


def test_closing_the_iterator_kills_running_calls():
    results = ordered_map(time.sleep, [0, 60, 60], num_workers=1)
    begin = time.monotonic()
    next(results)
    results.close()
    assert time.monotonic() - begin < 30


def test_negative_number_of_workers_is_refused_immediately():
    with pytest.raises(ValueError, match="num_workers=-1"):
        ordered_map(slow_square, [], num_workers=-1)


def test_main_program_may_come_from_standard_input():
    program = (
        "from mister_jax.data.workers import ordered_map\n"
        "import math\n"
        "print(list(ordered_map(math.sqrt, [1, 4], num_workers=1)))\n"
    )
    process = subprocess.run(
        [sys.executable, "-"], input=program, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.stdout == "[1.0, 2.0]\n", process.stderr
