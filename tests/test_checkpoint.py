"""Checkpoints that are damaged, unfinished or from another model, and suspended writes."""

import gc
import itertools
import logging
import shutil
import time

import chex
import numpy as np
import pytest

from mister_jax.checkpoint import BEST, LATEST, Checkpoints
from mister_jax.errors import InputError
from mister_jax.predictor import Predictor
from mister_jax.training.loop import train
from tests.helpers.training import (
    make_tiny_config,
)


@pytest.mark.parametrize("kind", [LATEST, BEST])
def test_a_truncated_checkpoint_is_refused(tiny_data_dir, tmp_path, kind):
    config = make_tiny_config(tiny_data_dir, **{"train.epochs": 1})
    train(config, tmp_path, quiet=True)
    (step,) = (tmp_path / "checkpoints" / kind).iterdir()
    for path in step.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(InputError, match=f"{kind}/{step.name}: the checkpoint is damaged") as error:
        if kind == LATEST:
            train(config, tmp_path, quiet=True)
        else:
            Predictor(tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_a_truncated_file_is_read_correctly_or_refused(tmp_path, caplog):
    kernels = {f"kernel_{index}": np.arange(3000.0) for index in range(40)}
    state = {**kernels, "head": {"bias": np.ones(5, np.float32)}}
    original = tmp_path / "original"
    with Checkpoints(original) as checkpoints:
        checkpoints.save(LATEST, 3, state, {"epoch": 1})
    caplog.clear()
    refused_files = set()
    for path in sorted(original.rglob("*")):
        name = path.relative_to(original)
        if path.is_dir():
            continue
        damaged = tmp_path / "damaged"
        shutil.copytree(original, damaged)
        (damaged / name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        try:
            with Checkpoints(damaged, read_only=True) as checkpoints:
                restored = checkpoints.restore(LATEST, state)
        except InputError as error:
            assert "\n" not in str(error) and "latest/3: the checkpoint is damaged" in str(error)
            refused_files.add(name.parts[-1] if "d" not in name.parts else "d")
        else:
            chex.assert_trees_all_equal(restored, (state, {"epoch": 1}))
        shutil.rmtree(damaged)
    gc.collect()  # Unfinished reads that Python deletes must not print messages either.
    assert refused_files == {"_METADATA", "manifest.ocdbt", "d", "metadata"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_next_training_deletes_an_unfinished_checkpoint(tmp_path):
    state = {"kernel": np.arange(3.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, 3, state, {})
    unfinished = tmp_path / "checkpoints" / LATEST / "4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored, _ = checkpoints.restore(LATEST, state)
    np.testing.assert_array_equal(restored["kernel"], state["kernel"])
    assert unfinished.exists(), "a simultaneous training run may be writing it"
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(LATEST, state)
    assert [path.name for path in unfinished.parent.iterdir()] == ["3"]


def test_a_checkpoint_of_other_shapes_is_refused(finished_workdir):
    checkpoints = Checkpoints(finished_workdir, read_only=True)
    with checkpoints, pytest.raises(InputError, match="another model"):
        checkpoints.restore(BEST, {"wrong": np.zeros(3)})


def test_a_process_may_be_suspended_while_it_saves(tmp_path, monkeypatch):
    now, num_calls = time.time, itertools.count()
    # Each call of `time` returns half an hour more, as if the process were suspended in between.
    monkeypatch.setattr(time, "time", lambda: now() + 1800 * next(num_calls))
    state = {"kernel": np.arange(3.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, 3, state, {"epoch": 1})
    assert 10 < next(num_calls) < 300  # The pauses take more than five hours, but less than a week.
    monkeypatch.undo()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(LATEST, state), (state, {"epoch": 1}))
