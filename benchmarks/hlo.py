"""Reads cycles and communication from the text of a program that XLA compiled for TPUs (HLO).

XLA's cost analysis counts the body of a loop once and does not include communication. The text of
the scheduled program has both: trip counts of loops, and all collectives. JAX offers no structured
access to them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLS = re.compile(r"(?:calls|body|condition|to_apply)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NAME = re.compile(r"[\w.\-]+")
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")
# The devices of a collective: as lists {{0,1}}, as [groups,size], or as axes of a mesh.
_GROUP_LISTS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUP_COUNTS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_GROUP_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")

# Bytes that a device receives in a ring, divided by the bytes of the result, for g devices.
_RECEIVED = {
    "all-gather": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "reduce-scatter": lambda g: g - 1,
    "all-to-all": lambda g: (g - 1) / g,
}


class _Instruction(NamedTuple):
    shape: str
    operation: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Work of one device in a run of a program."""

    cycles: float  # sum of XLA's estimates of all instructions, without communication
    loop_factor: float  # `cycles` divided by the cycles if every loop ran once
    blocking_bytes: float  # received while the core waits
    overlapped_bytes: float  # received during computation


def analyze_schedule(text: str) -> Schedule:
    """Analyzes the text of a program compiled for TPUs, `Compiled.as_text()`.

    Raises:
      ValueError: The text is not as expected, for example a loop without a constant trip count.
    """
    computations, entry = _parse(text)
    num_runs: Counter[str] = Counter()

    def visit(name: str, runs: int) -> None:
        num_runs[name] += runs
        for instruction in computations[name]:
            trips = 1
            if instruction.operation == "while":
                trips = _trip_count(computations[_search(_CONDITION, instruction.rest)])
            branches = " ".join(_BRANCHES.findall(instruction.rest))
            for called in _CALLS.findall(instruction.rest) + _NAME.findall(branches):
                visit(called, runs * trips)

    visit(entry, 1)
    cycles = cycles_once = blocking = overlapped = 0.0
    # Several fusions, which share a channel, can each do a part of one collective: one starts it,
    # one ends it, and those between may be in a loop. Channel -> fewest runs, most bytes.
    fused: dict[str, tuple[int, float]] = {}
    for name, runs in num_runs.items():
        for instruction in computations[name]:
            estimate = _CYCLES.search(instruction.rest)
            if estimate is not None and int(estimate[1]) < 2**62:  # More stands for "unknown".
                cycles += runs * float(estimate[1])
                cycles_once += float(estimate[1])
            received = _received_bytes(instruction)
            channel = _CHANNEL.search(instruction.rest)
            if "all-reduce-scatter" in name:
                blocking += runs * received / 2  # Each device keeps a part of the sums only.
            elif instruction.operation.endswith("-start"):
                overlapped += runs * received
            elif "fus" in name and channel is not None:
                fewest, most = fused.get(channel[1], (runs, received))
                fused[channel[1]] = min(runs, fewest), max(received, most)
            else:
                blocking += runs * received
    overlapped += sum(map(math.prod, fused.values()))
    return Schedule(cycles, cycles / cycles_once if cycles_once else 1.0, blocking, overlapped)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Returns the instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[_Instruction]] = {}
    instructions: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if heading := _COMPUTATION.match(line):
            computations[heading[2]] = instructions = []
            entry = heading[2] if heading[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(_Instruction(*instruction.groups()))
    return computations, entry


def _search(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    if match is None:
        raise ValueError(f"no {pattern.pattern} in {text[:200]}")
    return match[1]


def _trip_count(condition: list[_Instruction]) -> int:
    """Returns the trip count of a loop that counts from 0 to the one constant of its condition."""
    limits = [line.rest for line in condition if line.operation == "constant"]
    if len(limits) != 1:
        raise ValueError(f"a loop's condition has {len(limits)} constants; needed: 1")
    return int(limits[0].partition(")")[0])


def _received_bytes(instruction: _Instruction) -> float:
    """Returns the bytes that a device receives in a collective; 0 for another instruction."""
    operation = instruction.operation.removesuffix("-start")
    if operation == "collective-permute":
        # The asynchronous form returns what it sends along with what it receives.
        return _num_bytes(instruction.shape) / (1 if instruction.operation == operation else 2)
    if operation not in _RECEIVED:
        return 0.0
    return _num_bytes(instruction.shape) * _RECEIVED[operation](_group_size(instruction.rest))


def _group_size(rest: str) -> int:
    if match := _GROUP_LISTS.search(rest):
        return len(match[1].split(","))
    if match := _GROUP_COUNTS.search(rest):
        return int(match[1])
    if match := _GROUP_AXES.search(rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    raise ValueError(f"no replica_groups in {rest[:200]}")


def _num_bytes(shape: str) -> float:
    return sum(
        int(bits or 8) / 8 * math.prod(int(size) for size in sizes.split(",") if size)
        for _, bits, sizes in _ARRAY.findall(shape)  # "pred" has no number of bits.
    )
