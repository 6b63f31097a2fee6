"""Every config loads and makes a model."""

import importlib
import pathlib

import numpy as np
import pytest
from flax import nnx
from mister_jax.configs import fusion

from mister_jax.errors import InputError
from mister_jax.models import EXPERTS, MisterE, MisterEConfig
from mister_jax.models.utterance import UtteranceConfig
from mister_jax.optim import OptimizerConfig
from mister_jax.parallel.partitioning import ParallelConfig
from mister_jax.tasks.config import dataclass_from_config
from mister_jax.tasks.fusion import FusionTask
from mister_jax.training.loop import TrainConfig

FILES = sorted(
    path.stem
    for path in pathlib.Path(fusion.__file__).parent.glob("*.py")
    if path.stem != "__init__"
)


def check(config):
    sizes = {"num_classes": 3, "speech_dim": 6, "text_dim": 7}
    model = dataclass_from_config(MisterEConfig, config.model, "model", **sizes)
    FusionTask(config, ("a", "b", "c"), model)
    check_training(config)
    return model


def check_training(config):
    dataclass_from_config(OptimizerConfig, config.optimizer, "optimizer")
    dataclass_from_config(ParallelConfig, config.parallel, "parallel")
    dataclass_from_config(TrainConfig, config.train, "train")


@pytest.mark.parametrize("name", FILES)
def test_default_of_every_file_loads(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    if config.task == "fusion":
        check(config)
    else:  # What its task needs more, tests of the task try.
        check_training(config)
        dataclass_from_config(UtteranceConfig, config.head, "head", num_classes=3)


@pytest.mark.parametrize("variant", fusion.VARIANTS)
def test_every_variant_loads_and_changes_something(variant):
    config = fusion.get_config(f"any,{variant}")
    check(config)
    assert config.to_json() != fusion.get_config("any").to_json()


def test_variants_combine():
    config = fusion.get_config("any,paper,no_contrastive,majority")
    model = check(config)
    assert model.context_dim == 1024 and model.mixture == "majority"
    assert config.loss.weights.contrastive == 0 and config.optimizer.learning_rate == 1e-5


def test_the_study_names_what_there_is():
    assert set(fusion.ABLATIONS) <= {"default", *fusion.VARIANTS}
    assert {"default", "no_context", *(f"{name}_only" for name in EXPERTS)} <= set(fusion.ABLATIONS)


def test_without_context_an_expert_reads_each_utterance_by_itself():
    model = MisterE(check(fusion.get_config("any,no_context,speech_only")), rngs=nnx.Rngs(0))
    speech, text = np.random.default_rng(0).normal(size=(1, 3, 6)), np.zeros((1, 3, 7))
    other = speech.copy()
    other[:, 1:] += 1
    mask = np.ones((1, 3), bool)
    ours, theirs = model(speech, text, mask).logits, model(other, text, mask).logits
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], atol=1e-6)
    assert (np.abs(ours - theirs)[:, 1:] > 1e-3).any()


def test_paper_is_the_released_recipe():
    config = fusion.get_config("any,paper")
    sizes = {"num_classes": 6, "speech_dim": 2048, "text_dim": 2048}
    assert (
        dataclass_from_config(MisterEConfig, config.model, "model", **sizes)
        == MisterEConfig.paper()
    )
    made = dataclass_from_config(OptimizerConfig, config.optimizer, "optimizer")
    assert made == OptimizerConfig()


def test_an_unknown_variant_is_named_with_the_allowed():
    with pytest.raises(
        InputError, match="unknown variant 'fast'; allowed are paper, no_contrastive"
    ):
        fusion.get_config("mosi_features,fast")
