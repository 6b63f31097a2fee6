"""One step over many devices: by `jit` over a ("data", "model") mesh, or by `pmap` over ("data",).

A step is a pure function `step(state, batch, axis_name)`. Under `jit` the batch is one global array
and `axis_name` is None; under `pmap` each device runs the step on its rows and `axis_name` names
the axis to sum over. Both ways give the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mister_jax.errors import InputError
from mister_jax.nn.stack import layers_placed

DATA, MODEL = "data", "model"

State = Any
Batch = dict[str, Any]
Step = Callable[[State, Batch, str | None], tuple[State, Any]]
Reader = Callable[[State, Batch, str | None], Any]
ShardingRules = Sequence[tuple[str, tuple[str | None, ...]]]


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread.

    Attributes:
      backend: "jit" or "pmap".
      model_parallelism: devices that share one copy of the parameters; "jit" alone has more than 1.
    """

    backend: Literal["jit", "pmap"] = "jit"
    model_parallelism: int = 1

    def __post_init__(self):
        if self.backend not in ("jit", "pmap"):
            raise ValueError(f"ParallelConfig.backend={self.backend!r}: allowed are 'jit', 'pmap'")
        if self.model_parallelism < 1 or (self.backend == "pmap" and self.model_parallelism > 1):
            raise ValueError(
                f"ParallelConfig.model_parallelism={self.model_parallelism}: must be at least 1, "
                "and 1 with backend='pmap'"
            )


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of `(state, batch)` over devices, compiled once for each shape of batch.

    Attributes:
      function: under `jit` or `pmap`.
      finish: makes of its result what is given back.
    """

    function: Any
    finish: Callable[[Any], Any] = lambda result: result

    def compile(self, state: State, batch: Batch) -> None:
        """Compiles for batches of this shape ahead of the first call, which then starts at once."""
        self.function.lower(state, batch).compile()

    def __call__(self, state: State, batch: Batch) -> Any:
        return self.finish(self.function(state, batch))


class Partitioner(Protocol):
    """A way to run steps over devices."""

    @property
    def num_shards(self) -> int:
        """Parts a global batch is cut into; its rows are a multiple of this."""

    def put_state(self, state: State) -> State:
        """Places a single copy of the state."""

    def put_batch(self, batch: Batch) -> Batch:
        """Places this process's rows of a global batch."""

    def get_state(self, state: State) -> State:
        """The single copy of a placed state."""

    def compile_step(self, step: Step) -> Program:
        """A step over the devices; the state that goes in is given up for what comes out."""

    def compile_eval(self, reader: Reader) -> Program:
        """A function that only reads the state; its results are sums over the batch."""


def job_devices() -> list[jax.Device]:
    """Devices of all processes, over which work is spread unless others are named."""
    return jax.devices()


