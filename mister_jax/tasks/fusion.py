"""MiSTER-E training on dialogues of speech and text vectors."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mister_jax import imbalance, losses
from mister_jax.config_checks import check_at_least, check_choice, invalid_field
from mister_jax.data import BatchPlan, DialogueFeatures, batches, load_features
from mister_jax.data.batching import DEFAULT_NUM_BUCKETS, bucket_cost
from mister_jax.data.folds import load_fold, load_pooled, split_list
from mister_jax.data.padding import pad_dialogues
from mister_jax.data.schema import MODALITIES
from mister_jax.data.standardizer import AUTO, Standardizer, choose_standardizers
from mister_jax.errors import InputError
from mister_jax.models import MisterE, MisterEConfig, MisterEOutput, MisterEState
from mister_jax.nn import PerExampleRngs
from mister_jax.nn.rngs import make_rngs
from mister_jax.parallel.partitioning import Partitioner, first_row_index
from mister_jax.parallel.sharding import ShardingRules
from mister_jax.tasks.base import Batch, Split, Task, classification_sums
from mister_jax.tasks.config import dataclass_from_config

_LABEL, _RATINGS = "label", "ratings"


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Hyperparameters of MiSTER-E's loss; see `losses.mister_e`.

    Attributes:
      target: Target of the classification losses: "label", or "ratings" for the raters'
        distribution.
      gamma: Focusing parameter of the focal losses, 0 or more; 0 gives cross-entropies.
      temperature: Temperature of the contrastive loss, positive.
      sharpness: Sharpness of the gate loss, 0 or more.
      class_weights: Class weighting method or weights for the classification losses; see
        `imbalance.class_weights`.
      logit_adjustment: Strength of the logit adjustment, 0 or more; see
        `imbalance.logit_adjustment`.
      weights: Weights of the individual losses.
    """

    target: str = "label"
    gamma: float = 3.0
    temperature: float = 1.0
    sharpness: float = 1.0
    class_weights: str = "none"
    logit_adjustment: float = 0.0
    weights: losses.LossWeights = dataclasses.field(default_factory=losses.LossWeights)

    def __post_init__(self):
        check_choice(self, "target", (_LABEL, _RATINGS))
        check_at_least(self, 0, "gamma", "sharpness", "logit_adjustment")
        if not self.temperature > 0:  # also rejects NaN
            raise invalid_field(self, "temperature", "positive numbers")


