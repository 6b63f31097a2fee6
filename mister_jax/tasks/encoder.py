"""What fine-tuning a text and a speech encoder share: stage 1 of MiSTER-E (arXiv 2602.23300).

A backbone from a folder or the Hugging Face Hub, with low-rank paths or trained whole, under a head
that classifies single utterances.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mister_jax import losses, metrics
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.pipeline import BatchPlan
from mister_jax.data.utterances import Utterances
from mister_jax.encoders import hub
from mister_jax.errors import InputError
from mister_jax.models.utterance import (
    UtteranceConfig,
    UtteranceHead,
    UtteranceOutput,
    check_dtypes,
)
from mister_jax.nn import PerExampleRngs
from mister_jax.nn.lora import LoRAConfig, quantize
from mister_jax.parallel.partitioning import JitPartitioner, Partitioner
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES, ShardingRules
from mister_jax.tasks.base import Batch, dataclass_from_config


@dataclasses.dataclass(frozen=True)
class EncoderOptions:
    """Which encoder is tuned, and how.

    Attributes:
      name: a folder, or a name on the Hugging Face Hub.
      full: train all of the backbone; else its low-rank paths, and the head, alone.
      quantize: keep the frozen kernels as int8.
      dtype: of the computation.
      param_dtype: of the backbone's own parameters.
      remat: see `nn.ScannedLayers`.
    """

    name: str
    full: bool = False
    quantize: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        if self.full and self.quantize:
            raise ValueError("quantize keeps kernels as they are; full trains them: one of the two")
        check_dtypes(self)


@dataclasses.dataclass(frozen=True)
class EncoderSplit:
    """`Split` of single utterances.

    Attributes:
      utterances: that are in it.
      plan: which utterances share a batch.
      make: the batches of an epoch, called with keywords of `data.utterances.utterance_batches`.
      seed: of the shuffle.
      shuffle: permute the utterances in each epoch.
    """

    utterances: Utterances
    plan: BatchPlan
    make: Callable[..., Iterator[dict[str, np.ndarray]]]
    seed: int
    shuffle: bool

    @property
    def steps(self) -> int:
        return self.plan.steps_per_epoch

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return self.plan.shapes

    @property
    def padding_share(self) -> float:
        return self.plan.padding_share

    def fingerprint(self) -> str:
        return self.utterances.fingerprint()

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        return self.make(
            seed=self.seed,
            epoch=epoch,
            start_step=start_step,
            shuffle=self.shuffle,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


class EncoderTask:
    """A backbone with a head, on utterances with a label. Subclasses know the modality.

    Args:
      config: of the experiment.
      class_names: C names.
      described: of `described`.
    """

    options_class: Any = EncoderOptions
    rules: ShardingRules = ENCODER_SHARDING_RULES
    notes = ()
    oom_hint = (
        "a smaller config.data.batch_size, a larger config.train.accumulation, "
        "config.encoder.options.remat=full, or its param_dtype=bfloat16 or quantize"
    )

    def __init__(
        self, config: ConfigDict, class_names: tuple[str, ...], described: Mapping[str, Any]
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
        self._described = dict(described)
        self._data = config.data
        self._seed = config.seed
        self._gamma = config.loss.gamma
        self._multiple = config.train.get("accumulation", 1)
        if self._gamma < 0:
            raise InputError(f"config.loss.gamma={self._gamma}; allowed: 0 or more")
        if min(self._data.batch_size, self._data.num_buckets) < 1:
            raise InputError(
                f"config.data: batch_size {self._data.batch_size}, num_buckets "
                f"{self._data.num_buckets}; both must be at least 1"
            )
        try:
            self._shapes: Any = nnx.eval_shape(lambda: self._backbone(jax.random.key(0)))
            self._check_backbone(self._shapes)
        except ValueError as error:
            raise InputError(f"config.encoder ({self.options.name}): {error}") from error

    def _check_backbone(self, backbone: Any) -> None:
        """Raises ValueError if the options do not go with the backbone."""

    @classmethod
    def from_data(cls, config: ConfigDict) -> Any:
        """The task for the dataset and the backbone that the config names."""
        dataset = DialogueDataset(config.data.name, config.data.data_dir or None)
        options = dataclass_from_config(
            cls.options_class, config.encoder.options, "config.encoder.options"
        )
        return cls(config, dataset.class_names, cls.described(options))

    @classmethod
    def described(cls, options: Any) -> dict[str, Any]:
        """What a backbone is, of the config's options: JSON values that `_backbone` makes it of."""
        raise NotImplementedError

    @classmethod
    def restore(cls, config: ConfigDict, description: Mapping[str, Any]) -> Any:
        """The task of a work directory, from its config and its `description`."""
        described = json.loads(description["backbone"])
        return cls(config, tuple(description["class_names"]), described)

    def description(self) -> dict[str, Any]:
        # As text, since the numbers of a config.json need not survive a ConfigDict.
        return {"class_names": list(self.class_names), "backbone": json.dumps(self._described)}

    @property
    def trainable(self) -> Any:
        if self.options.full:
            return nnx.Param
        return nnx.Any(nnx.LoRAParam, nnx.All(nnx.Param, nnx.PathContains("head")))

    @functools.cached_property
    def folder(self) -> Any:
        """Where the backbone's files are."""
        return hub.fetch(self.options.name)

    def fingerprint(self) -> str:
        """See `hub.fingerprint`; of the backbone's files."""
        return hub.fingerprint(self.folder)

    def _changes(self) -> dict[str, Any]:
        options = self.options
        return {
            "lora": self.lora,
            "dtype": options.dtype,
            "param_dtype": options.param_dtype,
            "remat": options.remat,
        }

    def _backbone(self, key: jax.Array) -> nnx.Module:
        return hub.make(self._described, rngs=nnx.Rngs(key), **self._changes())

    def _loaded_backbone(self, mesh: Mesh | None, seed: int) -> Any:
        """`_backbone` with its weights; `seed` is of what no checkpoint holds."""
        return hub.load_module(self.folder, mesh=mesh, seed=seed, **self._changes())

    def model(self, backbone: Any, head: UtteranceHead) -> nnx.Module:
        """The model of a backbone and its head."""
        raise NotImplementedError

    def read(self, model: Any, batch: Batch, **options: Any) -> UtteranceOutput:
        """What the model gives for a batch."""
        raise NotImplementedError

    def augmented(self, batch: Batch, keys: jax.Array) -> Batch:
        """The batch as training sees it; `keys` [B], one an utterance."""
        return batch

    def features(self, split: str, name: str | None = None) -> Any:
        """The utterances of a split of the config's dataset, or of another, that can be read."""
        raise NotImplementedError

    def _to_train_on(self, split: str) -> Any:
        """`features` of a split that is to be trained on."""
        return self.features(split)

    def batched(self, utterances: Any, *, num_shards: int, shuffle: bool = False) -> EncoderSplit:
        """Utterances in batches whose rows are a multiple of `num_shards`."""
        raise NotImplementedError

    def _plan(self, lengths: np.ndarray, num_shards: int, *, shuffle: bool) -> BatchPlan:
        return BatchPlan(
            lengths,
            self._data.batch_size,
            self._data.num_buckets,
            multiple_of=num_shards * self._multiple,
            # A training must take the same steps on any number of devices.
            fitted_to=self._multiple * (1 if shuffle else num_shards),
        )

    def _checked(self, utterances: Any) -> Any:
        """The utterances, if their classes are the model's."""
        if utterances.class_names != self.class_names:
            raise InputError(
                f"dataset {utterances.name}: classes {utterances.class_names}; the model takes "
                f"{self.class_names}"
            )
        return utterances

    def split(self, name: str, *, num_shards: int, shuffle: bool) -> EncoderSplit:
        utterances = self._to_train_on(name) if shuffle else self.features(name)
        labeled = utterances.labeled()
        if not len(labeled.label):
            raise InputError(
                f"dataset {labeled.name}, split {name}: no utterance with a label can be read"
            )
        return self.batched(labeled, num_shards=num_shards, shuffle=shuffle)

    def _with_head(self, backbone: Any, key: jax.Array) -> nnx.Module:
        if self.options.quantize:
            quantize(backbone)
        head = UtteranceHead(backbone.config.hidden_size, self.head, rngs=nnx.Rngs(key))
        return self.model(backbone, head)

    def init(self, key: jax.Array) -> nnx.Module:
        backbone_key, head_key = jax.random.split(key)
        return self._with_head(self._backbone(backbone_key), head_key)

    def load(self, key: jax.Array, partitioner: Partitioner) -> nnx.Module:
        backbone_key, head_key = jax.random.split(key)
        mesh = partitioner.mesh if isinstance(partitioner, JitPartitioner) else None
        backbone = self._loaded_backbone(mesh, int(jax.random.bits(backbone_key)))
        return self._with_head(backbone, head_key)

    def loss(
        self, model: Any, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        # A row's dropout depends on the utterance alone, not on its place in batch and parts.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["row"])
        draws = jax.vmap(jax.random.fold_in, (0, None))
        batch = self.augmented(batch, draws(keys, 1))
        dropout = PerExampleRngs(draws(keys, 0))
        logits = self.read(model, batch, deterministic=False, rngs=dropout).logits
        each = losses.focal_per_position(
            logits, batch["label"], batch["weight"] > 0, gamma=self._gamma
        )
        total = (each * batch["weight"]).sum()
        return total, {"focal": total}

    def evaluate(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        logits, label = self.read(model, batch).logits, batch["label"]
        labeled = label >= 0
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(labeled, label, 0)
        )
        return {
            "confusion": metrics.confusion_counts(
                label, logits.argmax(-1), labeled, len(self.class_names)
            ),
            "cross_entropy": jnp.where(labeled, cross_entropy, 0).sum(),
        }

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        output = self.read(model, batch)
        # An axis of one utterance, as of a dialogue.
        return {
            "probabilities": jax.nn.softmax(output.logits)[:, None],  # B 1 C
            "feature": output.feature[:, None],  # B 1 F
        }
