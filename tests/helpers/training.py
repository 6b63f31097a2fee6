"""Trainings on tiny data, and what they leave in their work directories."""

import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from mister_jax.configs import fusion

from mister_jax import MisterE, MisterEConfig, data
from mister_jax.checkpoint import LATEST
from mister_jax.losses import LossWeights
from mister_jax.metrics import confusion_counts
from mister_jax.tasks.fusion import LossConfig, apply_to_batch, mister_e_loss


def write_tiny_dataset(data_dir, num_dialogues):
    """Writes the dataset `tiny`: a few short synthetic dialogues."""
    splits = data.generate(
        seed=1, num_dialogues=num_dialogues, num_classes=3, speech_dim=6, text_dim=7
    )
    data.write(splits, "tiny", data_dir)


def make_tiny_config(data_dir, argument="tiny", **changes):
    """Returns the config of a training of two epochs that takes a second."""
    config = fusion.get_config(argument)
    config.data.data_dir = str(data_dir)
    config.data.num_buckets = 1
    config.data.batch_size = 4
    config.model.kernel_sizes = (1, 3)
    config.model.update({"context_dim": 8, "fusion_dim": 8, "fusion_layers": 1, "attention_dim": 6})
    config.train.update({"epochs": 2, "log_every": 1})
    config.update_from_flattened_dict(changes)
    return config


def read_metric_records(workdir):
    """Returns the lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_latest_checkpoint(workdir):
    """Returns every array of the latest checkpoint by path, and its progress."""
    (step,) = (workdir / "checkpoints" / LATEST).iterdir()
    state = ocp.StandardCheckpointer().restore((step / "state").absolute())
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}
    return arrays, json.loads((step / "progress" / "metadata").read_text())


def assert_same_checkpoint(workdir, expected_workdir):
    """Checks that two latest checkpoints are equal bit for bit."""
    assert_same_bits(read_latest_checkpoint(workdir), read_latest_checkpoint(expected_workdir))


def assert_same_bits(checkpoint, expected):
    """Checks that two results of `read_latest_checkpoint` are equal bit for bit."""
    assert checkpoint[1] == expected[1]
    assert checkpoint[0].keys() == expected[0].keys()
    for name, value in checkpoint[0].items():
        np.testing.assert_array_equal(value, expected[0][name], err_msg=name)


@dataclasses.dataclass
class TinyTask:
    """MiSTER-E without a config or a dataset."""

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
