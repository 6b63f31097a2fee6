"""One training step on 1, 2 and 8 devices, by jit and by pmap."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mister_jax.errors import InputError
from mister_jax.losses import LossWeights
from mister_jax.optim import OptimizerConfig, make_optimizer
from mister_jax.parallel.partitioning import (
    JitPartitioner,
    ParallelConfig,
    PmapPartitioner,
    fast_compiler_options,
    make_partitioner,
)
from mister_jax.parallel.sharding import data_mesh, shardings
from mister_jax.training.steps import initial_state, make_eval_step, make_train_step
from tests.helpers.training import TinyTask

pytestmark = pytest.mark.devices


@pytest.fixture(scope="module")
def task(tiny_config):
    """A task with every kind of dropout, whose masks must not depend on the devices."""
    dropouts = {
        "input_dropout": 0.2,
        "context_dropout": 0.2,
        "fusion_dropout": 0.2,
        "attention_dropout": 0.2,
        "classifier_dropout": 0.2,
        "modality_dropout": 0.3,
    }
    return TinyTask(dataclasses.replace(tiny_config, **dropouts))


@pytest.fixture(scope="module")
def batch(make_batch):
    """A batch with unevenly distributed utterances: one of eight devices gets none."""
    return make_batch([5, 1, 3, 0, 2, 5, 4, 1])


@pytest.fixture(scope="module")
def optimizer():
    config = OptimizerConfig(name="adamw", learning_rate=1e-2, weight_decay=0.1, average_decay=0.9)
    return make_optimizer(config, 10)


def partitioner_of(backend, num_devices):
    devices = jax.devices()[:num_devices]
    if backend == "pmap":
        return PmapPartitioner(devices)
    return JitPartitioner(data_mesh(devices=devices))


def test_evaluations_and_some_steps_compile_fast_on_cpus(monkeypatch):
    options = []
    partitioner = JitPartitioner(data_mesh())
    monkeypatch.setattr(jax, "jit", lambda _, **kwargs: options.append(kwargs["compiler_options"]))
    partitioner.compile_eval(lambda *_: None)
    for fast_compile in (False, True):
        partitioner.compile_step(lambda *_: None, fast_compile=fast_compile)
    # The tests disable most optimizations, so these options do not set an optimization level.
    fast = {"xla_cpu_use_fusion_emitters": False}
    assert options == [fast, None, fast]
    assert fast_compiler_options("tpu") == fast_compiler_options("gpu") == {}
    monkeypatch.setattr(jax.config, "read", lambda name: False)
    assert fast_compiler_options("cpu") == {**fast, "xla_backend_optimization_level": 1}


class Results(NamedTuple):
    """What `run_steps` returns: the last state and metrics, and the sums of a validation pass."""

    state: Any
    metrics: dict
    sums: dict
    late_compilations: list[str]  # by the steps after the first


def run_steps(partitioner, task, optimizer, batch):
    """Runs three training steps and a validation pass."""
    template, state = initial_state(task, optimizer, seed=0)
    step = partitioner.compile_step(make_train_step(task, template, optimizer))
    state, batch = partitioner.put_state(state), partitioner.put_batch(batch)
    state, _ = step(state, batch)
    events = []

    def listener(name, *_, **__):
        events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for _ in range(2):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    sums = partitioner.compile_eval(make_eval_step(task, template))(state, batch)
    late_compilations = [name for name in events if "backend_compile" in name]
    return Results(
        *jax.device_get((partitioner.get_state(state), metrics, sums)), late_compilations
    )


def assert_same_results(actual, expected):
    """Checks that two results of `run_steps` are equal up to rounding."""
    for name, value in expected.metrics.items():
        np.testing.assert_allclose(actual.metrics[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    leaves = dict(jax.tree_util.tree_leaves_with_path(actual.state))
    for path, value in jax.tree_util.tree_leaves_with_path(expected.state):
        np.testing.assert_allclose(leaves[path], value, atol=1e-5, err_msg=str(path))
    np.testing.assert_array_equal(actual.sums["confusion"], expected.sums["confusion"])


@pytest.fixture(scope="module")
def one_device_results(task, optimizer, batch):
    return run_steps(partitioner_of("jit", 1), task, optimizer, batch)


# All results are compared with those of one device under jit.
@pytest.mark.parametrize(
    "backend, num_devices", [("pmap", 1), ("jit", 2), ("pmap", 2), ("jit", 8), ("pmap", 8)]
)
def test_devices_do_not_change_a_step(
    task, optimizer, batch, one_device_results, backend, num_devices
):
    results = run_steps(partitioner_of(backend, num_devices), task, optimizer, batch)
    assert_same_results(results, one_device_results)
    assert not results.late_compilations


@pytest.fixture(scope="module")
def variants_task(task):
    """A task whose model has the parts that `task` lacks."""
    changes = {"fusion_layers": 0, "fusion_gru_layers": 1, "crf": True, "gate_reads_contexts": True}
    return TinyTask(dataclasses.replace(task.config, **changes), LossWeights(gate=1.0))


@pytest.fixture(scope="module")
def one_device_variants_results(variants_task, optimizer, batch):
    return run_steps(partitioner_of("jit", 1), variants_task, optimizer, batch)


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_devices_do_not_change_a_step_of_the_model_variants(
    variants_task, optimizer, batch, one_device_variants_results, backend
):
    results = run_steps(partitioner_of(backend, 8), variants_task, optimizer, batch)
    assert_same_results(results, one_device_variants_results)


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_abstract_states_have_the_shapes_and_shardings_of_placed_states(task, optimizer, backend):
    partitioner = partitioner_of(backend, 8)
    _, state = initial_state(task, optimizer, seed=0)
    abstract = partitioner.abstract_state(jax.eval_shape(lambda: state))
    for leaf, placed in zip(
        jax.tree.leaves(abstract), jax.tree.leaves(partitioner.put_state(state)), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (placed.shape, placed.dtype)
        assert leaf.sharding.is_equivalent_to(placed.sharding, placed.ndim)


def test_rules_shard_parameters_and_their_moments(task, optimizer):
    _, state = initial_state(task, optimizer, seed=0)
    mesh = data_mesh(2)
    placed = shardings(state, mesh, [(r"fusion/projection/kernel$", (None, "model"))])
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
        for path, leaf in jax.tree_util.tree_flatten_with_path(placed)[0]
    }
    sharded = [name for name, spec in specs.items() if spec == PartitionSpec(None, "model")]
    assert len(sharded) == 4  # the kernel, its two Adam moments and its average
    assert all(name.endswith("fusion/projection/kernel") for name in sharded)
    assert all(spec == PartitionSpec() for name, spec in specs.items() if name not in sharded)


def test_sharded_parameters_train_as_replicated_ones(task, optimizer, batch, one_device_results):
    rules = [(r"fusion/projection/kernel$", (None, "model"))]
    partitioner = JitPartitioner(data_mesh(2), rules)
    results = run_steps(partitioner, task, optimizer, batch)
    np.testing.assert_allclose(
        results.metrics["loss"], one_device_results.metrics["loss"], rtol=1e-6
    )
    leaves, expected_leaves = map(jax.tree.leaves, (results.state, one_device_results.state))
    for leaf, expected in zip(leaves, expected_leaves, strict=True):
        np.testing.assert_allclose(leaf, expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "threads"},
        {"model_parallelism": 0},
        {"backend": "pmap", "model_parallelism": 2},
    ],
)
def test_unknown_parallel_options_are_refused(options):
    with pytest.raises(ValueError, match="ParallelConfig"):
        ParallelConfig(**options)


def test_a_mesh_needs_a_divisor_of_the_devices():
    with pytest.raises(ValueError, match="model_parallelism=3 does not divide 8 devices"):
        data_mesh(3)


def test_a_partitioner_needs_a_divisor_of_the_devices_per_process():
    with pytest.raises(InputError, match="model_parallelism=3; allowed: divisors of 8"):
        make_partitioner(ParallelConfig(model_parallelism=3))


@pytest.mark.parity
@pytest.mark.parametrize("model_parallelism", [1, 4])
def test_processes_of_a_tpu_pod_hold_consecutive_rows(model_parallelism, monkeypatch):
    from jax.experimental import topologies

    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    pod = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = data_mesh(model_parallelism, pod)
    processes = np.array([[device.process_index for device in row] for row in mesh.devices])
    np.testing.assert_array_equal(processes.ravel(), np.repeat(np.arange(4), 4))
