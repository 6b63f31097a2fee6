"""Device mesh, and sharding rules for parameters on TPUs and GPUs.

The mesh has two axes. The rows of a batch are split over "data". The embeddings and the layers'
kernels of the encoders are split over "model" (tensor parallelism) and "data" (fully sharded data
parallelism). All other parameters are replicated.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA, MODEL = "data", "model"

ShardingRules = Sequence[tuple[str, tuple[str | None, ...]]]

ENCODER_SHARDING_RULES: ShardingRules = (
    (r"embedding/embedding$", (MODEL, DATA)),
    (r"layers/layers/(.*/)?(query|key|value|mlp_in|gate|up)/kernel$", (None, DATA, MODEL)),
    (r"layers/layers/(.*/)?(out|mlp_out|down)/kernel$", (None, MODEL, DATA)),
)
"""Rules for the transformer encoders, whose layers are stacked along a leading axis.

The first kernels of an attention or MLP block are split by output and the last kernel by input, so
that a block needs only one all-reduce over "model".
"""


def job_devices() -> list[jax.Device]:
    """Returns the devices of all processes, which a mesh uses by default."""
    return jax.devices()


def data_mesh(model_parallelism: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Creates the ("data", "model") mesh.

    The devices of a process are adjacent, so process p of P holds the p-th of P equal parts of a
    batch. If `model_parallelism` divides the number of devices per process, as
    `partitioning.make_partitioner` requires, each copy of the parameters is within one process.
    Otherwise, a copy spans several processes.

    Args:
      model_parallelism: Size of the "model" axis.
      devices: Devices of the mesh; by default all devices of the job.

    Raises:
      ValueError: `model_parallelism` does not divide the number of devices.
    """
    devices = job_devices() if devices is None else devices
    if len(devices) % model_parallelism:
        raise ValueError(
            f"model_parallelism={model_parallelism} does not divide {len(devices)} devices"
        )
    process = operator.attrgetter("process_index")
    blocks = [list(block) for _, block in itertools.groupby(sorted(devices, key=process), process)]
    if any(len(block) % model_parallelism for block in blocks):
        blocks = [list(devices)]

    def arrange(block: list[jax.Device]) -> np.ndarray:
        # JAX orders the devices of a process by their interconnect.
        shape = (len(block) // model_parallelism, model_parallelism)
        axis_types = (AxisType.Auto,) * 2
        return jax.make_mesh(shape, (DATA, MODEL), axis_types=axis_types, devices=block).devices

    grid = np.concatenate([arrange(block) for block in blocks])
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def shardings(tree: Any, mesh: Mesh, rules: ShardingRules = ()) -> Any:
    """Returns the sharding of each leaf in a tree of arrays.

    The first rule whose pattern matches a leaf's "/"-joined path determines the leaf's sharding.
    Scalars and leaves without a rule are replicated. A dimension is not split if its size is not
    divisible by the size of its mesh axis, as with an odd vocabulary size. The paths of an
    optimizer's moments end with the paths of their parameters, so the rules also apply to the
    moments.

    Args:
      tree: Tree of arrays or of their shapes.
      mesh: Device mesh.
      rules: Pairs of a regular expression and the mesh axis of each dimension.
    """

    def sharding(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, axes in rules:
            if leaf.ndim and re.search(pattern, name):
                divisible_axes = (
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(axes, leaf.shape, strict=False)
                )
                return NamedSharding(mesh, P(*divisible_axes))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, tree)
