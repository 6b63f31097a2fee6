"""Task interface, and the batched splits that the training loop reads."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax import losses, metrics
from mister_jax.data.batching import BatchPlan
from mister_jax.parallel.partitioning import Partitioner
from mister_jax.parallel.sharding import ShardingRules

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Split:
    """Batches of a dataset split; a batch depends only on the seed, epoch, step and process.

    Attributes:
      data: Dialogue features or utterances of the split, with a `fingerprint` method.
      plan: Batch plan.
      make_batches: Function that yields the batches of an epoch from `start_step` on, with the
        keyword arguments `seed`, `epoch`, `start_step`, `shuffle`, `process_index` and
        `process_count`.
      seed: Shuffle seed.
      shuffle: Whether each epoch has a different order.
    """

    data: Any
    plan: BatchPlan
    make_batches: Callable[..., Iterator[dict[str, np.ndarray]]]
    seed: int
    shuffle: bool

    @property
    def steps(self) -> int:
        """Number of batches in an epoch."""
        return self.plan.steps_per_epoch

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Distinct shapes (rows, padded length) of the global batches."""
        return self.plan.shapes

    def shapes_by_first_use(self, epoch: int, start_step: int) -> list[tuple[int, int]]:
        """Returns `shapes` in the order of their first use from `start_step` on."""
        planned = self.plan.epoch(self.seed, epoch, shuffle=self.shuffle)[start_step:]
        used = [(len(rows), length) for rows, length in planned]
        return list(dict.fromkeys([*used, *self.shapes]))

    def fingerprint(self) -> str:
        """Returns a hash of the split's content."""
        return self.data.fingerprint()

    def batches(
        self, epoch: int = 0, start_step: int = 0, num_epochs: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns this process's rows of each batch of one or several consecutive epochs.

        Args:
          epoch: Index of the first epoch.
          start_step: Number of batches to skip in the first epoch.
          num_epochs: Number of epochs.
        """
        first = self._batches(epoch, start_step, self.shuffle)
        later = (self._batches(epoch + index, 0, self.shuffle) for index in range(1, num_epochs))
        return itertools.chain(first, itertools.chain.from_iterable(later))

    def example_batch(self, shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """Returns this process's rows of a batch with the given shape, for compilation."""
        planned = self.plan.epoch(0, 0, shuffle=False)
        step = [(len(rows), length) for rows, length in planned].index(shape)
        return next(self._batches(0, step, shuffle=False))

    def _batches(
        self, epoch: int, start_step: int, shuffle: bool, **options: Any
    ) -> Iterator[dict[str, np.ndarray]]:
        return self.make_batches(
            seed=self.seed,
            epoch=epoch,
            start_step=start_step,
            shuffle=shuffle,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **options,
        )


class Task(Protocol):
    """Connects the config, the data and a model for one kind of training.

    Attributes:
      class_names: Names of the C classes.
      predicts_score: Whether the model predicts a score for each utterance in addition to its
        class.
      notes: Messages to the user about choices made from the data.
      oom_hint: Suggestion for reducing the memory use of training, as a noun phrase.
    """

    class_names: tuple[str, ...]
    predicts_score: bool
    notes: tuple[str, ...]
    oom_hint: str

    def description(self) -> dict[str, Any]:
        """Returns the JSON values that `restore` needs in addition to the config."""

    def features(self, split: str, name: str | None = None) -> Any:
        """Loads a split of the dataset `name`, by default the config's dataset.

        Raises:
          InputError: The dataset does not exist, or does not match the model.
        """

    def split(self, name: str, *, num_shards: int, shuffle: bool, epochs: int) -> Split:
        """Loads a split's labeled items in batches for training or validation.

        Args:
          name: "train" or "validation".
          num_shards: Number of shards, which divides the number of rows in every batch.
          shuffle: Whether to shuffle. Shuffled batches have the same items for any `num_shards`.
          epochs: Number of epochs for which the batches are planned.
        """

    @property
    def trainable(self) -> Any:
        """NNX filter for the trained parameters. Checkpoints contain only these parameters."""

    @property
    def sharding_rules(self) -> ShardingRules:
        """Sharding rules for the parameters; see `sharding.shardings`."""

    def init(self, key: jax.Array) -> nnx.Module:
        """Returns the model with initial parameters.

        JAX can trace this method, because it reads no files.
        """

    def load(self, key: jax.Array, partitioner: Partitioner) -> nnx.Module:
        """Returns the model before the first training step, with pretrained weights if any."""

    def loss(
        self, model: Any, batch: Batch, key: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns this device's share of the batch's loss and of each loss term."""

    def eval_sums(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns `classification_sums` over this device's rows of a batch.

        A task that predicts scores adds "score_error", the summed absolute error, and "scored", the
        number of utterances with a score.
        """

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns the predictions for each utterance in a batch."""

    def shares_steps_with(self, other: Task) -> bool:
        """Returns whether this task and `other` differ only in `constants`.

        Their training steps, evaluation steps and predictions are then the same programs.
        """

    def constants(self) -> dict[str, Any]:
        """Returns the arrays that depend on the data and are used by the model or the loss."""

    def with_constants(self, constants: Mapping[str, Any]) -> Task:
        """Returns a copy of the task with other `constants`, which may be traced arrays."""


def classification_sums(
    logits: jax.Array, label: jax.Array, mask: jax.Array, num_classes: int
) -> dict[str, jax.Array]:
    """Sums confusion counts and cross-entropy, from which validation scores are computed.

    Args:
      logits: Class logits, [..., C].
      label: Class of each utterance, [...] int; negative if unlabeled.
      mask: Valid utterances, [...] bool.
      num_classes: Number of classes C.

    Returns:
      "confusion" (counts, [C, C], with labels as rows) and "cross_entropy" (summed over labeled
      utterances).
    """
    labeled = mask & (label >= 0)
    return {
        "confusion": metrics.confusion_counts(label, logits.argmax(-1), mask, num_classes),
        "cross_entropy": jnp.where(labeled, losses.cross_entropy(logits, label), 0).sum(),
    }


def split_params(model: nnx.Module, trainable: Any) -> tuple[Any, Any, Any]:
    """Splits a module into its graph definition, trained parameters and other arrays.

    `nnx.merge` combines the three parts into the module again.

    Args:
      model: Module with arrays or shapes.
      trainable: NNX filter for the trained parameters.
    """
    graph, state = nnx.split(model)
    params, frozen = nnx.split_state(state, trainable, ...)
    return graph, nnx.as_pure(params), nnx.as_pure(frozen)
