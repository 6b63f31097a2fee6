"""Trains MiSTER-E on dialogue features (stage 2).

    mister-jax train --config=fusion:DATASET[,VARIANT...] --workdir=DIR

DATASET is a dataset of dialogue features from `mister-jax extract` or `prepare`. VARIANT is a key
of `VARIANTS`. All datasets use the same recipe, which was chosen by cross-validation on training
and validation dialogues.

Hardware: two CPU cores. With the variant `paper`, the 100 epochs take 19 minutes on `mosi_features`
and 27 minutes on `meld_dev_features`, with other programs running.

Result: test weighted F1 of the epoch that is best on validation, mean +- standard deviation of five
seeds:

                      meld_dev_features   mosi_features     mspimprov_features
    default             0.633 +- 0.014    0.775 +- 0.007      0.552 +- 0.020
    paper               0.570 +- 0.005    0.759 +- 0.014      0.536, seed 0
    with lecun          0.591             0.770

"with lecun" is `paper` with `model.initialization=lecun`, for seed 0 only.

Ablations: weighted F1 of the default, and differences from the default with 95% intervals, in a
cross-validation on training and validation dialogues with one seed (see docs/benchmarks.md for the
command):

                       meld_dev_features          mspimprov_features
    default            0.615                      0.641
    focal              +0.003 (-0.011 to 0.017)    0.000 (-0.008 to 0.008)
    contrastive        -0.002 (-0.013 to 0.008)   -0.001 (-0.008 to 0.007)
    agreement          +0.001 (-0.008 to 0.010)   +0.002 (-0.005 to 0.010)
    no_context         +0.002 (-0.010 to 0.016)   -0.014 (-0.026 to -0.003)
    mean_of_experts    -0.003 (-0.015 to 0.009)   -0.002 (-0.011 to 0.007)
    majority           -0.001 (-0.012 to 0.012)   -0.001 (-0.010 to 0.009)
    fusion_only        -0.008 (-0.023 to 0.004)   -0.006 (-0.015 to 0.004)
    text_only          -0.011 (-0.038 to 0.015)   -0.068 (-0.085 to -0.051)
    speech_only        -0.194 (-0.237 to -0.149)  -0.092 (-0.112 to -0.072)

The context network and both modalities help on `mspimprov_features`. The losses of the paper bring
no gain, so the default does not use them.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

from mister_jax.errors import InputError
from mister_jax.losses import LossWeights
from mister_jax.models import MisterEConfig
from mister_jax.optim import OptimizerConfig
from mister_jax.tasks.config import config_from_dataclass

_SET_BY_DATASET = ("num_classes", "speech_dim", "text_dim")


def _released(config: ConfigDict) -> None:
    """Sets the recipe and the model sizes of the released code."""
    config.model = config_from_dataclass(MisterEConfig, without=_SET_BY_DATASET)
    config.optimizer = config_from_dataclass(OptimizerConfig)
    config.train.epochs = 100
    config.data.batch_size = 8
    config.data.standardize = "none"
    config.loss.gamma = 3.0
    config.loss.weights = config_from_dataclass(LossWeights)


def _only(expert: str):
    def change(config: ConfigDict) -> None:
        config.model.experts = (expert,)

    return change


def _mixture(name: str):
    def change(config: ConfigDict) -> None:
        config.model.mixture = name

    return change


def _with(name: str, weight: float):
    """Adds a loss, unless the config already has it."""

    def change(config: ConfigDict) -> None:
        config.loss.weights[name] = config.loss.weights[name] or weight

    return change


def _without(name: str):
    """Removes a loss."""

    def change(config: ConfigDict) -> None:
        config.loss.weights[name] = 0.0

    return change


def _focal(config: ConfigDict) -> None:
    """Replaces the cross-entropies with focal losses, unless the losses are already focal."""
    config.loss.gamma = config.loss.gamma or 1.0


def _score(config: ConfigDict) -> None:
    """Predicts sentiment scores in addition to classes; the scores' error selects the epoch."""
    config.model.predict_score = True
    config.loss.weights.score = 1.0
    config.train.select_by = "mae"


def _no_context(config: ConfigDict) -> None:
    """Makes the speech and text experts linear classifiers of single utterances."""
    config.model.kernel_sizes = ()
    config.model.gru_layers = 0


VARIANTS = {
    "paper": _released,
    "focal": _focal,
    "contrastive": _with("contrastive", 0.2),
    "agreement": _with("agreement", 0.02),
    "no_contrastive": _without("contrastive"),
    "no_agreement": _without("agreement"),
    "speech_only": _only("speech"),
    "text_only": _only("text"),
    "fusion_only": _only("fusion"),
    "mean_of_experts": _mixture("mean"),
    "majority": _mixture("majority"),
    "no_context": _no_context,
    "score": _score,
}

