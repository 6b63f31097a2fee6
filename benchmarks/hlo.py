"""Reads from a program compiled for TPUs how long its parts take and what it sends.

`cost_analysis` counts the body of a loop once, and knows neither the loops' number nor what waits
for the interconnect. Both stand in the text of the compiled program (HLO).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_UNKNOWN = 2**62  # an estimate above this says that there is none
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_NUMBER = re.compile(r"(\d+)\)")
# Devices that take part in a collective, in the three ways they are written.
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUPS_BY_COUNT = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_GROUPS_OF_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")

# Of the bytes that come out of a collective over g devices, the share a device receives, in a ring.
_RECEIVED = {
    "all-gather": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "reduce-scatter": lambda g: g - 1,
    "all-to-all": lambda g: (g - 1) / g,
}
_PERMUTE = "collective-permute"


class _Instruction(NamedTuple):
    shape: str
    operation: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Execution:
    """What one device does in a run of a program.

    Attributes:
      cycles: the compiler's estimates of all operations, but for those that wait.
      repetition: `cycles` over those of a program whose loops run once.
      blocking: bytes received while nothing else is done.
      overlapped: bytes received beside computation.
    """

    cycles: float
    repetition: float
    blocking: float
    overlapped: float


def execution(text: str) -> Execution:
    """Reads `Compiled.as_text()` of a program for TPUs.

    Raises:
      ValueError: a loop whose trip count cannot be read.
    """
    computations, entry = _computations(text)
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for instruction in computations[name]:
            trips = 1
            if instruction.operation == "while":
                trips = _trip_count(computations[_found(_CONDITION, instruction.rest)])
            for called in _called(instruction.rest):
                visit(called, times * trips)

    visit(entry, 1)
    cycles = once = blocking = overlapped = 0.0
    # Several fusions do a part of one collective; all of them have its channel. Two begin and end
    # it; others may stand in a loop, each run of which takes it a step further.
    fused: dict[str, tuple[int, float]] = {}
    for name, times in runs.items():
        for instruction in computations[name]:
            estimate = _CYCLES.search(instruction.rest)
            if estimate is not None and int(estimate[1]) < _UNKNOWN:
                cycles += times * float(estimate[1])
                once += float(estimate[1])
            received = _received(instruction)
            channel = _CHANNEL.search(instruction.rest)
            if "all-reduce-scatter" in name:
                blocking += times * received / 2  # the sums are kept in part
            elif instruction.operation.endswith("-start"):
                overlapped += times * received
            elif "fus" in name and channel is not None:
                fewest, most = fused.get(channel[1], (times, received))
                fused[channel[1]] = min(times, fewest), max(received, most)
            else:
                blocking += times * received
    overlapped += sum(map(math.prod, fused.values()))
    return Execution(cycles, cycles / once if once else 1.0, blocking, overlapped)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    found: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        heading = _COMPUTATION.match(line)
        if heading is not None:
            found[heading[2]] = current = []
            entry = heading[2] if heading[1] else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction is not None:
            current.append(_Instruction(*instruction.groups()))
    return found, entry


def _called(rest: str) -> Iterator[str]:
    yield from _CALLED.findall(rest)
    for names in _BRANCHES.findall(rest):
        yield from (name.strip().removeprefix("%") for name in names.split(","))


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    if match is None:
        raise ValueError(f"no {pattern.pattern} in {text[:200]}")
    return match[1]


def _trip_count(condition: list[_Instruction]) -> int:
    """Of a loop that counts from 0 to the one constant of its condition."""
    limits = [line for line in condition if line.operation == "constant"]
    if len(limits) != 1:
        raise ValueError(f"a loop's condition has {len(limits)} constants; needed: 1")
    return int(_found(_NUMBER, limits[0].rest))


def _received(instruction: _Instruction) -> float:
    """Bytes a device receives in an instruction; 0 if it is no collective."""
    operation = instruction.operation.removesuffix("-start")
    if operation == _PERMUTE:
        # What is sent stands beside what is received.
        sides = 2 if instruction.operation != operation else 1
        return _bytes(instruction.shape) / sides
    if operation not in _RECEIVED:
        return 0.0
    return _bytes(instruction.shape) * _RECEIVED[operation](_group_size(instruction.rest))


def _group_size(rest: str) -> int:
    listed = _GROUPS.search(rest)
    if listed is not None:
        return len(listed[1].split(","))
    counted = _GROUPS_BY_COUNT.search(rest)
    if counted is not None:
        return int(counted[1])
    mesh = _GROUPS_OF_MESH.search(rest)
    if mesh is None:
        raise ValueError(f"no replica_groups in {rest[:200]}")
    sizes = {axis: int(size) for axis, size in _MESH_AXIS.findall(mesh[1])}
    return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", mesh[2]))


def _bytes(shape: str) -> float:
    total = 0.0
    for kind, sizes in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
        total += bits / 8 * math.prod(int(size) for size in sizes.split(",") if size)
    return total
