"""Analyzes the text (HLO) of programs that XLA compiled for TPUs, to determine their work.

XLA's cost analysis counts the body of a loop once, does not distinguish on-chip memory from device
memory, and omits communication. The text of the scheduled program contains trip counts, memory
spaces and collectives, for which JAX has no API.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLS = re.compile(r"(?:calls|body|condition|to_apply)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NAME = re.compile(r"[\w.\-]+")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\](\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\(\d\)")
_ALIASED_OUTPUT = re.compile(r"\{(\d+)\}: \(\d+")
# Three notations for the groups of devices in a collective: lists {{0,1},{2,3}}, [groups,size], and
# axes of a mesh.
_GROUP_LISTS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUP_COUNTS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_GROUP_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")

# Ratio of the bytes that a device receives to the bytes of the result, in a ring of g devices.
_RECEIVED = {
    "all-gather": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "reduce-scatter": lambda g: g - 1,
    "all-to-all": lambda g: (g - 1) / g,
}
_COLLECTIVES = (*_RECEIVED, "collective-permute")


# Operations that access no memory, or whose memory accesses are counted elsewhere: in the
# computations that they call, or at the start of an asynchronous operation.
_FREE = (
    *("parameter", "constant", "iota", "partition-id", "replica-id"),
    *("get-tuple-element", "tuple", "bitcast", "optimization-barrier", "after-all"),
    *("while", "conditional", "call", "async-done", "copy-done", "slice-done"),
    *("all-gather-done", "all-reduce-done", "collective-permute-done"),
)
_SLICES = ("dynamic-slice", "slice")


class _Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Work of one device during one run of a program.

    Attributes:
      cycles: Sum of XLA's estimates for all instructions, without communication.
      memory_bytes: Bytes read from and written to device memory, including received bytes.
      blocking_bytes: Bytes received while the core waits.
      overlapped_bytes: Bytes received during computation.
    """

    cycles: float
    memory_bytes: float
    blocking_bytes: float
    overlapped_bytes: float


def analyze_schedule(text: str) -> Schedule:
    """Analyzes `Compiled.as_text()`, the text of a program compiled for TPUs.

    Raises:
      ValueError: The text cannot be analyzed, for example because a trip count is not constant.
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
    fused = _fused_computations(computations)
    cycles = memory = blocking = overlapped = 0.0
    # A collective can be split over several fusions that share a channel. One fusion starts the
    # collective, another ends it, and the fusions between them may be in a loop. `chained` maps
    # each channel to the smallest number of runs and the largest number of bytes of its fusions.
    chained: dict[str, tuple[int, float]] = {}
    for name, runs in num_runs.items():
        if name not in fused:
            memory += runs * _memory_bytes(computations[name], computations)
        for instruction in computations[name]:
            estimate = _CYCLES.search(instruction.rest)
            if estimate is not None and int(estimate[1]) < 2**62:  # Larger values mean "unknown".
                cycles += runs * float(estimate[1])
            received = _received_bytes(instruction)
            channel = _CHANNEL.search(instruction.rest)
            if "all-reduce-scatter" in name:
                blocking += runs * received / 2  # Each device receives only a part of the sums.
            elif instruction.operation.endswith("-start"):
                overlapped += runs * received
            elif "fus" in name and channel is not None:
                fewest, most = chained.get(channel[1], (runs, received))
                chained[channel[1]] = min(runs, fewest), max(received, most)
            else:
                blocking += runs * received
    overlapped += sum(map(math.prod, chained.values()))
    return Schedule(cycles, memory + blocking + overlapped, blocking, overlapped)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Returns each computation's instructions, and the name of the entry computation."""
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
    """Returns the trip count of a loop, which is the only constant in its condition."""
    limits = [line.rest for line in condition if line.operation == "constant"]
    if len(limits) != 1:
        raise ValueError(f"a loop's condition has {len(limits)} constants; needed: 1")
    return int(limits[0].partition(")")[0])


def _fused_computations(computations: dict[str, list[_Instruction]]) -> set[str]:
    """Returns the fused computations, whose intermediate values are not stored in memory."""
    return {
        called
        for instructions in computations.values()
        for instruction in instructions
        if instruction.operation not in ("while", "conditional", "call")
        for called in _CALLS.findall(instruction.rest)
    }


