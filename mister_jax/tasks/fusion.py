"""MiSTER-E on dialogues of speech and text vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from mister_jax import losses, metrics
from mister_jax.data import BatchPlan, DialogueFeatures, batches, load
from mister_jax.data.schema import MODALITIES
from mister_jax.data.standardizer import AUTO, Standardizer, choose_standardizers
from mister_jax.errors import InputError
from mister_jax.models import MisterE, MisterEConfig, MisterEOutput
from mister_jax.parallel.partitioning import Partitioner
from mister_jax.parallel.sharding import ShardingRules
from mister_jax.tasks.base import Batch, dataclass_from_config
from mister_jax.training.steps import mister_e_loss, read_dialogues


@dataclasses.dataclass(frozen=True)
class FeatureSplit:
    """`Split` of a dataset of dialogue features."""

    features: DialogueFeatures
    plan: BatchPlan
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
        return self.features.fingerprint()

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        return batches(
            self.features,
            self.plan,
            seed=self.seed,
            epoch=epoch,
            start_step=start_step,
            shuffle=self.shuffle,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


class FusionTask:
    """MiSTER-E on dialogues of speech and text vectors.

    Args:
      config: Config of the experiment.
      class_names: Names of the C classes.
      model: Sizes of the model.
      encoders: What identifies the encoder that made the features, by modality, where it is known;
        see `extract.encoder_of`.
      standardizers: Standardizers by modality, of those that are standardized before the model
        reads them.
      notes: What the user should know of the choices made from the data, a line each.
    """

    def __init__(
        self,
        config: ConfigDict,
        class_names: tuple[str, ...],
        model: MisterEConfig,
        encoders: Mapping[str, Any] | None = None,
        standardizers: Mapping[str, Standardizer] | None = None,
        notes: Sequence[str] = (),
    ):
        self.class_names = class_names
        self.model = model
        self.encoders = dict(encoders or {})
        self.standardizers = dict(standardizers or {})
        self.notes = tuple(notes)
        self._data = config.data
        data_seed = config.data.get("seed")
        self._data_seed = config.seed if data_seed is None else data_seed
        if self._data_seed < 0:
            raise InputError(
                f"config.data.seed={data_seed}, config.seed={config.seed}; allowed: 0 or more"
            )
        self._weights = dataclass_from_config(
            losses.LossWeights, config.loss.weights, "config.loss.weights"
        )
        self._gamma = config.loss.gamma
        self._temperature = config.loss.temperature
        self._sharpness = config.loss.get("sharpness", 1.0)
        if self._gamma < 0 or self._temperature <= 0 or self._sharpness < 0:
            raise InputError(
                f"config.loss: gamma {self._gamma}, temperature {self._temperature}, sharpness "
                f"{self._sharpness}; allowed are gamma and sharpness of 0 or more and a positive "
                "temperature"
            )
        if min(self._data.batch_size, self._data.num_buckets) < 1:
            raise InputError(
                f"config.data: batch_size {self._data.batch_size}, num_buckets "
                f"{self._data.num_buckets}; both must be at least 1"
            )
        if config.train.get("accumulation", 1) != 1:
            raise InputError(
                f"config.train.accumulation={config.train.accumulation}; allowed is 1: the "
                "contrastive loss is of a whole batch"
            )

    @classmethod
    def from_data(cls, config: ConfigDict) -> FusionTask:
        """The task for the dataset that the config names; its training split gives the sizes."""
        train = load(config.data.name, "train", config.data.data_dir or None)
        model = dataclass_from_config(
            MisterEConfig,
            config.model,
            "config.model",
            num_classes=len(train.class_names),
            speech_dim=train.speech_dim,
            text_dim=train.text_dim,
        )
        told = train.metadata
        encoders: dict[str, Any] = {name: told[name] for name in ("speech", "text") if name in told}
        standardizers, notes = choose_standardizers(train, config.data.get("standardize", AUTO))
        return cls(config, train.class_names, model, encoders, standardizers, notes)

    @classmethod
    def restore(cls, config: ConfigDict, description: Mapping[str, Any]) -> FusionTask:
        """The task of a work directory, from its config and its `description`."""
        fields = ConfigDict(description["model"])
        class_names = tuple(description["class_names"])
        if "standardizers" not in description:
            raise InputError("the work directory is from an older version; train it again")
        model = dataclass_from_config(MisterEConfig, fields, "the workdir's model")
        encoders = description.get("encoders", {})
        standardizers = {
            modality: Standardizer(
                *(np.array(values[name], np.float32) for name in ("mean", "deviation"))
            )
            for modality, values in description["standardizers"].items()
        }
        return cls(
            config,
            class_names,
            model,
            encoders,
            standardizers,
            description.get("notes", ()),
        )

    def description(self) -> dict[str, Any]:
        return {
            "class_names": list(self.class_names),
            "model": dataclasses.asdict(self.model),
            "encoders": self.encoders,
            "standardizers": {
                modality: {"mean": fitted.mean.tolist(), "deviation": fitted.deviation.tolist()}
                for modality, fitted in self.standardizers.items()
            },
            "notes": list(self.notes),
        }

    def features(self, split: str, name: str | None = None) -> DialogueFeatures:
        """A split of the config's dataset, or of another with the same classes and widths.

        Raises:
          InputError: there is none, or it does not fit the model.
        """
        name = self._data.name if name is None else name
        features = load(name, split, self._data.data_dir or None)
        found = {
            "classes": features.class_names,
            "speech width": features.speech_dim,
            "text width": features.text_dim,
        }
        expected = {
            "classes": self.class_names,
            "speech width": self.model.speech_dim,
            "text width": self.model.text_dim,
        }
        for what, value in found.items():
            if value != expected[what]:
                raise InputError(
                    f"dataset {name}, split {split}: {what} {value}; the model takes "
                    f"{expected[what]}"
                )
        return features

    def batched(
        self, features: DialogueFeatures, *, num_shards: int, shuffle: bool = False
    ) -> FeatureSplit:
        """Features in batches whose rows are a multiple of `num_shards`."""
        plan = BatchPlan(
            features.lengths,
            self._data.batch_size,
            self._data.num_buckets,
            multiple_of=num_shards,
            # A training must take the same steps on any number of devices.
            fitted_to=1 if shuffle else num_shards,
        )
        return FeatureSplit(features, plan, self._data_seed, shuffle)

    def zero_fill_values(self) -> dict[str, np.ndarray | float]:
        """The features, by modality, of which the model reads zeros: [D], or 0 for all."""
        return {
            name: self.standardizers[name].mean if name in self.standardizers else 0.0
            for name in MODALITIES
        }

    def split(self, name: str, *, num_shards: int, shuffle: bool) -> FeatureSplit:
        features = self.features(name)
        if not (features.label >= 0).any():
            raise InputError(f"dataset {features.name}, split {name}: no utterance has a label")
        return self.batched(features, num_shards=num_shards, shuffle=shuffle)

    trainable = nnx.Param
    rules: ShardingRules = ()
    oom_hint = "a smaller config.data.batch_size or config.num_seeds"

    def init(self, key: jax.Array) -> MisterE:
        return MisterE(self.model, rngs=nnx.Rngs(key))

    def load(self, key: jax.Array, partitioner: Partitioner) -> MisterE:
        return self.init(key)

    def loss(
        self, model: MisterE, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return mister_e_loss(
            model,
            self._standardized(batch),
            key,
            axis_name,
            weights=self._weights,
            gamma=self._gamma,
            temperature=self._temperature,
            sharpness=self._sharpness,
        )

    def _standardized(self, batch: Batch) -> Batch:
        return {
            **batch,
            **{name: fitted(batch[name]) for name, fitted in self.standardizers.items()},
        }

    def _read(self, model: MisterE, batch: Batch) -> MisterEOutput:
        return read_dialogues(model, self._standardized(batch))

    def evaluate(self, model: MisterE, batch: Batch) -> dict[str, jax.Array]:
        logits, label = self._read(model, batch).logits, batch["label"]
        labeled = batch["mask"] & (label >= 0)
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(labeled, label, 0)
        )
        return {
            "confusion": metrics.confusion_counts(
                label, logits.argmax(-1), batch["mask"], len(self.class_names)
            ),
            "cross_entropy": jnp.where(labeled, cross_entropy, 0).sum(),
        }

    def predict(self, model: MisterE, batch: Batch) -> dict[str, jax.Array]:
        output = self._read(model, batch)
        return {
            "probabilities": jax.nn.softmax(output.logits),  # B T C
            "gate": output.gate,  # B T E
            "expert_probabilities": jax.nn.softmax(output.expert_logits),  # B T E C
            "expert_present": output.expert_present,  # B T E
        }
