"""Text encoders, tuned as a user tunes them: LoRA, int8, whole, stopped, spread over devices."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from flax import nnx

import mister_jax.train as train_module
from configs import text_encoder
from mister_jax.convert.safetensors import Checkpoint, save
from mister_jax.encoders import hub
from mister_jax.errors import InputError
from mister_jax.evaluate import Predictor, evaluate, missing_modality_study
from mister_jax.nn.lora import QuantizedParam
from mister_jax.optim import OptimizerConfig, optimizer
from mister_jax.parallel import JitSpread, PmapSpread, Program, data_mesh
from mister_jax.steps import initial_state, train_step
from mister_jax.tasks import TextEncoderTask
from mister_jax.train import train
from tests.test_train import assert_same_bits, latest, records


def tiny(folder, data_dir, kind="llama_3_2_1b", **changes):
    """A quick experiment; a decoder is tuned by LoRA, BERT ("minilm_l6") whole."""
    config = text_encoder.get_config(f"manifest/spoken,{kind}")
    config.data.update({"data_dir": str(data_dir), "num_buckets": 1, "batch_size": 16})
    config.encoder.options.update(
        {"name": str(folder), "max_tokens": 12, "dtype": "float32", "param_dtype": "float32"}
    )
    config.encoder.options.remat = "none"
    config.head.update({"feature_dim": 12, "dropout": 0.2})
    config.optimizer.update({"learning_rate": 1e-2, "warmup_fraction": 0.0})
    config.train.update({"epochs": 5, "log_every": 2})
    config.update_from_flattened_dict(changes)
    return config


def weights(tree):
    """Arrays by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


@pytest.fixture(scope="session")
def tuned(llama_folder, spoken_dir, tmp_path_factory):
    """The work directory of a Llama tuned by LoRA."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    assert train(tiny(llama_folder, spoken_dir), workdir, quiet=True).finished
    return workdir


def scores(workdir):
    return [row["validation/weighted_f1"] for row in records(workdir) if "epoch" not in row
            and "validation/weighted_f1" in row]  # fmt: skip


def test_low_rank_paths_and_head_learn(tuned):
    found = scores(tuned)
    assert max(found) > max(0.9, found[0])


def test_a_checkpoint_holds_what_was_trained_alone(tuned):
    arrays, _ = latest(tuned)
    trained = {name for name in arrays if name.startswith("['params']")}
    assert any("lora_a" in name for name in trained)
    assert all("lora_" in name or "['head']" in name for name in trained)
    assert not any("frozen" in name or "embedding" in name for name in arrays)
    assert "lora_b" in (tuned / "parameters.txt").read_text()
    assert "embedding" not in (tuned / "parameters.txt").read_text()


def test_stopped_and_started_again_it_ends_with_the_same_bits(
    llama_folder, spoken_dir, tuned, tmp_path, monkeypatch
):
    original = train_module._Loop._record

    def record(loop, unread, done, writer):
        if done == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        original(loop, unread, done, writer)

    config = tiny(llama_folder, spoken_dir)
    monkeypatch.setattr(train_module._Loop, "_record", record)
    progress = train(config, tmp_path, quiet=True)
    assert not progress.finished and progress.epoch == 1
    monkeypatch.undo()
    assert train(config, tmp_path, quiet=True).finished
    assert_same_bits(latest(tmp_path), latest(tuned))
    assert records(tmp_path) == records(tuned)