@dataclasses.dataclass(frozen=True)
class FeatureSplit(Split):
    """Split of dialogue features; the function `make_batches` also takes `num_epochs`."""

    def batches(
        self, epoch: int = 0, start_step: int = 0, num_epochs: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns the batches of consecutive epochs from one pipeline; see `Split.batches`."""
        return self._batches(epoch, start_step, self.shuffle, num_epochs=num_epochs)

    def example_batch(self, shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """Returns an empty batch with the given shape, without starting the tf.data pipeline."""
        num_rows, length = shape
        rows = np.full(num_rows // jax.process_count(), -1, np.int32)
        return pad_dialogues(self.data, rows, length)


class FusionTask:
    """Trains MiSTER-E on dialogues of speech and text vectors.

    Args:
      config: Experiment config.
      class_names: Names of the C classes.
      model: Model config.
      encoders: Metadata of each modality's encoder, if known; see
        `extraction.encoder_from_metadata`.
      standardizers: Standardizers of the modalities that are standardized before the model.
      notes: Messages to the user about choices made from the data.
      train_features: Training split, if already loaded.
    """

    trainable = nnx.Param
    sharding_rules: ShardingRules = ()
    oom_hint = "a smaller config.data.batch_size or config.num_seeds"

    def __init__(
        self,
        config: ConfigDict,
        class_names: tuple[str, ...],
        model: MisterEConfig,
        encoders: Mapping[str, Any] | None = None,
        standardizers: Mapping[str, Standardizer] | None = None,
        notes: Sequence[str] = (),
        train_features: DialogueFeatures | None = None,
    ):
        self.class_names = class_names
        self.model = model
        self.encoders = dict(encoders or {})
        self.standardizers = dict(standardizers or {})
        self.notes = tuple(notes)
        self._train_features = train_features
        self._data = config.data
        data_seed = config.data.get("seed")
        self._data_seed = config.seed if data_seed is None else data_seed
        if self._data_seed < 0:
            raise InputError(
                f"config.data.seed={data_seed}, config.seed={config.seed}; allowed: 0 or more"
            )
        weights = dataclass_from_config(
            losses.LossWeights, config.loss.weights, "config.loss.weights"
        )
        loss = ConfigDict({name: value for name, value in config.loss.items() if name != "weights"})
        self._loss = dataclass_from_config(LossConfig, loss, "config.loss", weights=weights)
        # Only the loss needs these values, so they are None outside of training.
        self._class_weights: Any = None
        self._logit_adjustment: Any = None
        if train_features is not None:
            counts = train_features.class_counts
            self._class_weights = imbalance.class_weights(
                self._loss.class_weights, counts, "config.loss.class_weights"
            )
            self._logit_adjustment = imbalance.logit_adjustment(self._loss.logit_adjustment, counts)
        if self._loss.weights.score and not model.predict_score:
            raise InputError("config.loss.weights.score needs config.model.predict_score=True")
        if model.predict_score and not self._loss.weights.score > 0:
            raise InputError(
                f"config.loss.weights.score={self._loss.weights.score}; needed: a positive number, "
                "because config.model.predict_score=True"
            )
        if model.predict_score and train_features is not None and train_features.score is None:
            raise InputError(
                f"config.model.predict_score: dataset {train_features.name} has no scores; "
                "allowed: datasets with scores, such as those of CMU-MOSI, or False"
            )
        has_ratings = train_features is None or train_features.ratings is not None
        if self._loss.target == _RATINGS and not has_ratings:
            raise InputError(
                f"config.loss.target=ratings: dataset {config.data.name} has no ratings; allowed: "
                "label, or a dataset with ratings"
            )
        self._num_seeds = config.get("num_seeds", 1)
        num_buckets = self._data.get("num_buckets")
        if min(self._data.batch_size, 1 if num_buckets is None else num_buckets) < 1:
            raise InputError(
                f"config.data: batch_size {self._data.batch_size}, num_buckets "
                f"{num_buckets}; allowed: batch_size of at least 1, num_buckets of at "
                "least 1 or None"
            )
        if config.train.get("accumulation", 1) != 1:
            raise InputError(
                f"config.train.accumulation={config.train.accumulation}; allowed: 1, because the "
                "losses are means over all rows of a batch"
            )

    @classmethod
    def from_data(cls, config: ConfigDict) -> FusionTask:
        """Creates the task for the config's dataset, with input sizes from its training split."""
        if config.data.get("fold") and not config.data.get("folds"):
            raise InputError(
                f"config.data.fold={config.data.fold} needs config.data.folds, such as speaker:5"
            )
        if config.data.get("fold_splits") and not config.data.get("folds"):
            raise InputError(
                f"config.data.fold_splits={config.data.fold_splits} needs config.data.folds, such "
                "as speaker:5"
            )
        if config.data.get("validate_on_train") and config.train.get("select_by") != "last":
            raise InputError(
                "config.data.validate_on_train needs config.train.select_by=last, because "
                "validation scores on training dialogues cannot choose the epoch"
            )
        train = _load_features(config.data, "train")
        model = dataclass_from_config(
            MisterEConfig,
            config.model,
            "config.model",
            num_classes=len(train.class_names),
            speech_dim=train.speech_dim,
            text_dim=train.text_dim,
        )
        encoders: dict[str, Any] = {
            name: train.metadata[name] for name in ("speech", "text") if name in train.metadata
        }
        standardizers, notes = choose_standardizers(train, config.data.get("standardize", AUTO))
        untrained = [
            name
            for name, count in zip(train.class_names, train.class_counts, strict=True)
            if not count
        ]
        if untrained:
            notes.append(f"WARNING: no training utterance has the class {', '.join(untrained)}")
        return cls(config, train.class_names, model, encoders, standardizers, notes, train)

    @classmethod
    def restore(cls, config: ConfigDict, description: Mapping[str, Any]) -> FusionTask:
        """Restores a task from the config and the model description in its work directory."""
        model = dataclass_from_config(
            MisterEConfig, ConfigDict(description["model"]), "the workdir's model"
        )
        standardizers = {
            modality: Standardizer(
                *(np.array(values[name], np.float32) for name in ("mean", "deviation"))
            )
            for modality, values in description["standardizers"].items()
        }
        return cls(
            config,
            tuple(description["class_names"]),
            model,
            description["encoders"],
            standardizers,
            description["notes"],
        )

    def description(self) -> dict[str, Any]:
        """Returns the JSON values that `restore` needs in addition to the config."""
        return {
            "class_names": list(self.class_names),
            "model": dataclasses.asdict(self.model),
            "encoders": self.encoders,
            "standardizers": {
                modality: {
                    "mean": standardizer.mean.tolist(),
                    "deviation": standardizer.deviation.tolist(),
                }
                for modality, standardizer in self.standardizers.items()
            },
            "notes": list(self.notes),
        }

    def features(self, split: str, name: str | None = None) -> DialogueFeatures:
        """Loads a split of the dataset `name`, by default the config's dataset.

        Raises:
          InputError: The dataset does not exist, or its classes or vector sizes do not match the
            model.
        """
        name = self._data.name if name is None else name
        if (name, split) == (self._data.name, "train") and self._train_features is not None:
            features = self._train_features
        elif name == self._data.name:
            features = _load_features(self._data, split)
        else:
            features = load_features(name, split, self._data.data_dir or None)
        for what, value, expected in (
            ("classes", features.class_names, self.class_names),
            ("speech width", features.speech_dim, self.model.speech_dim),
            ("text width", features.text_dim, self.model.text_dim),
        ):
            if value != expected:
                raise InputError(
                    f"dataset {name}, split {split}: {what} {value}; the model takes {expected}"
                )
        return features

    def batched(
        self,
        features: DialogueFeatures,
        *,
        num_shards: int,
        shuffle: bool = False,
        epochs: int = 1,
        compiled: Collection[tuple[int, int]] = (),
    ) -> FeatureSplit:
        """Returns dialogues in batches whose number of rows is a multiple of `num_shards`.

        If the config does not set the number of length buckets, a bucket is added only if it saves
        more time over `epochs` epochs than compiling its program takes. To save compilations,
        batches may be padded to one of the shapes (rows, padded length) in `compiled`.
        """
        num_buckets = self._data.get("num_buckets")
        plan = BatchPlan(
            features.lengths,
            self._data.batch_size,
            num_buckets or DEFAULT_NUM_BUCKETS,
            bucket_cost=0 if num_buckets else bucket_cost(self._num_params, epochs),
            multiple_of=num_shards,
            # In training, plan the buckets for one device, so that the number of steps does not
            # depend on the number of devices.
            fitted_to=1 if shuffle else num_shards,
            weights=self._sampling_weights(features) if shuffle else None,
            compiled=compiled,
        )
        make_batches = functools.partial(batches, features, plan)
        return FeatureSplit(features, plan, make_batches, self._data_seed, shuffle)

    def _sampling_weights(self, features: DialogueFeatures) -> np.ndarray | None:
        return imbalance.sampling_weights(
            self._data.get("sampling", "shuffle"),
            features.label,
            features.lengths,
            len(self.class_names),
            "config.data.sampling",
        )

    def split(self, name: str, *, num_shards: int, shuffle: bool, epochs: int = 1) -> FeatureSplit:
        """Loads a split in batches; see `Task.split`."""
        features = self.features(name)
        if not (features.label >= 0).any():
            raise InputError(f"dataset {features.name}, split {name}: no utterance has a label")
        if self.predicts_score and (features.score is None or np.isnan(features.score).all()):
            raise InputError(f"dataset {features.name}, split {name}: no utterance has a score")
        return self.batched(features, num_shards=num_shards, shuffle=shuffle, epochs=epochs)

    @functools.cached_property
    def _num_params(self) -> int:
        """Total number of parameters of all seeds."""
        params = nnx.eval_shape(lambda: nnx.state(self.init(jax.random.key(0)), nnx.Param))
        return self._num_seeds * sum(leaf.size for leaf in jax.tree.leaves(params))

    @property
    def predicts_score(self) -> bool:
        """Whether the model predicts a score for each utterance."""
        return self.model.predict_score

    @property
    def used_modalities(self) -> tuple[str, ...]:
        """Modalities that an enabled expert reads."""
        return tuple(
            modality for modality in MODALITIES if {modality, "fusion"} & set(self.model.experts)
        )

    def zero_fill_values(self) -> dict[str, np.ndarray | float]:
        """Returns, for each modality, the vector [D] that standardization maps to zero.

        For a modality without standardization, this is the number 0.
        """
        return {
            name: self.standardizers[name].mean if name in self.standardizers else 0.0
            for name in MODALITIES
        }

    def shares_steps_with(self, other: Task) -> bool:
        """Returns whether this task and `other` differ only in `constants`."""
        return isinstance(other, FusionTask) and (
            (self.model, self.class_names) == (other.model, other.class_names)
        )

    def constants(self) -> dict[str, Any]:
        """Returns the arrays that depend on the data and are used by the model or the loss.

        Modalities without standardization get a standardizer that changes nothing.
        """
        dims = {"speech": self.model.speech_dim, "text": self.model.text_dim}
        return {
            "standardizers": {
                modality: dataclasses.astuple(
                    self.standardizers.get(modality) or Standardizer.identity(dim)
                )
                for modality, dim in dims.items()
            },
            "class_weights": self._class_weights,
            "logit_adjustment": self._logit_adjustment,
        }

    def with_constants(self, constants: Mapping[str, Any]) -> FusionTask:
        """Returns a copy of the task with other `constants`, which may be traced arrays."""
        task = copy.copy(self)
        task.standardizers = {
            modality: Standardizer(*values)
            for modality, values in constants["standardizers"].items()
        }
        task._class_weights = constants["class_weights"]
        task._logit_adjustment = constants["logit_adjustment"]
        return task

    def init(self, key: jax.Array) -> MisterE:
        """Returns the model with initial parameters."""
        return MisterE(self.model, rngs=make_rngs(key))

    def load(self, key: jax.Array, partitioner: Partitioner) -> MisterE:
        """Returns the model with initial parameters; MiSTER-E has no pretrained weights."""
        return self.init(key)

    def loss(
        self, model: MisterE, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns this device's share of the loss and of its unweighted terms, with dropout."""
        return mister_e_loss(
            model,
            self._standardize(batch),
            key,
            axis_name,
            self._loss,
            self._class_weights,
            self._logit_adjustment,
        )

    def eval_sums(self, model: MisterE, batch: Batch) -> dict[str, jax.Array]:
        """Returns sums over this device's rows of a batch; see `Task.eval_sums`."""
        output = apply_to_batch(model, self._standardize(batch))
        label, mask = batch["label"], batch["mask"]
        sums = classification_sums(output.logits, label, mask, len(self.class_names))
        if output.score is not None:
            scored = mask & ~jnp.isnan(batch["score"])
            error = jnp.abs(output.score - jnp.where(scored, batch["score"], 0))
            sums |= {"score_error": jnp.where(scored, error, 0).sum(), "scored": scored.sum()}
        return sums

    def predict(self, model: MisterE, batch: Batch) -> dict[str, jax.Array]:
        """Returns probabilities, gate weights, and scores if the model predicts scores."""
        return _predictions(apply_to_batch(model, self._standardize(batch)))

    def predict_step(
        self, model: MisterE, state: MisterEState, batch: Batch
    ) -> tuple[MisterEState, dict[str, jax.Array]]:
        """Predicts the next utterance of each dialogue with a causal model.

        Args:
          model: Causal model.
          state: State of the model after the previous utterance of each dialogue.
          batch: "speech" [B, D], "text" [B, D], "speech_present" [B] and "text_present" [B].

        Returns:
          The new state, and the result of `predict` with T = 1.
        """
        batch = self._standardize(batch)
        state, output = model.step(
            state, batch["speech"], batch["text"], batch["speech_present"], batch["text_present"]
        )
        return state, _predictions(output)

    def _standardize(self, batch: Batch) -> Batch:
        standardized = {
            name: standardizer(batch[name]) for name, standardizer in self.standardizers.items()
        }
        return {**batch, **standardized}


def _load_features(data: ConfigDict, split: str) -> DialogueFeatures:
    """Loads a split of the config's dataset, or of one of its folds if the config has a fold.

    With `validate_on_train`, the training split includes the validation dialogues.
    """
    data_dir = data.data_dir or None
    if data.get("folds"):
        return load_fold(
            data.name,
            split,
            data.folds,
            data.fold,
            data_dir,
            seed=data.fold_seed,
            validate_on_train=data.validate_on_train,
            pooled_splits=split_list(data.get("fold_splits", "")),
        )
    if data.get("validate_on_train") and split == "train":
        pooled = load_pooled(data.name, data_dir, ("train", "validation"))
        return dataclasses.replace(pooled, split="train")
    return load_features(data.name, split, data_dir)


def _predictions(output: MisterEOutput) -> dict[str, jax.Array]:
    score = {} if output.score is None else {"score": output.score}  # [B, T]
    return score | {
        "probabilities": jax.nn.softmax(output.logits),  # [B, T, C]
        "gate": output.gate,  # [B, T, E]
        "expert_probabilities": jax.nn.softmax(output.expert_logits),  # [B, T, E, C]
        "expert_present": output.expert_present,  # [B, T, E]
    }


def apply_to_batch(model: MisterE, batch: Batch, **options: Any) -> MisterEOutput:
    """Runs the model on a batch from `data.batches`; `options` are passed to the model."""
    return model(
        batch["speech"],
        batch["text"],
        batch["mask"],
        speech_present=batch["speech_present"],
        text_present=batch["text_present"],
        **options,
    )


def mister_e_loss(
    model: MisterE,
    batch: Batch,
    key: jax.Array,
    axis_name: str | None = None,
    config: LossConfig | None = None,
    class_weights: np.ndarray | None = None,
    logit_adjustment: np.ndarray | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes MiSTER-E's training loss for a batch, with dropout.

    Args:
      model: Model to train.
      batch: Batch from `data.batches`; under a mapped axis, this device's rows.
      key: Dropout key of the global batch, the same on all devices.
      axis_name: Name of the mapped axis; see `losses`.
      config: Hyperparameters of the loss.
      class_weights: Weight of each class, [C]; see `losses.mister_e`.
      logit_adjustment: Adjustment of each class's logit, [C]; see `losses.mister_e`.

    Returns:
      This device's share of the weighted sum of the losses and of each unweighted loss.
    """
    config = config or LossConfig()
    num_rows = batch["mask"].shape[0]
    rngs = PerExampleRngs.from_batch_key(key, num_rows, first_row_index(num_rows, axis_name))
    output = apply_to_batch(model, batch, deterministic=False, rngs=rngs)
    return losses.mister_e(
        output,
        batch["label"],
        batch["mask"],
        config.weights,
        gamma=config.gamma,
        temperature=config.temperature,
        sharpness=config.sharpness,
        class_weights=class_weights,
        logit_adjustment=logit_adjustment,
        scores=batch.get("score"),
        ratings=batch["ratings"] if config.target == _RATINGS else None,
        axis_name=axis_name,
    )
