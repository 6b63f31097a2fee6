"""Partitioners, which run a step on several devices with `jit` or `pmap`.

A step is a pure function `step(state, batch, axis_name)`. Under `jit`, the batch is one global
array and `axis_name` is None. Under `pmap`, each device runs the step on its rows, and `axis_name`
is the axis to sum over. Both backends give the same results up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mister_jax.errors import InputError
from mister_jax.nn.scanned_layers import layer_sharding_constraints
from mister_jax.parallel.sharding import DATA, MODEL, ShardingRules, data_mesh, shardings

State = Any
Batch = dict[str, Any]
Step = Callable[[State, Batch, str | None], tuple[State, Any]]
EvalFn = Callable[[State, Batch, str | None], Any]


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Options for running a step on several devices.

    Attributes:
      backend: "jit" or "pmap".
      model_parallelism: Number of devices over which one copy of the parameters is split; must be 1
        with "pmap".
    """

    backend: Literal["jit", "pmap"] = "jit"
    model_parallelism: int = 1

    def __post_init__(self):
        if self.backend not in ("jit", "pmap"):
            raise ValueError(f"ParallelConfig.backend={self.backend!r}; allowed: 'jit', 'pmap'")
        if self.model_parallelism < 1 or (self.backend == "pmap" and self.model_parallelism > 1):
            raise ValueError(
                f"ParallelConfig.model_parallelism={self.model_parallelism}; allowed: at least 1, "
                "and only 1 with backend='pmap'"
            )


def fast_compiler_options(platform: str) -> dict[str, Any]:
    """Returns XLA options for a shorter compilation of programs with many small operations.

    Args:
      platform: Platform of the devices, such as "cpu".
    """
    if platform != "cpu":
        return {}
    # MiSTER-E has hundreds of small fusions. On CPU, XLA's older code generator with few
    # optimizations compiles the training step in 60% of the time, but the step takes a fifth
    # longer. Prediction with MiSTER-E takes the same time with these options, as does extraction
    # with prosody, MiniLM, Whisper and WavLM.
    options: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False}
    if not jax.config.read("jax_disable_most_optimizations"):  # This flag sets level 0.
        options["xla_backend_optimization_level"] = 1
    return options


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """Function of `(state, batch)` on all devices, compiled once per batch shape.

    Attributes:
      function: Function transformed by `jit` or `pmap`.
      finish: Function that post-processes the output of `function`.
    """

    function: Any
    finish: Callable[[Any], Any] = lambda output: output
    _programs: dict[Any, Future[Any]] = dataclasses.field(default_factory=dict, repr=False)

    def compile(self, executor: Executor, state: State, batch: Batch) -> Future[Any]:
        """Starts compiling the function for the shapes of a batch.

        Args:
          executor: Executor that runs the compilation.
          state: State with the shapes and shardings of later calls. Its buffers may be donated
            before the compilation starts.
          batch: Batch from `put_batch`.

        Returns:
          Future that is done when the program is ready. `__call__` with a batch of these shapes
          waits for it.
        """
        arguments = jax.tree.map(_abstract, (state, batch))
        program = executor.submit(lambda: self.function.lower(*arguments).compile())
        self._programs[_shapes(batch)] = program
        return program

    def has_program(self, batch: Batch) -> bool:
        """Returns whether `compile` has been called for the shapes of a batch."""
        return _shapes(batch) in self._programs

    def __call__(self, state: State, batch: Batch) -> Any:
        """Runs the function on all devices."""
        program = self._programs.get(_shapes(batch))
        function = self.function if program is None else program.result()
        return self.finish(function(state, batch))


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _shapes(batch: Batch) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, value.shape) for name, value in sorted(batch.items()))


