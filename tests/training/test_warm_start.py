"""Training runs that start from the parameters of another run."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest

from mister_jax import data
from mister_jax.errors import InputError
from mister_jax.inference.export import export_model
from mister_jax.predictor import Predictor
from mister_jax.tasks.config import config_seeds
from mister_jax.training.loop import train
from tests.helpers.training import make_tiny_config


def leaves(params):
    return {jax.tree_util.keystr(path): value for path, value in jax.tree.leaves_with_path(params)}


def train_without_learning(config, workdir):
    """Trains with a learning rate so small that the parameters stay at their initial values."""
    config.optimizer.learning_rate = 1e-30
    config.train.epochs = 1
    train(config, workdir)
    return [leaves(params["trained"]) for params in Predictor(workdir).params]


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_training_starts_from_the_best_parameters(
    tiny_data_dir, finished_workdir, tmp_path, num_seeds, capsys
):
    config = make_tiny_config(tiny_data_dir, num_seeds=num_seeds)
    config.train.init_from = str(finished_workdir)
    (expected,) = [leaves(params["trained"]) for params in Predictor(finished_workdir).params]
    per_seed = train_without_learning(config, tmp_path / "run")
    assert len(per_seed) == len(config_seeds(config))
    for params in per_seed:
        assert params.keys() == expected.keys()
        for name, value in params.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-6)
    assert f"starting from {finished_workdir}: " in capsys.readouterr().out


@pytest.mark.parametrize("num_classes", [3, 4])
def test_other_classes_get_a_new_classifier_and_keep_the_context_network(
    finished_workdir, tmp_path, capsys, num_classes
):
    features = Predictor(finished_workdir).task.model
    splits = data.generate_features(
        0,
        {"train": 4, "validation": 2, "test": 2},
        num_classes=num_classes,
        speech_dim=features.speech_dim,
        text_dim=features.text_dim,
    )
    names = tuple(f"class {number}" for number in range(num_classes))
    splits = {name: dataclasses.replace(split, class_names=names) for name, split in splits.items()}
    data.write_features(splits, "other", tmp_path / "data")
    config = make_tiny_config(tmp_path / "data", "other")
    config.train.init_from = str(finished_workdir)
    (params,) = train_without_learning(config, tmp_path / "run")
    (expected,) = [leaves(params["trained"]) for params in Predictor(finished_workdir).params]
    depending = re.compile("classifier|gate.*mlp_in.*kernel|crf")
    new = {name for name in params if depending.search(name)}
    assert 0 < len(new) < len(params) / 2
    assert features.num_classes == 3
    for name in params.keys() - new:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-6)
    note = next(line for line in capsys.readouterr().out.splitlines() if "starting from" in line)
    assert len(note.partition("; new: ")[2].split(", ")) == len(new)


def test_a_resumed_run_does_not_need_the_first_model(tiny_data_dir, finished_workdir, tmp_path):
    source = shutil.copytree(finished_workdir, tmp_path / "source")
    config = make_tiny_config(tiny_data_dir, **{"train.init_from": str(source)})
    train(config, tmp_path / "run", quiet=True)
    shutil.rmtree(source)
    config.train.epochs = 3
    assert train(config, tmp_path / "run", quiet=True).epoch == 3


def test_a_moved_project_resumes(tiny_data_dir, finished_workdir, tmp_path):
    project = tmp_path / "project"
    source = shutil.copytree(finished_workdir, project / "first")
    config = make_tiny_config(tiny_data_dir, **{"train.init_from": str(source)})
    config.train.epochs = 1
    train(config, project / "second", quiet=True)
    moved = shutil.move(project, tmp_path / "moved")
    config.train.init_from = str(moved / "first")
    assert train(config, moved / "second", quiet=True).finished


def test_a_bundle_is_a_start_too(tiny_data_dir, finished_workdir, tmp_path):
    export_model(finished_workdir, tmp_path / "bundle")
    config = make_tiny_config(tiny_data_dir, **{"train.init_from": str(tmp_path / "bundle")})
    (params,) = train_without_learning(config, tmp_path / "run")
    (expected,) = [leaves(params["trained"]) for params in Predictor(finished_workdir).params]
    for name, value in params.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)


def test_models_that_do_not_match_are_refused(tiny_data_dir, finished_workdir, tmp_path):
    config = make_tiny_config(tiny_data_dir, **{"train.init_from": str(tmp_path / "nothing")})
    with pytest.raises(InputError, match="nothing"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    config = make_tiny_config(tiny_data_dir, num_seeds=2)
    train(config, tmp_path / "two", quiet=True)
    config = make_tiny_config(tiny_data_dir, **{"train.init_from": str(tmp_path / "two")})
    with pytest.raises(InputError, match="with 2 seeds; needed: 1 or "):
        train(config, tmp_path / "run", quiet=True)
