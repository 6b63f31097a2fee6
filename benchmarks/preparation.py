"""How fast a corpus of recordings is prepared, and that memory does not grow with it.

`launch.prepare` runs in a process of its own: it imports TensorFlow, and its memory is what is
asked for. The recordings are synthetic.
"""

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
from mister_jax.data.recordings import MAX_LENGTH, MIN_LENGTH, write_recordings
from mister_jax.data.schema import SPLITS
from mister_jax.errors import InputError

# Runs a command and prints the most memory that it, or a process it waited for, has held. In
# between, since a process counts as its own what the one that started it held.
_WATCHED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def preparation_rows(
    utterances: int, num_workers: int = 2, tell: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Prepares a fourth of the utterances, then, from a folder of their own, all.

    Args:
      utterances: of the larger corpus, roughly.
      num_workers: processes that decode recordings.
      tell: is given a line when something long begins.

    Returns:
      A row for each of the two, and one for what the larger has more. Seconds are those of the
      whole command, its start included, but for the last row, from which it cancels out. Memory is
      that of the largest of the command's processes.

    Raises:
      InputError: too few utterances, or a preparation that fails.
    """
    mean_length = (MIN_LENGTH + MAX_LENGTH) / 2
    smallest = round(4 * len(SPLITS) * mean_length)  # a fourth has a dialogue in each split
    if utterances < smallest:
        raise InputError(f"prepare {utterances}; allowed are {smallest} utterances or more")
    rows = []
    for count in (utterances // 4, utterances):
        with tempfile.TemporaryDirectory() as folder:
            tell(f"writing {count} recordings")
            dialogues = max(len(SPLITS), round(count / mean_length))
            manifest = write_recordings(
                pathlib.Path(folder) / "recordings",
                num_dialogues=_shares(dialogues),
                num_workers=num_workers,
            )
            tell(f"preparing {count} recordings")
            rows.append(_prepared(manifest, pathlib.Path(folder) / "datasets", num_workers))
    fewer, more = rows
    names = ("utterances", "audio_hours", "seconds", "peak_memory_mib")
    growth = {name: more[name] - fewer[name] for name in names}
    return [fewer, more, _with_rate({"what": "what is more", **growth})]


def _shares(dialogues: int) -> dict[str, int]:
    others = max(1, dialogues // 10)
    return {"train": dialogues - 2 * others, "validation": others, "test": others}


def _prepared(manifest: pathlib.Path, data_dir: pathlib.Path, num_workers: int) -> Row:
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    files = [manifest.parent / line["audio"] for line in lines if "audio" in line]
    command = [
        *(sys.executable, "-m", "launch.prepare", "--corpus=manifest", "--name=benchmark"),
        *(f"--source={manifest}", f"--data_dir={data_dir}", f"--num_workers={num_workers}"),
    ]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, *command], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"launch.prepare failed: {reason}")
    memory = float(done.stdout.split()[-1]) / (2**20 if sys.platform == "darwin" else 2**10)
    return _with_rate(
        {
            "what": "launch.prepare",
            "utterances": len(lines),
            "audio_hours": sum(map(_seconds, files)) / 3600,
            "seconds": seconds,
            "peak_memory_mib": memory,
        }
    )


def _seconds(path: pathlib.Path) -> float:
    with wave.open(str(path)) as file:
        return file.getnframes() / file.getframerate()


def _with_rate(row: Row) -> Row:
    # What is more may be too little to tell from chance.
    rate = row["audio_hours"] * 3600 / row["seconds"] if row["seconds"] > 0 else None
    return {**row, "audio_seconds_per_second": rate}
