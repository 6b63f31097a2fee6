"""One training step on 1, 2 and 8 devices, by jit and by pmap."""

import dataclasses

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
    make_partitioner,
)
from mister_jax.parallel.sharding import data_mesh, shardings
from mister_jax.training.steps import initial_state, make_eval_step, make_train_step
from tests.helpers.training import TinyTask

pytestmark = pytest.mark.devices


@pytest.fixture(scope="module")
def task(tiny_config):
    """Every kind of dropout is on: devices must agree on what is dropped, too."""
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
    """Devices get unequal shares of the utterances; one of eight gets none."""
    return make_batch([5, 1, 3, 0, 2, 5, 4, 1])


@pytest.fixture(scope="module")
def transformation():
    config = OptimizerConfig(name="adamw", learning_rate=1e-2, weight_decay=0.1, average_decay=0.9)
    return make_optimizer(config, 10)


def spreads(count):
    devices = jax.devices()[:count]
    return {"jit": JitPartitioner(data_mesh(devices=devices)), "pmap": PmapPartitioner(devices)}


def run(spread, task, transformation, batch, steps=2):
    """States and metrics after some steps, and the sums of a validation."""
    graph, state = initial_state(task, transformation, seed=0)
    step = spread.compile_step(make_train_step(task, graph, transformation))
    placed, batch = spread.put_state(state), spread.put_batch(batch)
    for _ in range(steps):
        placed, metrics = step(placed, batch)
    sums = spread.compile_eval(make_eval_step(task, graph))(placed, batch)
    return jax.device_get((spread.get_state(placed), metrics, sums))


@pytest.fixture(scope="module")
def alone(task, transformation, batch):
    return run(spreads(1)["jit"], task, transformation, batch)


@pytest.mark.parametrize("backend", ["jit", "pmap"])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_devices_do_not_change_a_step(task, transformation, batch, alone, backend, count):
    assert_same(run(spreads(count)[backend], task, transformation, batch), alone)


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_devices_do_not_change_a_step_of_what_is_not_released(task, transformation, batch, backend):
    more = {"fusion_layers": 0, "fusion_gru_layers": 1, "crf": True, "gate_reads_contexts": True}
    task = TinyTask(dataclasses.replace(task.config, **more), LossWeights(gate=1.0))
    alone, together = (
        run(one, task, transformation, batch) for one in (spreads(1)["jit"], spreads(8)[backend])
    )
    assert_same(together, alone)


def assert_same(found, expected):
    """That states, metrics and sums of `run` are those of another run."""
    (state, metrics, sums), (state_alone, metrics_alone, sums_alone) = found, expected
    for name, value in metrics_alone.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    for path, value in jax.tree_util.tree_flatten_with_path(state_alone)[0]:
        ours = dict(jax.tree_util.tree_flatten_with_path(state)[0])[path]
        np.testing.assert_allclose(ours, value, atol=1e-5, err_msg=str(path))
    np.testing.assert_array_equal(sums["confusion"], sums_alone["confusion"])


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_later_steps_are_not_compiled_anew(task, transformation, batch, backend):
    spread = spreads(2)[backend]
    graph, state = initial_state(task, transformation, seed=0)
    step = spread.compile_step(make_train_step(task, graph, transformation))
    placed, batch = spread.put_state(state), spread.put_batch(batch)
    placed, _ = step(placed, batch)
    compiled = []
    listener = lambda name, *_, **__: compiled.append(name) if "compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for _ in range(2):
            placed, metrics = step(placed, batch)
        jax.block_until_ready(metrics)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not [name for name in compiled if "backend_compile" in name]


def test_rules_shard_parameters_and_their_moments(task, transformation):
    _, state = initial_state(task, transformation, seed=0)
    mesh = data_mesh(2)
    placed = shardings(state, mesh, [(r"fusion/projection/kernel$", (None, "model"))])
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
        for path, leaf in jax.tree_util.tree_flatten_with_path(placed)[0]
    }
    sharded = [name for name, spec in specs.items() if spec == PartitionSpec(None, "model")]
    assert len(sharded) == 4  # the kernel, its two moments and its average
    assert all(name.endswith("fusion/projection/kernel") for name in sharded)
    assert all(spec == PartitionSpec() for name, spec in specs.items() if name not in sharded)


def test_sharded_parameters_train_as_replicated_ones(task, transformation, batch, alone):
    spread = JitPartitioner(data_mesh(2), [(r"fusion/projection/kernel$", (None, "model"))])
    state, metrics, _ = run(spread, task, transformation, batch)
    np.testing.assert_allclose(metrics["loss"], alone[1]["loss"], rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(alone[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "threads"},
        {"model_parallelism": 0},
        {"backend": "pmap", "model_parallelism": 2},
    ],
)
def test_a_way_that_does_not_exist_is_refused(options):
    with pytest.raises(ValueError, match="ParallelConfig"):
        ParallelConfig(**options)


def test_devices_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="model_parallelism=3 does not divide 8 devices"):
        data_mesh(3)


def test_a_copy_of_the_parameters_that_devices_cannot_hold_is_refused():
    with pytest.raises(InputError, match="model_parallelism=3; allowed are divisors of the 8"):
        make_partitioner(ParallelConfig(model_parallelism=3))


@pytest.mark.parity
@pytest.mark.parametrize("model_parallelism", [1, 4])
def test_the_processes_of_a_pod_hold_consecutive_rows(model_parallelism, monkeypatch):
    from jax.experimental import topologies

    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    pod = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = data_mesh(model_parallelism, pod)
    processes = np.array([[device.process_index for device in row] for row in mesh.devices])
    np.testing.assert_array_equal(processes.ravel(), np.repeat(np.arange(4), 4))
