"""Training runs on tiny data, and readers of the files in their work directories."""

import dataclasses
import json

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from mister_jax import MisterE, MisterEConfig, data, multi_seed
from mister_jax.checkpoint import BEST, LATEST, Checkpoints
from mister_jax.configs import fusion
from mister_jax.losses import LossWeights
from mister_jax.metrics import confusion_counts
from mister_jax.optim import OptimizerConfig, make_optimizer
from mister_jax.parallel.partitioning import JitPartitioner
from mister_jax.parallel.sharding import data_mesh
from mister_jax.tasks.fusion import FusionTask, LossConfig, apply_to_batch, mister_e_loss
from mister_jax.training.steps import initial_state, make_train_step
from mister_jax.workdir import write_description

# Sizes of a small model without GRU and co-attention layers, which take longest to compile. Tests
# in which these layers matter add `ALL_LAYERS`.
SMALL_MODEL = {
    "context_dim": 8,
    "fusion_dim": 8,
    "attention_dim": 6,
    "kernel_sizes": (1, 3),
    "gru_layers": 0,
    "fusion_layers": 0,
}
ALL_LAYERS = {"gru_layers": 1, "fusion_layers": 1}


def write_tiny_dataset(data_dir, num_dialogues):
    """Writes the dataset `tiny`: a few short synthetic dialogues."""
    splits = data.generate_features(
        seed=1, num_dialogues=num_dialogues, num_classes=3, speech_dim=6, text_dim=7
    )
    data.write_features(splits, "tiny", data_dir)


def make_tiny_config(data_dir, argument="tiny,focal,contrastive,agreement", **changes):
    """Returns a config for two quick epochs, by default with all losses of the released code."""
    config = fusion.get_config(argument)
    config.data.data_dir = str(data_dir)
    config.data.num_buckets = 1
    config.data.batch_size = 4
    config.model.update(SMALL_MODEL)
    config.train.update({"epochs": 2, "log_every": 1})
    config.update_from_flattened_dict(changes)
    return config


def write_untrained_workdir(workdir, data_dir, dataset, num_seeds=1, **changes):
    """Writes a work directory of MiSTER-E whose best parameters are the initial parameters.

    `changes` are fields of the model's config.
    """
    config = fusion.get_config(dataset)
    config.num_seeds = num_seeds
    config.data.data_dir = str(data_dir)
    config.model.update({**SMALL_MODEL, **changes})
    task = FusionTask.from_data(config)
    per_seed = [
        initial_state(task, optax.sgd(0.1), seed=3 + number)[1]["params"]
        for number in range(num_seeds)
    ]
    write_description(workdir, config, task.description(), per_seed[0], {})
    with Checkpoints(workdir) as checkpoints:
        params = multi_seed.stack_seeds(per_seed)
        checkpoints.save(BEST, 1, params, {"epoch": 1, "weighted_f1": 0.5})
    return workdir


def read_metric_records(workdir):
    """Returns the lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_validation_scores(workdir):
    """Returns the validation weighted F1 of each epoch."""
    records = read_metric_records(workdir)
    name = "validation/weighted_f1"
    return [record[name] for record in records if name in record]


def read_latest_checkpoint(workdir):
    """Returns every array of the latest checkpoint by path, and its progress."""
    return read_checkpoint(workdir, LATEST)


def read_checkpoint(workdir, kind):
    """Returns every array of the newest checkpoint of a kind by path, and its progress."""
    step = max((workdir / "checkpoints" / kind).iterdir(), key=lambda path: int(path.name))
    state = ocp.StandardCheckpointer().restore((step / "state").absolute())
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}
    return arrays, json.loads((step / "progress" / "metadata").read_text())


def assert_same_checkpoints(workdir, expected_workdir):
    """Checks that the latest and the best checkpoints of two runs are equal bit for bit."""
    for kind in (LATEST, BEST):
        assert len(list((workdir / "checkpoints" / kind).iterdir())) == 1
        assert_same_bits(read_checkpoint(workdir, kind), read_checkpoint(expected_workdir, kind))


def assert_same_bits(checkpoint, expected):
    """Checks that two results of `read_checkpoint` are equal bit for bit."""
    assert checkpoint[1] == expected[1]
    assert checkpoint[0].keys() == expected[0].keys()
    for name, value in checkpoint[0].items():
        np.testing.assert_array_equal(value, expected[0][name], err_msg=name)


@dataclasses.dataclass
class TinyTask:
    """Task of MiSTER-E with a model config, but without an experiment config or a dataset."""

    config: MisterEConfig
    weights: LossWeights = dataclasses.field(default_factory=LossWeights)

    def init(self, key):
        return MisterE(self.config, rngs=nnx.Rngs(key))

    def loss(self, model, batch, key, axis_name):
        return mister_e_loss(model, batch, key, axis_name, LossConfig(weights=self.weights))

    def eval_sums(self, model, batch):
        predicted = apply_to_batch(model, batch).logits.argmax(-1)
        num_classes = self.config.num_classes
        counts = confusion_counts(batch["label"], predicted, batch["mask"], num_classes)
        return {"confusion": counts}


def one_device_partitioner():
    return JitPartitioner(data_mesh(devices=jax.devices()[:1]))


def initial_encoder_state(task, optimizer, partitioner):
    """Returns the template and the initial state of a task that loads a pretrained encoder."""
    return initial_state(
        task,
        optimizer,
        seed=0,
        trainable=task.trainable,
        make_model=lambda key: task.load(key, partitioner),
    )


def take_two_steps(partitioner, task, batch, accumulation=1):
    """Returns the trained parameters and the metrics of an encoder task after two steps.

    Checks that the frozen parameters do not change, and that a partitioner with sharding rules
    stores a different part of a kernel on each device.
    """
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-4), 10)
    template, state = initial_encoder_state(task, optimizer, partitioner)
    initial_frozen = jax.device_get(state["frozen"])
    step = partitioner.compile_step(make_train_step(task, template, optimizer, accumulation))
    placed_state, placed_batch = partitioner.put_state(state), partitioner.put_batch(batch)
    if getattr(partitioner, "rules", ()):
        _assert_kernel_is_sharded(placed_state["frozen"], partitioner.mesh)
    with jax.default_matmul_precision("highest"):
        for _ in range(2):
            placed_state, metrics = step(placed_state, placed_batch)
    final_state = jax.device_get(partitioner.get_state(placed_state))
    jax.tree.map(np.testing.assert_array_equal, final_state["frozen"], initial_frozen)
    return final_state["params"], jax.device_get(metrics)


def _assert_kernel_is_sharded(params, mesh):
    (kernel,) = (
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if jax.tree_util.keystr(path).endswith("['attention']['query']['kernel']")
        and "tower" not in jax.tree_util.keystr(path)
    )
    shard_sizes = {str(shard.index): shard.data.size for shard in kernel.addressable_shards}
    assert len(shard_sizes) == mesh.size
    assert set(shard_sizes.values()) == {kernel.size // mesh.size}


def assert_same_steps(actual, expected):
    """Checks that two results of `take_two_steps` are equal up to rounding."""
    params, metrics = actual
    expected_params, expected_metrics = expected
    assert metrics["loss"] == pytest.approx(expected_metrics["loss"], abs=1e-6)
    for (path, value), expected_value in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected_params), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(value, expected_value, atol=1e-5, err_msg=name)
