"""Every config loads and makes a model."""

import importlib
import pathlib

import pytest

from configs import fusion
from mister_jax.errors import InputError
from mister_jax.models import MisterEConfig
from mister_jax.optim import OptimizerConfig
from mister_jax.parallel import ParallelConfig
from mister_jax.tasks import FusionTask, from_config
from mister_jax.train import TrainConfig

FILES = sorted(
    path.stem
    for path in pathlib.Path(fusion.__file__).parent.glob("*.py")
    if path.stem != "__init__"
)


def check(config):
    sizes = {"num_classes": 3, "speech_dim": 6, "text_dim": 7}
    model = from_config(MisterEConfig, config.model, "model", **sizes)
    FusionTask(config, ("a", "b", "c"), model)
    from_config(OptimizerConfig, config.optimizer, "optimizer")
    from_config(ParallelConfig, config.parallel, "parallel")
    from_config(TrainConfig, config.train, "train")
    return model


@pytest.mark.parametrize("name", FILES)
def test_default_of_every_file_loads(name):
    check(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize("variant", fusion.VARIANTS)
def test_every_variant_loads_and_changes_something(variant):
    config = fusion.get_config(f"any,{variant}")
    check(config)
    assert config.to_json() != fusion.get_config("any").to_json()


def test_variants_combine():
    config = fusion.get_config("any,paper,no_contrastive,majority")
    model = check(config)
    assert model.context_width == 1024 and model.mixture == "majority"
    assert config.loss.weights.contrastive == 0 and config.optimizer.learning_rate == 1e-5


def test_paper_is_the_released_recipe():
    config = fusion.get_config("any,paper")
    sizes = {"num_classes": 6, "speech_dim": 2048, "text_dim": 2048}
    assert from_config(MisterEConfig, config.model, "model", **sizes) == MisterEConfig.paper()
    made = from_config(OptimizerConfig, config.optimizer, "optimizer")
    assert made == OptimizerConfig()


def test_an_unknown_variant_is_named_with_the_allowed():
    with pytest.raises(
        InputError, match="unknown variant 'fast'; allowed are paper, no_contrastive"
    ):
        fusion.get_config("mosi_features,fast")
