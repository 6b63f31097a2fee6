"""A text encoder, fine-tuned on single utterances: stage 1 of MiSTER-E for text."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from mister_jax import losses, metrics
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.pipeline import BatchPlan
from mister_jax.data.utterances import UtteranceTokens, load_tokens, token_batches
from mister_jax.encoders import hub
from mister_jax.encoders.text import encode_texts
from mister_jax.errors import InputError
from mister_jax.models.utterance import (
    TextUtterance,
    UtteranceConfig,
    UtteranceHead,
    UtteranceOutput,
)
from mister_jax.nn import DialogueKeys
from mister_jax.nn.lora import LoRAConfig, quantize
from mister_jax.parallel import JitSpread, Rules, Spread
from mister_jax.tasks.base import Batch, from_config


@dataclasses.dataclass(frozen=True)
class EncoderOptions:
    """Which encoder is tuned, and how.

    Attributes:
      name: a folder, or a name on the Hugging Face Hub.
      max_tokens: of an utterance.
      full: train all of the backbone; else its low-rank paths, and the head, alone.
      quantize: keep the frozen kernels as int8.
      dtype: of the computation.
      param_dtype: of the backbone's own parameters.
      remat: see `nn.Stack`.
    """

    name: str
    max_tokens: int = 128
    full: bool = False
    quantize: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        if not self.name:
            raise ValueError("name is empty; allowed: a folder, or a name on the Hugging Face Hub")
        if self.full and self.quantize:
            raise ValueError("quantize keeps kernels as they are; full trains them: one of the two")


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """`Split` of utterances as tokens."""

    utterances: UtteranceTokens
    plan: BatchPlan
    seed: int
    shuffle: bool

    @property
    def steps(self) -> int:
        return self.plan.steps_per_epoch

    @property
    def padding_share(self) -> float:
        return self.plan.padding_share

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        return token_batches(
            self.utterances,
            self.plan,
            seed=self.seed,
            epoch=epoch,
            start_step=start_step,
            shuffle=self.shuffle,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


class TextEncoderTask:
    """A text backbone with a head, on utterances with a label.

    Args:
      config: of the experiment.
      class_names: C names.
      described: content of the backbone's `config.json`.
    """

    rules: Rules = hub.RULES

    def __init__(
        self, config: ConfigDict, class_names: tuple[str, ...], described: Mapping[str, Any]
    ):
        self.class_names = class_names
        self.options = from_config(EncoderOptions, config.encoder.options, "config.encoder.options")
        self.lora = None
        if not self.options.full:
            self.lora = from_config(LoRAConfig, config.encoder.lora, "config.encoder.lora")
        self.head = from_config(
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

    @classmethod
    def from_data(cls, config: ConfigDict) -> TextEncoderTask:
        """The task for the dataset and the backbone that the config names."""
        dataset = DialogueDataset(config.data.name, config.data.data_dir or None)
        folder = hub.fetch(config.encoder.options.name)
        return cls(config, dataset.class_names, hub.read_config(folder))

    @classmethod
    def restore(cls, config: ConfigDict, description: Mapping[str, Any]) -> TextEncoderTask:
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

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The backbone's."""
        shapes = nnx.eval_shape(lambda: self._backbone(jax.random.key(0)))
        return hub.load_processor(self.folder, shapes)

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

    def _with_head(self, backbone: Any, key: jax.Array) -> TextUtterance:
        if self.options.quantize:
            quantize(backbone)
        head = UtteranceHead(backbone.config.width, self.head, rngs=nnx.Rngs(key))
        return TextUtterance(backbone, head)

    def init(self, key: jax.Array) -> TextUtterance:
        backbone_key, head_key = jax.random.split(key)
        return self._with_head(self._backbone(backbone_key), head_key)

    def load(self, key: jax.Array, spreading: Spread) -> TextUtterance:
        backbone_key, head_key = jax.random.split(key)
        backbone = hub.load_module(
            self.folder,
            mesh=spreading.mesh if isinstance(spreading, JitSpread) else None,
            seed=int(jax.random.bits(backbone_key)),
            **self._changes(),
        )
        return self._with_head(backbone, head_key)

    def features(self, split: str, name: str | None = None) -> UtteranceTokens:
        """The utterances with text of a split of the config's dataset, or of another.

        Raises:
          InputError: there is none, or its classes are others.
        """
        name = self._data.name if name is None else name
        utterances = load_tokens(name, split, self._data.data_dir or None, self.encode)
        if utterances.class_names != self.class_names:
            raise InputError(
                f"dataset {name}: classes {utterances.class_names}; the model takes "
                f"{self.class_names}"
            )
        return utterances

    def encode(self, texts: Any) -> list[np.ndarray]:
        """Tokens of texts."""
        return encode_texts(self.tokenizer, texts, self.options.max_tokens)

    def batched(
        self, utterances: UtteranceTokens, *, num_shards: int, shuffle: bool = False
    ) -> TokenSplit:
        """Utterances in batches whose rows are a multiple of `num_shards`."""
        data = self._data
        multiple = num_shards * self._multiple
        plan = BatchPlan(utterances.token_counts, data.batch_size, data.num_buckets, multiple)
        return TokenSplit(utterances, plan, self._seed, shuffle)

    def split(self, name: str, *, num_shards: int, shuffle: bool) -> TokenSplit:
        labelled = self.features(name).labelled()
        if not len(labelled.tokens):
            raise InputError(
                f"dataset {labelled.name}, split {name}: no utterance has text and a label"
            )
        return self.batched(labelled, num_shards=num_shards, shuffle=shuffle)

    def _read(self, model: TextUtterance, batch: Batch, **options: Any) -> UtteranceOutput:
        return model(batch["input_ids"], batch["mask"], **options)

    def loss(
        self, model: TextUtterance, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        # A row's dropout depends on the utterance alone, not on its place in batch and parts.
        keys = DialogueKeys(jax.vmap(jax.random.fold_in, (None, 0))(key, batch["row"]))
        logits = self._read(model, batch, deterministic=False, rngs=keys).logits
        each = losses.focal_of_each(logits, batch["label"], batch["weight"] > 0, gamma=self._gamma)
        total = (each * batch["weight"]).sum()
        return total, {"focal": total}

    def evaluate(self, model: TextUtterance, batch: Batch) -> dict[str, jax.Array]:
        logits, label = self._read(model, batch).logits, batch["label"]
        labelled = label >= 0
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(labelled, label, 0)
        )
        return {
            "confusion": metrics.confusion_counts(
                label, logits.argmax(-1), labelled, len(self.class_names)
            ),
            "cross_entropy": jnp.where(labelled, cross_entropy, 0).sum(),
        }

    def predict(self, model: TextUtterance, batch: Batch) -> dict[str, jax.Array]:
        output = self._read(model, batch)
        # An axis of one utterance, as of a dialogue.
        return {
            "probabilities": jax.nn.softmax(output.logits)[:, None],  # B 1 C
            "feature": output.feature[:, None],  # B 1 F
        }
