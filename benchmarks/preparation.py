"""Measures the speed and memory of preparing a corpus of synthetic recordings."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable

from benchmarks.report import Row
from mister_jax.data.schema import SPLITS
from mister_jax.data.synthetic_speech import MAX_LENGTH, MIN_LENGTH, write_speech_corpus
from mister_jax.errors import InputError

# Script that runs a command and prints the peak memory of the command's largest process. This
# process cannot measure that memory: until a child calls exec, it has the memory of this process,
# which RUSAGE_CHILDREN would therefore include.
_RUN_AND_PRINT_MEMORY = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def measure_preparation(
    num_utterances: int, num_workers: int = 2, log: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Prepares a corpus of about `num_utterances` utterances, and a corpus of a quarter of that.

    Returns:
      A row for each corpus, and a row for the difference between the two corpora, in which the
      command's start-up time cancels out. Memory is the peak memory of the largest process.

    Raises:
      InputError: There are too few utterances, or the preparation fails.
    """
    mean_length = (MIN_LENGTH + MAX_LENGTH) / 2
    # The smaller corpus needs a dialogue in each split.
    minimum = round(4 * len(SPLITS) * mean_length)
    if num_utterances < minimum:
        raise InputError(f"--prepare={num_utterances}; allowed: {minimum} utterances or more")
    rows = []
    for size in (num_utterances // 4, num_utterances):
        num_dialogues = max(len(SPLITS), round(size / mean_length))
        num_test = max(1, num_dialogues // 10)
        sizes = (num_dialogues - 2 * num_test, num_test, num_test)
        splits = dict(zip(SPLITS, sizes, strict=True))
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            log(f"writing {size} recordings")
            manifest = write_speech_corpus(
                folder / "recordings", num_dialogues=splits, num_workers=num_workers
            )
            log(f"preparing {size} recordings")
            rows.append(_prepare(manifest, folder / "datasets", num_workers))
    small, large = rows
    names = ("utterances", "audio_hours", "seconds", "peak_memory_mib")
    difference = {name: large[name] - small[name] for name in names}
    return [small, large, _with_rate({"what": "difference", **difference})]


def _prepare(manifest: pathlib.Path, data_dir: pathlib.Path, num_workers: int) -> Row:
    utterances = [json.loads(line) for line in manifest.read_text().splitlines()]
    paths = [manifest.parent / row["audio"] for row in utterances if "audio" in row]
    command = [
        *(sys.executable, "-m", "launch.prepare", "--corpus=manifest", "--name=benchmark"),
        *(f"--source={manifest}", f"--data_dir={data_dir}", f"--num_workers={num_workers}"),
    ]
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", _RUN_AND_PRINT_MEMORY, *command],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"launch.prepare failed: {reason}")
    memory = float(result.stdout.split()[-1]) / (2**20 if sys.platform == "darwin" else 2**10)
    return _with_rate(
        {
            "what": "launch.prepare",
            "utterances": len(utterances),
            "audio_hours": sum(map(_audio_seconds, paths)) / 3600,
            "seconds": seconds,
            "peak_memory_mib": memory,
        }
    )


def _audio_seconds(path: pathlib.Path) -> float:
    with wave.open(str(path)) as file:
        return file.getnframes() / file.getframerate()


def _with_rate(row: Row) -> Row:
    # If both corpora are small, noise can make the difference between their times negative or zero.
    rate = row["audio_hours"] * 3600 / row["seconds"] if row["seconds"] > 0 else None
    return {**row, "audio_seconds_per_second": rate}