ABLATIONS = {
    "default": "unchanged config",
    "speech_only": "speech expert only",
    "text_only": "text expert only",
    "fusion_only": "cross-modal expert only",
    "focal": "focal loss instead of cross-entropy",
    "contrastive": "with the contrastive loss",
    "agreement": "with the agreement loss",
    "no_contrastive": "no contrastive loss",
    "no_agreement": "no agreement loss",
    "mean_of_experts": "mean of the experts instead of the gate",
    "majority": "majority vote of the experts instead of the gate",
    "no_context": "no context network",
}
"""Maps each variant that `mister-jax ablate` compares to a description."""


def ablation_configs(config: ConfigDict) -> dict[str, ConfigDict]:
    """Returns the config as "default", and all variants of `ABLATIONS` that change the training.

    For example, `no_contrastive` changes the training of `paper` but not of the default, and
    `majority` does not change the training of a single expert.
    """
    configs = {"default": config}
    for name in ABLATIONS:
        if name == "default":
            continue
        changed = ConfigDict(config.to_dict())
        VARIANTS[name](changed)
        if _used_fields(changed) != _used_fields(config):
            configs[name] = changed
    return configs


def _used_fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the config with fixed values for settings that have no effect on the training."""
    used = ConfigDict(config.to_dict())
    experts = set(config.model.experts)
    if len(experts) == 1:
        used.model.mixture = "gate"
        used.loss.weights.agreement = 0.0
    if "fusion" not in experts:
        used.loss.weights.contrastive = 0.0
    if experts == {"fusion"}:
        _no_context(used)
    return used.to_dict()


def get_config(argument: str = "synthetic_features") -> ConfigDict:
    """Returns the config for "DATASET[,VARIANT...]"; variants are applied in order."""
    dataset, *variants = argument.split(",")
    config = ConfigDict()
    config.task = "fusion"
    config.seed = 0
    config.num_seeds = 1
    config.data = ConfigDict(
        {
            "name": dataset,
            "data_dir": "",
            "batch_size": 8,
            # Maximum number of padded lengths, each of which needs a compiled program. None: a
            # padded length is added only if it saves more time than compiling its program takes.
            "num_buckets": config_dict.placeholder(int),
            # "auto" standardizes the modalities whose dimensions have very different scales. Also
            # allowed: "none", "speech", "text", "speech,text".
            "standardize": "auto",
            # "shuffle" draws each dialogue once per epoch. "balanced" draws dialogues with rare
            # classes more often.
            "sampling": "shuffle",
            # Replaces the dataset's splits with a fold of a cross-validation: "session", "speaker",
            # "dialogue:5", or another column of the utterances' metadata; see `data.folds`.
            "folds": "",
            "fold": 0,
            "fold_seed": 0,
            # Splits whose dialogues are divided into folds, such as "train,validation"; all splits
            # if empty.
            "fold_splits": "",
            # Whether to also train on the validation split; requires `train.select_by` "last".
            "validate_on_train": False,
            # Seed of the batch order; None: config.seed.
            "seed": config_dict.placeholder(int),
        }
    )
    config.model = config_from_dataclass(
        MisterEConfig,
        without=_SET_BY_DATASET,
        context_dim=128,
        kernel_sizes=(1,),
        gru_layers=1,
        fusion_dim=128,
        fusion_layers=1,
        attention_dim=96,
        input_dropout=0.5,
        context_dropout=0.3,
        fusion_dropout=0.3,
        classifier_dropout=0.3,
        modality_dropout=0.15,
        initialization="lecun",
    )
    config.loss = ConfigDict(
        {
            # Also allowed: "ratings", the raters' distribution over the classes, for datasets with
            # ratings.
            "target": "label",
            # Focusing parameter of the focal loss; 0 is the cross-entropy.
            "gamma": 0.0,
            "temperature": 1.0,
            "sharpness": 1.0,
            # Also allowed: "balanced", "effective_number", or one number per class: "1,2,0.5".
            "class_weights": "none",
            "logit_adjustment": 0.0,
            "weights": config_from_dataclass(LossWeights, contrastive=0.0, agreement=0.0),
        }
    )
    config.optimizer = config_from_dataclass(
        OptimizerConfig,
        name="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_fraction=0.05,
        weight_decay=0.01,
        average_decay=0.98,
    )
    config.train = ConfigDict(
        {
            "epochs": 30,
            "patience": 0,
            # Validation score that chooses the epoch: a score of `metrics.SCORE_NAMES`, "loss", or
            # "mae" of a model that predicts scores. "last" chooses the last epoch.
            "select_by": "weighted_f1",
            # Model from whose parameters training starts; see `TrainConfig.init_from`.
            "init_from": "",
            "log_every": 10,
            "save_every": 0,
            "min_save_seconds": 10.0,
        }
    )
    config.parallel = ConfigDict({"backend": "jit", "model_parallelism": 1})
    for variant in variants:
        if variant not in VARIANTS:
            raise InputError(
                f"configs/fusion.py: unknown variant {variant!r}; allowed: {', '.join(VARIANTS)}"
            )
        VARIANTS[variant](config)
    return config