def _memory_bytes(
    instructions: list[_Instruction], computations: dict[str, list[_Instruction]]
) -> float:
    """Returns the bytes of device memory that a computation accesses, except in collectives."""
    shapes = {instruction.name: instruction.shape for instruction in instructions}
    total = 0.0
    for instruction in instructions:
        operation, shape = instruction.operation, instruction.shape
        operands = [shapes.get(name, "") for name in _operands(instruction)]
        called = _CALLS.search(instruction.rest)
        if operation in _FREE or operation.removesuffix("-start") in _COLLECTIVES:
            continue
        if operation == "fusion" and called is not None:
            body = computations[called[1]]
            total += _bytes_written(instruction, body) + sum(
                _bytes_read(parameter, body, computations)
                for operand, parameter in zip(operands, _parameters(body), strict=True)
                if _device_bytes(operand)
            )
        elif operation == "dynamic-update-slice":
            update = operands[1]
            total += _device_bytes(update) + bool(_device_bytes(shape)) * _num_bytes(update)
        elif operation in _SLICES:
            is_read = bool(_device_bytes(operands[0]))
            total += _device_bytes(shape) + is_read * _num_bytes(shape)
        else:
            total += _device_bytes(shape)
            if not operation.endswith("-start"):  # The result of a start includes the operands.
                total += sum(map(_device_bytes, operands))
    return total


def _operands(instruction: _Instruction) -> list[str]:
    return _OPERAND.findall(instruction.rest.partition(")")[0])


def _parameters(body: list[_Instruction]) -> list[_Instruction]:
    """Returns a computation's parameters in the order of the caller's operands."""
    parameters = [instruction for instruction in body if instruction.operation == "parameter"]
    return sorted(parameters, key=lambda parameter: int(parameter.rest.partition(")")[0]))


def _bytes_read(
    value: _Instruction,
    body: list[_Instruction],
    computations: dict[str, list[_Instruction]],
) -> float:
    """Returns how many bytes of a parameter a fusion reads: all bytes, or those of slices."""
    total = 0.0
    for user in body:
        operands = _operands(user)
        if value.name not in operands:
            continue
        if user.operation in _SLICES:
            total += _num_bytes(user.shape)
        elif user.operation == "bitcast":
            total += _bytes_read(user, body, computations)
        elif user.operation == "fusion":
            inner = computations[_search(_CALLS, user.rest)]
            parameter = _parameters(inner)[operands.index(value.name)]
            total += _bytes_read(parameter, inner, computations)
        elif user.operation == "dynamic-update-slice" and operands[0] == value.name:
            continue  # The operand is updated in place.
        elif user.operation not in ("tuple", "custom-call", *_COLLECTIVES):
            return _num_bytes(value.shape)
    return min(total, _num_bytes(value.shape))


def _bytes_written(fusion: _Instruction, body: list[_Instruction]) -> float:
    """Returns the bytes of device memory that a fusion writes, except results of collectives."""
    by_name = {instruction.name: instruction for instruction in body}
    root = body[-1]
    results = _operands(root) if root.operation in ("tuple", "custom-call") else [root.name]
    aliasing = fusion.rest.partition("output_to_operand_aliasing=")[2].partition(", calls=")[0]
    unchanged = {int(output) for output in _ALIASED_OUTPUT.findall(aliasing)}
    total = 0.0
    for index, (name, array) in enumerate(
        zip(results, _ARRAY.finditer(fusion.shape), strict=False)
    ):
        result = by_name[name]
        while result.operation == "bitcast":
            result = by_name[_operands(result)[0]]
        if index in unchanged or result.operation in ("parameter", *_COLLECTIVES):
            continue
        if result.operation == "dynamic-update-slice":
            written = by_name[_operands(result)[1]].shape
            total += bool(_device_bytes(array[0])) * _num_bytes(written)
        else:
            total += _device_bytes(array[0])
    return total


def _received_bytes(instruction: _Instruction) -> float:
    """Returns the bytes that a device receives in a collective, or 0 for other instructions."""
    operation = instruction.operation.removesuffix("-start")
    if operation == "collective-permute":
        # The result of the asynchronous form contains both the sent and the received array.
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
    """Returns the bytes of an array or tuple."""
    return sum(map(_array_bytes, _ARRAY.finditer(shape)))


def _device_bytes(shape: str) -> float:
    """Returns the bytes of an array or tuple in device memory, without on-chip memory."""
    arrays = _ARRAY.finditer(shape)
    return sum(_array_bytes(array) for array in arrays if not _ON_CHIP.search(array[4] or ""))


def _array_bytes(array: re.Match[str]) -> float:
    _, bits, sizes, _ = array.groups()
    # The name "pred" contains no number of bits; a value takes 8 bits.
    return int(bits or 8) / 8 * math.prod(int(size) for size in sizes.split(",") if size)