class Partitioner(Protocol):
    """Interface for running steps on several devices."""

    @property
    def num_shards(self) -> int:
        """Number of shards of a global batch, which must divide the number of rows."""

    def put_state(self, state: State) -> State:
        """Takes a single copy of a state, and replicates or shards it over the devices."""

    def abstract_state(self, shapes: State) -> State:
        """Returns the shapes and shardings of a state after `put_state`, from its shapes before."""

    def put_batch(self, batch: Batch) -> Batch:
        """Places this process's rows of a global batch on the devices of this process."""

    def get_state(self, state: State) -> State:
        """Returns a single copy of a state that `put_state` has placed."""

    def compile_step(self, step: Step, *, fast_compile: bool = False) -> CompiledStep:
        """Returns a function that runs the step on all devices and donates the state's buffers.

        Args:
          step: Function of `(state, batch, axis_name)`.
          fast_compile: Whether a short compilation is more important than a short run time.
        """

    def compile_eval(self, function: EvalFn) -> CompiledStep:
        """Returns a function that evaluates a batch on all devices without changing the state.

        With `jit`, the function is compiled with `fast_compiler_options`.

        Args:
          function: Function of `(state, batch, axis_name)`.
        """


class JitPartitioner:
    """Runs steps under `jit`; rows are sharded over "data", and parameters by the rules.

    Args:
      mesh: Mesh with the axes "data" and "model".
      rules: Sharding rules for the parameters; see `sharding.shardings`.
    """

    def __init__(self, mesh: Mesh, rules: ShardingRules = ()):
        self.mesh = mesh
        self.rules = rules
        self.replicated = NamedSharding(mesh, P())
        self.rows = NamedSharding(mesh, P(DATA))

    @property
    def num_shards(self) -> int:
        """Size of the "data" axis."""
        return self.mesh.shape[DATA]

    def put_state(self, state: State) -> State:
        """Shards the state according to the rules."""
        return jax.tree.map(_put, state, shardings(state, self.mesh, self.rules))

    def abstract_state(self, shapes: State) -> State:
        """Returns the shapes with the shardings from the rules."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings(shapes, self.mesh, self.rules),
        )

    def put_batch(self, batch: Batch) -> Batch:
        """Assembles the global batch from each process's rows."""
        return {
            name: jax.make_array_from_process_local_data(self.rows, value)
            for name, value in batch.items()
        }

    def get_state(self, state: State) -> State:
        """Returns the state itself, which is already a single copy."""
        return state

    def _layer_constraints(self) -> contextlib.AbstractContextManager[None]:
        """Makes each scanned layer gather the parts of its kernels that are split over "data"."""
        # Inside the scan, parameters keep their paths but have no layer axis.
        layer_rules = [
            (pattern, tuple(axis if axis == MODEL else None for axis in axes[1:]))
            for pattern, axes in self.rules
        ]

        def constrain_params(layer: Any) -> Any:
            tree = {"layers": {"layers": layer}}
            layer_shardings = shardings(tree, self.mesh, layer_rules)["layers"]["layers"]
            return jax.lax.with_sharding_constraint(layer, layer_shardings)

        def constrain_rows(x: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(x, self.rows)

        return layer_sharding_constraints(constrain_params, constrain_rows)

    def compile_step(self, step: Step, *, fast_compile: bool = False) -> CompiledStep:
        """Returns the step under `jit`."""

        def constrained_step(state: State, batch: Batch) -> tuple[State, Any]:
            with self._layer_constraints():
                state, metrics = step(state, batch, None)
            # If output and input shardings differed, the second step would recompile.
            state_shardings = shardings(state, self.mesh, self.rules)
            return jax.lax.with_sharding_constraint(state, state_shardings), metrics

        options = self._fast_compiler_options() if fast_compile else None
        return CompiledStep(jax.jit(constrained_step, donate_argnums=0, compiler_options=options))

    def compile_eval(self, function: EvalFn) -> CompiledStep:
        """Returns the function under `jit`, with replicated outputs."""

        def constrained_function(state: State, batch: Batch) -> Any:
            with self._layer_constraints():
                return function(state, batch, None)

        options = self._fast_compiler_options()
        return CompiledStep(
            jax.jit(constrained_function, out_shardings=self.replicated, compiler_options=options)
        )

    def _fast_compiler_options(self) -> dict[str, Any]:
        return fast_compiler_options(self.mesh.devices.flat[0].platform)


class PmapPartitioner:
    """Runs steps under `pmap`; each device has a copy of the state and some rows of the batch.

    With several processes, the step runs on the devices of all processes.

    Args:
      devices: Devices of this process to use; all by default.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        self.devices = list(jax.local_devices() if devices is None else devices)
        mesh = jax.make_mesh(
            (len(self.devices),), (DATA,), axis_types=(AxisType.Auto,), devices=self.devices
        )
        self.leading = NamedSharding(mesh, P(DATA))

    @property
    def num_shards(self) -> int:
        """Number of devices in all processes."""
        return len(self.devices) * jax.process_count()

    def put_state(self, state: State) -> State:
        """Copies the state to each of this process's devices."""

        def replicate(value: Any) -> jax.Array:
            value = np.asarray(value)
            copies = np.broadcast_to(value, (len(self.devices), *value.shape))
            return jax.device_put(copies, self.leading)

        return jax.tree.map(replicate, state)

    def abstract_state(self, shapes: State) -> State:
        """Returns the shapes with a leading axis of this process's devices."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (len(self.devices), *leaf.shape), leaf.dtype, sharding=self.leading
            ),
            shapes,
        )

    def put_batch(self, batch: Batch) -> Batch:
        """Splits this process's rows among its devices."""

        def split(value: np.ndarray) -> jax.Array:
            parts = value.reshape(len(self.devices), -1, *value.shape[1:])
            return jax.device_put(parts, self.leading)

        return {name: split(value) for name, value in batch.items()}

    def get_state(self, state: State) -> State:
        """Returns the first device's copy of the state."""
        first_copy = self._first(state)
        if jax.process_count() == 1:
            return first_copy
        # With several processes, Orbax needs arrays that span all processes.
        replicated = NamedSharding(Mesh(np.array(jax.devices()), (DATA,)), P())
        return jax.tree.map(
            lambda value: jax.make_array_from_process_local_data(replicated, np.asarray(value)),
            first_copy,
        )

    def _first(self, state: State) -> State:
        return jax.tree.map(lambda value: value.addressable_data(0)[0], state)

    def _pmap(self, function: Callable, **options: Any) -> Callable:
        devices = self.devices if jax.process_count() == 1 else None
        function = functools.partial(function, axis_name=DATA)
        return jax.pmap(function, axis_name=DATA, devices=devices, **options)

    def compile_step(self, step: Step, *, fast_compile: bool = False) -> CompiledStep:
        """Returns the step under `pmap`. `fast_compile` has no effect."""

        def finish(output: tuple[State, Any]) -> tuple[State, Any]:
            return output[0], self._first(output[1])

        return CompiledStep(self._pmap(step, donate_argnums=0), finish)

    def compile_eval(self, function: EvalFn) -> CompiledStep:
        """Returns the function under `pmap`."""
        return CompiledStep(self._pmap(function), self._first)


def make_partitioner(config: ParallelConfig, rules: ShardingRules = ()) -> Partitioner:
    """Creates the configured partitioner for all devices of the job.

    Raises:
      InputError: `model_parallelism` does not divide the number of devices per process.
    """
    if config.backend == "pmap":
        return PmapPartitioner()
    # If a copy of the parameters spanned several processes, these processes would have to load the
    # same rows, but each process loads different rows.
    if jax.local_device_count() % config.model_parallelism:
        raise InputError(
            f"config.parallel.model_parallelism={config.model_parallelism}; allowed: divisors of "
            f"{jax.local_device_count()}, the number of devices per process"
        )
    return JitPartitioner(data_mesh(config.model_parallelism), rules)


def first_row_index(batch_size: int, axis_name: str | None) -> jax.Array | int:
    """Returns the global index of this device's first row, given the number of rows per device."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * batch_size


def psum_if_mapped(tree: Any, axis_name: str | None) -> Any:
    """Sums every leaf over the mapped axis, if there is one."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _put(value: Any, sharding: NamedSharding) -> jax.Array:
    is_local = not isinstance(value, jax.Array) or value.is_fully_addressable
    if sharding.is_fully_addressable or not is_local:
        return jax.device_put(value, sharding)
    # All processes have the same value. `device_put` would check this with one program per array.
    host_value = np.asarray(value)
    return jax.make_array_from_callback(host_value.shape, sharding, host_value.__getitem__)