def data_mesh(model_parallelism: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The ("data", "model") mesh.

    The devices of a process follow each other, so that its rows of a batch do: the p-th of P
    processes holds the p-th of P equal parts. A copy of the parameters lies within a process as
    long as `model_parallelism` divides the devices of each; else it spans some.

    Args:
      model_parallelism: size of the "model" axis.
      devices: all of the job by default.

    Raises:
      ValueError: the devices cannot be shared out evenly.
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

    def arranged(block: list[jax.Device]) -> np.ndarray:
        # Within a process JAX knows best how the devices are wired.
        shape = (len(block) // model_parallelism, model_parallelism)
        axis_types = (AxisType.Auto,) * 2
        return jax.make_mesh(shape, (DATA, MODEL), axis_types=axis_types, devices=block).devices

    grid = np.concatenate([arranged(block) for block in blocks])
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def shardings(tree: Any, mesh: Mesh, rules: ShardingRules = ()) -> Any:
    """Shardings of a tree of arrays by the paths of its leaves.

    The first rule whose pattern is found in a leaf's path ("/".join of its keys) gives the
    leaf's partition; leaves without a rule, and scalars, are replicated, and so is a dimension
    whose size the devices of its axis do not divide, such as an odd vocabulary. An optimiser's
    moments lie under paths that end like their parameters', so one rule serves both.

    Args:
      tree: arrays or their shapes.
      mesh: to shard over.
      rules: pairs of a regular expression and the mesh axes of the dimensions.
    """

    def sharding(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, axes in rules:
            if leaf.ndim and re.search(pattern, name):
                fitting = (
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(axes, leaf.shape, strict=False)
                )
                return NamedSharding(mesh, P(*fitting))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _placed(value: Any, sharding: NamedSharding) -> jax.Array:
    local = not isinstance(value, jax.Array) or value.is_fully_addressable
    if sharding.is_fully_addressable or not local:
        return jax.device_put(value, sharding)
    # All processes have made the same value. To be sure of it, `device_put` would have them compare
    # each array in a program of its own.
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


class JitPartitioner:
    """Steps under `jit`: rows over the "data" axis, parameters by rules over "model".

    Args:
      mesh: of axes "data" and "model".
      rules: see `shardings`.
    """

    def __init__(self, mesh: Mesh, rules: ShardingRules = ()):
        self.mesh = mesh
        self.rules = rules
        self.replicated = NamedSharding(mesh, P())
        self.rows = NamedSharding(mesh, P(DATA))

    @property
    def num_shards(self) -> int:
        return self.mesh.shape[DATA]

    def put_state(self, state: State) -> State:
        return jax.tree.map(_placed, state, shardings(state, self.mesh, self.rules))

    def put_batch(self, batch: Batch) -> Batch:
        return {
            name: jax.make_array_from_process_local_data(self.rows, value)
            for name, value in batch.items()
        }

    def get_state(self, state: State) -> State:
        return state

    def _layers_placed(self) -> contextlib.AbstractContextManager[None]:
        """Layers compute on their device's rows, with kernels that are cut over "model" alone."""
        # A layer's parameters are at the same path as those of all, but without the axis of layers.
        whole = [
            (pattern, tuple(axis if axis == MODEL else None for axis in axes[1:]))
            for pattern, axes in self.rules
        ]

        def parameters(layer: Any) -> Any:
            placed = shardings({"layers": {"layers": layer}}, self.mesh, whole)["layers"]["layers"]
            return jax.lax.with_sharding_constraint(layer, placed)

        def rows(x: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(x, self.rows)

        return layers_placed(parameters, rows)

    def compile_step(self, step: Step) -> Program:
        # The shardings that come out must be those that went in, or the second step would be
        # compiled anew.
        def constrained(state: State, batch: Batch) -> tuple[State, Any]:
            with self._layers_placed():
                state, metrics = step(state, batch, None)
            placed = shardings(state, self.mesh, self.rules)
            return jax.lax.with_sharding_constraint(state, placed), metrics

        return Program(jax.jit(constrained, donate_argnums=0))

    def compile_eval(self, reader: Reader) -> Program:
        def read(state: State, batch: Batch) -> Any:
            with self._layers_placed():
                return reader(state, batch, None)

        return Program(jax.jit(read, out_shardings=self.replicated))


class PmapPartitioner:
    """Steps under `pmap`: one copy of the state and some rows of the batch on each device.

    In a job of several processes it takes all their devices.

    Args:
      devices: of this process; all of them by default.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        self.devices = list(jax.local_devices() if devices is None else devices)
        mesh = jax.make_mesh(
            (len(self.devices),), (DATA,), axis_types=(AxisType.Auto,), devices=self.devices
        )
        self.leading = NamedSharding(mesh, P(DATA))

    @property
    def num_shards(self) -> int:
        return len(self.devices) * jax.process_count()

    def put_state(self, state: State) -> State:
        def repeat(value: Any) -> jax.Array:
            value = np.asarray(value)
            copies = np.broadcast_to(value, (len(self.devices), *value.shape))
            return jax.device_put(copies, self.leading)

        return jax.tree.map(repeat, state)

    def put_batch(self, batch: Batch) -> Batch:
        def split(value: np.ndarray) -> jax.Array:
            parts = value.reshape(len(self.devices), -1, *value.shape[1:])
            return jax.device_put(parts, self.leading)

        return {name: split(value) for name, value in batch.items()}

    def get_state(self, state: State) -> State:
        single = self._first(state)
        if jax.process_count() == 1:
            return single
        # A checkpoint of several processes is made of arrays that all of them know.
        everywhere = NamedSharding(Mesh(np.array(jax.devices()), (DATA,)), P())
        return jax.tree.map(
            lambda value: jax.make_array_from_process_local_data(everywhere, np.asarray(value)),
            single,
        )

    def _first(self, state: State) -> State:
        return jax.tree.map(lambda value: value.addressable_data(0)[0], state)

    def _pmap(self, function: Callable, **options: Any) -> Callable:
        devices = self.devices if jax.process_count() == 1 else None
        named = functools.partial(function, axis_name=DATA)
        return jax.pmap(named, axis_name=DATA, devices=devices, **options)

    def compile_step(self, step: Step) -> Program:
        def finish(result: tuple[State, Any]) -> tuple[State, Any]:
            return result[0], self._first(result[1])

        return Program(self._pmap(step, donate_argnums=0), finish)

    def compile_eval(self, reader: Reader) -> Program:
        return Program(self._pmap(reader), self._first)


def make_partitioner(config: ParallelConfig, rules: ShardingRules = ()) -> Partitioner:
    """The way `config` asks for, over all devices of the job.

    Raises:
      InputError: a copy of the parameters would not lie within each process's devices.
    """
    if config.backend == "pmap":
        return PmapPartitioner()
    # Over several processes they would have to be given the same rows.
    if jax.local_device_count() % config.model_parallelism:
        raise InputError(
            f"config.parallel.model_parallelism={config.model_parallelism}; allowed are divisors "
            f"of the {jax.local_device_count()} devices of a process"
        )
    return JitPartitioner(data_mesh(config.model_parallelism), rules)


def assert_visible_to_all_processes(path: epath.PathLike) -> None:
    """Makes sure that what the first process has written is seen by all; each calls it.

    Args:
      path: what the first process has written.

    Raises:
      InputError: some process does not see it; raised by all.
    """
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices(str(path))
    seen = multihost_utils.process_allgather(np.array(epath.Path(path).exists()))
    if not seen.all():
        raise InputError(
            f"{path}: not seen by process {int(seen.argmin())} of {len(seen)}; allowed is a place "
            "that all processes share, such as gs://BUCKET/FOLDER or a network folder"
        )


@contextlib.contextmanager
def explain_oom(where: str, work: str, remedy: str) -> Iterator[None]:
    """Makes an `InputError` of a lack of memory on the devices.

    Args:
      where: what the message begins with.
      work: what took the memory.
      remedy: what takes less.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{where}: out of memory with {work} ({reason}); try {remedy}") from error


def first_row_index(batch_size: int, axis_name: str | None) -> jax.Array | int:
    """Index in the global batch of the first of this device's `batch_size` rows."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * batch_size


def psum_if_mapped(tree: Any, axis_name: str | None) -> Any:
    """Sums every leaf over the axis, if there is one."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)
