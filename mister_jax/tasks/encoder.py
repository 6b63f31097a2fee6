"""Fine-tuning of text and speech encoders on single utterances: stage 1 of MiSTER-E.

A backbone from a folder or the Hugging Face Hub gets a classification head (arXiv 2602.23300). The
backbone is fully fine-tuned or trained with LoRA.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mister_jax import imbalance, losses
from mister_jax.config_checks import check_at_least, check_dtypes
from mister_jax.data.batching import BatchPlan
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.utterances import Utterances
from mister_jax.encoders import hub, registry
from mister_jax.errors import InputError
from mister_jax.models.utterance import UtteranceConfig, UtteranceHead, UtteranceOutput
from mister_jax.nn import PerExampleRngs
from mister_jax.nn.initialization import create_in_one_program
from mister_jax.nn.lora import LoRAConfig, quantize
from mister_jax.nn.rngs import make_rngs
from mister_jax.parallel.partitioning import JitPartitioner, Partitioner
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES, ShardingRules
from mister_jax.tasks.base import Batch, Split, Task, classification_sums
from mister_jax.tasks.config import dataclass_from_config


@dataclasses.dataclass(frozen=True)
class EncoderOptions:
    """Options of the fine-tuned encoder.

    Attributes:
      name: Folder, or name on the Hugging Face Hub.
      full: Whether to train all parameters. By default, only the LoRA parameters and the head are
        trained.
      quantize: Whether to store the frozen kernels as int8.
      dtype: Computation dtype.
      param_dtype: Dtype in which the backbone's pretrained parameters are stored.
      remat: Rematerialization policy; see `nn.ScannedLayers`.
    """

    name: str
    full: bool = False
    quantize: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        if self.full and self.quantize:
            raise ValueError("full trains the kernels and quantize freezes them; choose one")
        check_dtypes(self)


@dataclasses.dataclass(frozen=True)
class EncoderLossConfig:
    """Hyperparameters of the loss on single utterances.

    Attributes:
      gamma: Focusing parameter of the focal loss, 0 or more.
      class_weights: Class weighting method or weights; see `imbalance.class_weights`.
      logit_adjustment: Strength of the logit adjustment, 0 or more; see
        `imbalance.logit_adjustment`.
    """

    gamma: float = 2.0
    class_weights: str = "none"
    logit_adjustment: float = 0.0

    def __post_init__(self):
        check_at_least(self, 0, "gamma", "logit_adjustment")


class EncoderTask:
    """Base class for tasks that train a backbone and a head on labeled utterances.

    Args:
      config: Experiment config.
      class_names: Names of the C classes.
      backbone_config: JSON values from `read_backbone_config`.
    """

    options_class: Any = EncoderOptions
    sharding_rules: ShardingRules = ENCODER_SHARDING_RULES
    notes = ()
    predicts_score = False
    oom_hint = (
        "a smaller config.data.batch_size, a larger config.train.accumulation, or "
        "config.encoder.options with remat=full, param_dtype=bfloat16 or quantize=True"
    )

    def __init__(
        self, config: ConfigDict, class_names: tuple[str, ...], backbone_config: Mapping[str, Any]
    ):
        self.class_names = class_names
        self.options = dataclass_from_config(
            self.options_class, config.encoder.options, "config.encoder.options"
        )
        self.lora = None
        if not self.options.full:
            self.lora = dataclass_from_config(
                LoRAConfig, config.encoder.lora, "config.encoder.lora"
            )
        self.head = dataclass_from_config(
            UtteranceConfig, config.head, "config.head", num_classes=len(class_names)
        )
        self._backbone_config = dict(backbone_config)
        self._data = config.data
        self._seed = config.seed
        self._loss = dataclass_from_config(EncoderLossConfig, config.loss, "config.loss")
        # Set by `split`, because only training has a loss.
        self._class_weights: np.ndarray | None = None
        self._logit_adjustment: np.ndarray | None = None
        self._accumulation = config.train.get("accumulation", 1)
        if min(self._data.batch_size, self._data.num_buckets) < 1:
            raise InputError(
                f"config.data: batch_size {self._data.batch_size}, num_buckets "
                f"{self._data.num_buckets}; both must be at least 1"
            )
        try:
            self._abstract_backbone: Any = nnx.eval_shape(
                lambda: self._make_backbone(jax.random.key(0))
            )
            self._check_backbone(self._abstract_backbone)
        except ValueError as error:
            raise InputError(f"config.encoder ({self.options.name}): {error}") from error

    # The subclass for each modality implements or overrides these methods.

    @classmethod
    def read_backbone_config(cls, options: Any) -> dict[str, Any]:
        """Reads the config from which `_make_backbone` creates the backbone, as JSON values."""
        raise NotImplementedError

    def make_model(self, backbone: Any, head: UtteranceHead) -> nnx.Module:
        """Combines a backbone and a head into the model."""
        raise NotImplementedError

    def apply(self, model: Any, batch: Batch, **options: Any) -> UtteranceOutput:
        """Runs the model on a batch; `options` are passed to the model."""
        raise NotImplementedError

    def augment(self, batch: Batch, keys: jax.Array) -> Batch:
        """Augments the batch, by default not at all; `keys`, [B], has one key per utterance."""
        return batch

    def features(self, split: str, name: str | None = None) -> Any:
        """Loads the utterances that have the task's modality; see `Task.features`."""
        raise NotImplementedError

    def batched(self, utterances: Any, *, num_shards: int, shuffle: bool = False) -> Split:
        """Returns utterances in batches whose number of rows is a multiple of `num_shards`."""
        raise NotImplementedError

    def _check_backbone(self, backbone: Any) -> None:
        """Raises ValueError if the options do not match the backbone."""

    def _train_utterances(self, split: str) -> Any:
        """Loads the utterances of a split for training."""
        return self.features(split)

    # All modalities share these methods.

    @classmethod
    def from_data(cls, config: ConfigDict) -> Any:
        """Creates the task for the config's dataset and backbone."""
        dataset = DialogueDataset(config.data.name, config.data.data_dir or None)
        options = dataclass_from_config(
            cls.options_class, config.encoder.options, "config.encoder.options"
        )
        return cls(config, dataset.class_names, cls.read_backbone_config(options))

    @classmethod
    def restore(cls, config: ConfigDict, description: Mapping[str, Any]) -> Any:
        """Restores a task from the config and the model description in its work directory."""
        backbone_config = json.loads(description["backbone"])
        return cls(config, tuple(description["class_names"]), backbone_config)

    def description(self) -> dict[str, Any]:
        """Returns the JSON values that `restore` needs in addition to the config."""
        # As a string, the backbone's config.json takes only one line of model.json.
        backbone_config = json.dumps(self._backbone_config)
        return {"class_names": list(self.class_names), "backbone": backbone_config}

    @property
    def trainable(self) -> Any:
        """NNX filter for the trained parameters: all, or the LoRA parameters and the head."""
        if self.options.full:
            return nnx.Param
        return nnx.Any(nnx.LoRAParam, nnx.All(nnx.Param, nnx.PathContains("head")))

    @functools.cached_property
    def folder(self) -> Any:
        """Folder with the backbone's files."""
        return hub.fetch(self.options.name)

    def fingerprint(self) -> str:
        """Returns a hash of the backbone's files; see `hub.fingerprint`."""
        return hub.fingerprint(self.folder)

    def _config_changes(self) -> dict[str, Any]:
        """Returns the backbone config fields that the options override."""
        options = self.options
        return {
            "lora": self.lora,
            "dtype": options.dtype,
            "param_dtype": options.param_dtype,
            "remat": options.remat,
        }

    def _make_backbone(self, key: jax.Array) -> nnx.Module:
        return registry.create_module(
            self._backbone_config, rngs=make_rngs(key), **self._config_changes()
        )

    def _load_backbone(self, mesh: Mesh | None, seed: int) -> Any:
        """Loads the pretrained backbone; `seed` initializes parameters not in the checkpoint."""
        return registry.load_module(
            self.folder,
            hf_config=self._backbone_config,
            mesh=mesh,
            seed=seed,
            **self._config_changes(),
        )

    def _plan(
        self, lengths: np.ndarray, label: np.ndarray, num_shards: int, *, shuffle: bool
    ) -> BatchPlan:
        weights = imbalance.sampling_weights(
            self._data.get("sampling", "shuffle"),
            label,
            np.ones(len(label), int),
            len(self.class_names),
            "config.data.sampling",
        )
        return BatchPlan(
            lengths,
            self._data.batch_size,
            self._data.num_buckets,
            multiple_of=num_shards * self._accumulation,
            # In training, plan the buckets for one device, so that the number of steps does not
            # depend on the number of devices.
            fitted_to=self._accumulation * (1 if shuffle else num_shards),
            weights=weights if shuffle else None,
        )

    def _check_classes(self, utterances: Utterances) -> Utterances:
        """Returns the utterances if their classes match the model's."""
        if utterances.class_names != self.class_names:
            raise InputError(
                f"dataset {utterances.name}: classes {utterances.class_names}; the model has "
                f"{self.class_names}"
            )
        return utterances

    def split(self, name: str, *, num_shards: int, shuffle: bool, epochs: int = 1) -> Split:
        """Loads a split's labeled utterances in batches; see `Task.split`."""
        utterances = self._train_utterances(name) if shuffle else self.features(name)
        labeled = utterances.labeled()
        if not len(labeled.label):
            raise InputError(
                f"dataset {labeled.name}, split {name}: no labeled utterance can be read"
            )
        if name == "train":
            counts = imbalance.class_counts(labeled.label, len(self.class_names))
            self._class_weights = imbalance.class_weights(
                self._loss.class_weights, counts, "config.loss.class_weights"
            )
            self._logit_adjustment = imbalance.logit_adjustment(self._loss.logit_adjustment, counts)
        return self.batched(labeled, num_shards=num_shards, shuffle=shuffle)

    def _add_head(self, backbone: Any, key: jax.Array) -> nnx.Module:
        if self.options.quantize:
            quantize(backbone)

        head = create_in_one_program(
            lambda rngs: UtteranceHead(backbone.config.hidden_size, self.head, rngs=rngs),
            make_rngs(key),
        )
        return self.make_model(backbone, head)

    def init(self, key: jax.Array) -> nnx.Module:
        """Returns the model with initial parameters."""
        backbone_key, head_key = jax.random.split(key)
        return self._add_head(self._make_backbone(backbone_key), head_key)

    def load(self, key: jax.Array, partitioner: Partitioner) -> nnx.Module:
        """Returns the model with pretrained weights and a new head."""
        backbone_key, head_key = jax.random.split(key)
        mesh = partitioner.mesh if isinstance(partitioner, JitPartitioner) else None
        backbone = self._load_backbone(mesh, int(jax.random.bits(backbone_key)))
        return self._add_head(backbone, head_key)

    def loss(
        self, model: Any, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns this device's share of the focal loss, with augmentation and dropout."""
        # A row's keys depend on its utterance, not on its position in the batch.
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["row"])
        fold_in = jax.vmap(jax.random.fold_in, (0, None))
        batch = self.augment(batch, fold_in(row_keys, 1))
        rngs = PerExampleRngs(fold_in(row_keys, 0))
        logits = self.apply(model, batch, deterministic=False, rngs=rngs).logits
        label, weight = batch["label"], batch["weight"]
        if self._logit_adjustment is not None:
            logits += self._logit_adjustment
        if self._class_weights is not None:
            weight *= jnp.asarray(self._class_weights)[jnp.maximum(label, 0)]
        per_row = losses.focal_per_position(
            logits, label, batch["weight"] > 0, gamma=self._loss.gamma
        )
        total = (per_row * weight).sum()
        return total, {"focal": total}

    def eval_sums(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns the confusion counts and the summed cross-entropy of a batch."""
        logits, label = self.apply(model, batch).logits, batch["label"]
        return classification_sums(logits, label, label >= 0, len(self.class_names))

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns probabilities and features; each utterance is a dialogue of length 1."""
        output = self.apply(model, batch)
        return {
            "probabilities": jax.nn.softmax(output.logits)[:, None],  # [B, 1, C]
            "feature": output.feature[:, None],  # [B, 1, F]
        }

    def shares_steps_with(self, other: Task) -> bool:
        """Returns False, because encoders are fine-tuned one after another."""
        return False

    def constants(self) -> dict[str, Any]:
        """Returns an empty dict, because the steps of this task are compiled for its data."""
        return {}

    def with_constants(self, constants: Mapping[str, Any]) -> EncoderTask:
        """Returns the task itself, which has no constants."""
        return self
