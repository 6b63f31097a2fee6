"""Peak performance of accelerators.

Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e; NVIDIA's data sheets of A100, H100 and
H200 (SXM), without sparsity. The rate of one TPU link is a chip's documented bidirectional
bandwidth divided by its number of ports (4 in a 2D torus, 6 in a 3D torus), one way; NVLink is one
way, too.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """Peak performance of one chip.

    Attributes:
      flops: bfloat16 operations per second.
      memory: Bytes of device memory.
      bandwidth: Bytes per second between chip and memory.
      interconnect: Bytes per second that a chip receives in a collective. For a TPU these are two
        links, because a ring runs in both directions.
      cycles: Cycles of a TensorCore per second: `flops` divided by the operations of its matrix
        units per cycle. None if XLA does not estimate cycles for this chip.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    cycles: float | None = None


def _cycles(flops: float, matrix_units: int) -> float:
    return flops / (matrix_units * 128 * 128 * 2)


CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1200e9, 2 * 50e9, _cycles(275e12, 8)),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 2 * 50e9, _cycles(197e12, 4)),  # v5e
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 2 * 100e9, _cycles(459e12, 8)),  # v5p
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1638e9, 2 * 100e9),  # v6e
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
}
"""Chips by the device kind that JAX reports."""
