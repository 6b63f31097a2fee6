"""Every config and variant describes a model that can be created."""

import dataclasses
import importlib
import pathlib
import re

import numpy as np
import pytest
from flax import nnx

from mister_jax.configs import fusion
from mister_jax.errors import InputError
from mister_jax.losses import LossWeights
from mister_jax.models import EXPERTS, MisterE, MisterEConfig
from mister_jax.models.utterance import UtteranceConfig
from mister_jax.optim import OptimizerConfig
from mister_jax.parallel.partitioning import ParallelConfig
from mister_jax.tasks.config import dataclass_from_config
from mister_jax.tasks.fusion import FusionTask, LossConfig
from mister_jax.training.progress import TrainConfig

FILES = sorted(
    path.stem
    for path in pathlib.Path(fusion.__file__).parent.glob("*.py")
    if path.stem != "__init__"
)


def check_fusion_config(config):
    """Creates the task of a config and returns the model config."""
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
def test_every_default_config_loads(name):
    config = importlib.import_module(f"mister_jax.configs.{name}").get_config()
    if config.task == "fusion":
        check_fusion_config(config)
    else:  # Creating an encoder task needs the encoder's files; see tests/tasks.
        check_training(config)
        dataclass_from_config(UtteranceConfig, config.head, "head", num_classes=3)


@pytest.mark.parametrize("variant", fusion.VARIANTS)
def test_every_variant_loads_and_changes_something(variant):
    base = "any,paper" if variant in ("no_contrastive", "no_agreement") else "any"
    config = fusion.get_config(f"{base},{variant}")
    check_fusion_config(config)
    assert config.to_json() != fusion.get_config(base).to_json()


def test_the_default_loss_is_the_cross_entropy_of_the_mixture_and_the_experts():
    loss = fusion.get_config("any").loss
    weights = dataclass_from_config(LossWeights, loss.weights, "weights")
    assert weights == LossWeights(contrastive=0, agreement=0) and loss.gamma == 0
    with_all = fusion.get_config("any,focal,contrastive,agreement").loss
    assert with_all.gamma == 1
    assert (with_all.weights.contrastive, with_all.weights.agreement) == (0.2, 0.02)


def test_flags_can_set_every_field_of_the_loss():
    for variants in ("any", "any,paper"):
        loss = fusion.get_config(variants).loss
        assert set(loss) == {field.name for field in dataclasses.fields(LossConfig)}
        assert set(loss.weights) == {field.name for field in dataclasses.fields(LossWeights)}


def test_variants_combine():
    config = fusion.get_config("any,paper,no_contrastive,majority")
    model = check_fusion_config(config)
    assert model.context_dim == 1024 and model.mixture == "majority"
    assert config.loss.weights.contrastive == 0 and config.optimizer.learning_rate == 1e-5


def test_the_documentation_lists_every_variant():
    page = pathlib.Path(__file__).parents[1] / "docs" / "train_and_evaluate.md"
    rows = [line.split("|")[1] for line in page.read_text().splitlines() if line.startswith("| `")]
    listed = set(re.findall(r"\w+", " ".join(rows)))
    assert set(fusion.VARIANTS) <= listed


def test_ablations_are_variants():
    assert set(fusion.ABLATIONS) <= {"default", *fusion.VARIANTS}
    assert {"default", "no_context", *(f"{name}_only" for name in EXPERTS)} <= set(fusion.ABLATIONS)


def test_ablations_leave_out_variants_that_change_nothing():
    def names(variants):
        return fusion.ablation_configs(fusion.get_config(f"any{variants}")).keys()

    losses = {"focal", "contrastive", "agreement"}
    without = {"no_contrastive", "no_agreement"}
    assert names("") == set(fusion.ABLATIONS) - without
    assert names(",paper") == set(fusion.ABLATIONS) - losses
    experts = {"speech_only", "text_only", "fusion_only"}
    assert names(",text_only") == {"default", *experts, "focal", "no_context"} - {"text_only"}
    assert names(",fusion_only") == {"default", *experts, "focal", "contrastive"} - {"fusion_only"}
    assert names(",paper,text_only") == {"default", *experts, "no_context"} - {"text_only"}


def test_without_context_other_utterances_do_not_change_the_logits():
    config = check_fusion_config(fusion.get_config("any,no_context,speech_only"))
    model = MisterE(config, rngs=nnx.Rngs(0))
    speech, text = np.random.default_rng(0).normal(size=(1, 3, 6)), np.zeros((1, 3, 7))
    changed_speech = speech.copy()
    changed_speech[:, 1:] += 1
    mask = np.ones((1, 3), bool)
    logits, changed_logits = (model(x, text, mask).logits for x in (speech, changed_speech))
    np.testing.assert_allclose(logits[:, 0], changed_logits[:, 0], atol=1e-6)
    assert (np.abs(logits - changed_logits)[:, 1:] > 1e-3).any()


def test_the_paper_variant_is_the_released_recipe():
    config = fusion.get_config("any,paper")
    sizes = {"num_classes": 6, "speech_dim": 2048, "text_dim": 2048}
    assert (
        dataclass_from_config(MisterEConfig, config.model, "model", **sizes)
        == MisterEConfig.paper()
    )
    optimizer = dataclass_from_config(OptimizerConfig, config.optimizer, "optimizer")
    assert optimizer == OptimizerConfig()
    weights = dataclass_from_config(LossWeights, config.loss.weights, "weights")
    assert weights == LossWeights() and config.loss.gamma == 3


def test_paper_has_its_own_losses():
    paper = fusion.get_config("any,paper").to_json()
    for variants in ("paper,focal,contrastive,agreement", "focal,contrastive,agreement,paper"):
        assert fusion.get_config(f"any,{variants}").to_json() == paper


def test_an_unknown_variant_is_refused():
    with pytest.raises(InputError, match="unknown variant 'fast'; allowed: paper, focal"):
        fusion.get_config("mosi_features,fast")
