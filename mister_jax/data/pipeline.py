"""Makes batches of dialogue features, with tf.data for shuffled batches.

A batch is a pure function of the features, the plan, and (seed, epoch, step, process). The global
batches do not change if a run is stopped and resumed, or uses another number of processes.
"""

import collections
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from mister_jax.data.batching import BatchPlan
from mister_jax.data.lazy import tf
from mister_jax.data.padding import BATCH_DTYPES, OPTIONAL_FIELDS, pad_dialogues
from mister_jax.data.schema import DialogueFeatures

Item = TypeVar("Item")
Result = TypeVar("Result")


def batches(
    features: DialogueFeatures,
    plan: BatchPlan,
    *,
    seed: int,
    epoch: int,
    start_step: int = 0,
    num_epochs: int = 1,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns an iterator over the batches of one or several consecutive epochs.

    The row count of a global batch and its padded length T are one of the pairs in `plan.shapes`.
    Each process gets a contiguous block of B rows from each global batch.

    Args:
        features: Features of the split.
        plan: Plan for `features.lengths`.
        seed: Seed of the shuffle, combined with `epoch`.
        epoch: Index of the first epoch, from 0.
        start_step: Number of batches to skip in the first epoch. Skipped batches are not computed.
        num_epochs: Number of epochs. Creating a tf.data pipeline takes as long as making many
            batches, so training uses one pipeline for all epochs.
        shuffle: Whether to shuffle; see `BatchPlan.epoch`. Batches that are not shuffled are made
            without tf.data, so that evaluation does not need to import TensorFlow.
        process_index: Index of this process.
        process_count: Number of processes, a divisor of `plan.multiple_of`.
        prefetch: Number of shuffled batches to prepare in advance.

    Returns:
        An iterator over dicts with these entries. Padding is zero, false, -1 or NaN; see
        `padding.PADDING`.

        - `speech` [B, T, Ds] float32
        - `text` [B, T, Dt] float32
        - `mask` [B, T] bool, true for an utterance
        - `speech_present` [B, T] bool
        - `text_present` [B, T] bool
        - `label` [B, T] int32, -1 if unlabeled
        - `row` [B] int32, index of the dialogue in the split, -1 for an empty row
        - `score` [B, T] float32, NaN if missing; only if the dataset has scores
        - `ratings` [B, T, C] float32, zeros if unknown; only if the dataset has ratings

    Raises:
        ValueError: The plan was made for other lengths, the rows do not divide evenly among the
            processes, or `start_step` is past the end.
    """
    if not np.array_equal(plan.lengths, features.lengths):
        raise ValueError("plan and features have different dialogue lengths")
    if plan.multiple_of % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"process {process_index} of {process_count}; batches have a multiple of "
            f"{plan.multiple_of} rows"
        )
    steps_per_epoch = plan.steps_per_epoch
    if not 0 <= start_step <= steps_per_epoch:
        raise ValueError(f"start_step {start_step}; allowed: 0 to {steps_per_epoch}")

    @functools.lru_cache(maxsize=2)  # 2: tf.data prefetches batches of the next epoch.
    def planned_epoch(epoch: int) -> Sequence[tuple[np.ndarray, int]]:
        return plan.epoch(seed, epoch, shuffle=shuffle)

    def make_step(step: int | np.int64) -> dict[str, np.ndarray]:
        epochs, step_in_epoch = divmod(int(step), steps_per_epoch)
        global_rows, padded_length = planned_epoch(epoch + epochs)[step_in_epoch]
        rows = np.split(global_rows, process_count)[process_index]
        return pad_dialogues(features, rows, padded_length)

    last_step = num_epochs * steps_per_epoch
    if not shuffle:
        return map(make_step, range(start_step, last_step))

    dtypes = dict(BATCH_DTYPES)
    dtypes |= {
        field: np.float32 for field in OPTIONAL_FIELDS if getattr(features, field) is not None
    }

    def make_arrays(step: np.int64) -> list[np.ndarray]:
        batch = make_step(step)
        return [batch[field] for field in dtypes]

    def make_batch(step: "tf.Tensor") -> dict[str, "tf.Tensor"]:
        arrays = tf.numpy_function(make_arrays, [step], list(dtypes.values()), stateful=False)
        return dict(zip(dtypes, arrays, strict=True))

    dataset = tf.data.Dataset.range(start_step, last_step)
    # `make_arrays` holds Python's global interpreter lock, so parallel calls would not be faster.
    dataset = dataset.map(make_batch).prefetch(prefetch)
    options = tf.data.Options()
    # There is nothing to tune, and the tuning thread sleeps for up to a minute at a time, which
    # would delay the deletion of the iterator.
    options.autotune.enabled = False
    return _DatasetIterator(dataset.with_options(options))


class _DatasetIterator(Iterator[dict[str, np.ndarray]]):
    """Iterates over a tf.data dataset, and stops its threads before Python shuts down.

    TensorFlow waits for the threads of an iterator when it deletes the iterator. While Python shuts
    down, threads can no longer call Python functions, so TensorFlow would wait forever.
    """

    def __init__(self, dataset: "tf.data.Dataset"):
        self._iterators = [dataset.as_numpy_iterator()]
        # Python calls the finalizer when this object is deleted, or before Python shuts down.
        weakref.finalize(self, self._iterators.clear)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._iterators:
            raise StopIteration
        try:
            return next(self._iterators[0])
        except BaseException as error:
            # The traceback of Ctrl-C, for example, would keep TensorFlow's iterator alive.
            raise error.with_traceback(None) from None


def prefetch_to_device(
    iterator: Iterable[Item], put: Callable[[Item], Result], size: int = 2
) -> Iterator[Result]:
    """Transfers items to devices in advance, so that transfers overlap with computation.

    `put` must start a transfer and return immediately, as `jax.device_put` does. Up to `size` items
    are transferred in advance.
    """
    on_device: collections.deque[Result] = collections.deque()
    for item in iterator:
        on_device.append(put(item))
        if len(on_device) > size:
            yield on_device.popleft()
    yield from on_device
