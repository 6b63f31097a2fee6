"""Batches of dialogues: lengths into buckets, dialogues into batches, batches into arrays.

A batch is a pure function of the features, the plan, and (seed, epoch, step, process): a run that
is stopped and resumed, or spread over more processes, sees the same ones.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mister_jax.data.lazy import tf
from mister_jax.data.schema import UNLABELED, DialogueFeatures

DEFAULT_NUM_BUCKETS = 7

Item = TypeVar("Item")
Result = TypeVar("Result")

_BATCH_DTYPES = {
    "speech": np.float32,
    "text": np.float32,
    "mask": np.bool_,
    "speech_present": np.bool_,
    "text_present": np.bool_,
    "label": np.int32,
    "row": np.int32,
}


def length_buckets(
    lengths: np.ndarray, num_buckets: int, *, batch_size: int = 1, multiple_of: int = 1
) -> tuple[int, ...]:
    """Finds the bucket boundaries with the fewest padded positions.

    A dialogue goes into the first bucket that is long enough and is padded to its boundary. The
    minimum is exact, by dynamic programming over the distinct lengths, and counts the empty rows
    that fill up batches.

    Args:
        lengths: [M] int, all at least 1.
        num_buckets: most buckets, at least 1. Fewer are made when more would not save positions.
        batch_size: as in `BatchPlan`.
        multiple_of: as in `BatchPlan`.

    Returns:
        The boundaries, ascending; the last is the greatest length.

    Raises:
        ValueError: no lengths, or an argument below 1.
    """
    if len(lengths) == 0 or np.min(lengths) < 1:
        raise ValueError(f"{len(lengths)} lengths; needed: one or more, all at least 1")
    if min(num_buckets, batch_size, multiple_of) < 1:
        raise ValueError(f"{num_buckets=}, {batch_size=}, {multiple_of=}; all are at least 1")
    values, counts = np.unique(lengths, return_counts=True)  # [V]
    shorter = np.concatenate([[0], np.cumsum(counts)])  # [V + 1] dialogues shorter than value v

    # positions[i, j]: taken by one bucket that holds the values i to j - 1.
    num_batches, num_rows = _batches_and_rows(shorter - shorter[:, None], batch_size, multiple_of)
    positions = np.concatenate([[0], values]) * (num_batches * num_rows).astype(float)
    positions[np.tril_indices(len(positions))] = np.inf
    best = np.full(len(positions), np.inf)  # best[j]: positions of the values below j
    best[0] = 0
    starts, totals = [], []
    for _ in range(min(num_buckets, len(values))):
        candidates = best[:, None] + positions
        starts.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
        totals.append(best[-1])

    boundaries = []
    end = len(values)
    for start in reversed(starts[: int(np.argmin(totals)) + 1]):
        boundaries.append(int(values[end - 1]))
        end = start[end]
    return tuple(reversed(boundaries))


class PlannedBatch(NamedTuple):
    """The dialogues of one global batch and the length they are padded to."""

    rows: np.ndarray
    """[B] int32, indices of dialogues in the split, -1 for an empty row."""

    num_utterances: int
    """T, the padded length."""


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlan:
    """Which dialogues share a batch, for every epoch.

    The dialogues of a bucket are spread evenly over the fewest batches that hold them, so there
    is no small batch at the end. All batches of a bucket have one shape, with an empty row where
    the dialogues do not divide evenly, so a training compiles as many programs as it has buckets.

    `multiple_of` adds empty rows and moves no dialogue, so a training takes the same steps on any
    number of devices.

    Attributes:
        lengths: [M] int, the utterances of each dialogue.
        batch_size: most dialogues in a global batch.
        num_buckets: most padded lengths.
        multiple_of: each batch is filled up with empty rows to a multiple of this, the number of
            devices.
        fitted_to: the buckets are those that pad the least where `multiple_of` is this. The number
            of devices where it does not matter which dialogues share a batch, as in an evaluation.

    Raises:
        ValueError: no lengths, or an argument below 1.
    """

    lengths: np.ndarray
    batch_size: int
    num_buckets: int = DEFAULT_NUM_BUCKETS
    multiple_of: int = 1
    fitted_to: int = 1

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of {self.multiple_of}; at least 1")
        # A plan that cannot be made fails here, not in the first epoch.
        _ = self.boundaries

    @functools.cached_property
    def boundaries(self) -> tuple[int, ...]:
        """The padded lengths, ascending."""
        return length_buckets(
            self.lengths,
            self.num_buckets,
            batch_size=self.batch_size,
            multiple_of=self.fitted_to,
        )

    @functools.cached_property
    def _buckets(self) -> list[np.ndarray]:
        bucket = np.searchsorted(self.boundaries, self.lengths)
        return [np.flatnonzero(bucket == index) for index in range(len(self.boundaries))]

    def epoch(self, seed: int, epoch: int, *, shuffle: bool = True) -> list[PlannedBatch]:
        """Plans the batches of one epoch; each dialogue is in exactly one.

        Args:
            seed: at least 0.
            epoch: at least 0.
            shuffle: permute the dialogues within buckets, and the batches. Without it the plan
                is the same in every epoch and goes from short to long.
        """
        generator = np.random.default_rng([seed, epoch])
        planned = []
        for num_utterances, members in zip(self.boundaries, self._buckets, strict=True):
            if shuffle:
                members = generator.permutation(members)
            num_batches, num_rows = _batches_and_rows(
                len(members), self.batch_size, self.multiple_of
            )
            for chunk in np.array_split(members, num_batches):
                rows = np.full(num_rows, -1, np.int32)
                rows[: len(chunk)] = chunk
                planned.append(PlannedBatch(rows, num_utterances))
        if shuffle:
            planned = [planned[index] for index in generator.permutation(len(planned))]
        return planned

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The distinct (B, T) of an epoch, ascending."""
        return tuple(sorted({(len(rows), length) for rows, length in self._fixed_epoch}))

    @property
    def steps_per_epoch(self) -> int:
        return len(self._fixed_epoch)

    @property
    def padding_share(self) -> float:
        """Positions without an utterance, those of empty rows too, over all positions."""
        positions = sum(len(rows) * length for rows, length in self._fixed_epoch)
        return 1 - int(self.lengths.sum()) / positions

    @functools.cached_property
    def _fixed_epoch(self) -> list[PlannedBatch]:
        return self.epoch(0, 0, shuffle=False)


def batches(
    features: DialogueFeatures,
    plan: BatchPlan,
    *,
    seed: int,
    epoch: int,
    start_step: int = 0,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Makes the batches of one epoch.

    Each process gets its contiguous share of the rows of every global batch, at the same T. B and T
    differ between batches and take the values of `plan.shapes`.

    Args:
        features: the split.
        plan: made from `features.lengths`.
        seed: of the shuffle, with `epoch`.
        epoch: counts from 0.
        start_step: batches to leave out at the start; they cost nothing.
        shuffle: see `BatchPlan.epoch`.
        process_index: of this process.
        process_count: divides `plan.multiple_of`.
        prefetch: batches made ahead of their use.

    Returns:
        An iterator over dicts. Padding is zero, false or -1.

        - `speech` [B, T, Ds] float32
        - `text` [B, T, Dt] float32
        - `mask` [B, T] bool, true for an utterance
        - `speech_present` [B, T] bool
        - `text_present` [B, T] bool
        - `label` [B, T] int32, -1 where unlabeled
        - `row` [B] int32, the index of the dialogue in the split, -1 for an empty row

    Raises:
        ValueError: the plan is for other dialogues, rows cannot be shared out evenly, or
            `start_step` is past the end.
    """
    if not np.array_equal(plan.lengths, features.lengths):
        raise ValueError("the plan was made from other dialogue lengths than those of features")
    if plan.multiple_of % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"process {process_index} of {process_count}; rows come in multiples of "
            f"{plan.multiple_of}"
        )
    planned = plan.epoch(seed, epoch, shuffle=shuffle)
    if not 0 <= start_step <= len(planned):
        raise ValueError(f"start_step {start_step}, allowed: 0 to {len(planned)}")
    offsets = features.offsets

    def gather(step: np.int64) -> list[np.ndarray]:
        rows, num_utterances = planned[step]
        rows = np.split(rows, process_count)[process_index]
        batch = padded_batch(features, offsets, rows, num_utterances)
        return [batch[field] for field in _BATCH_DTYPES]

    def read(step: "tf.Tensor") -> dict[str, "tf.Tensor"]:
        arrays = tf.numpy_function(gather, [step], list(_BATCH_DTYPES.values()), stateful=False)
        return dict(zip(_BATCH_DTYPES, arrays, strict=True))

    dataset = tf.data.Dataset.range(start_step, len(planned))
    dataset = dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return iter(dataset.prefetch(prefetch).as_numpy_iterator())


def prefetch_to_device(
    iterator: Iterable[Item], put: Callable[[Item], Result], size: int = 2
) -> Iterator[Result]:
    """Puts items on their devices ahead of use, so that transfers overlap with computation.

    Args:
        iterator: batches on the host.
        put: starts a transfer and returns at once, such as `jax.device_put`.
        size: items put ahead, at least 1.
    """
    waiting: collections.deque[Result] = collections.deque()
    for item in iterator:
        waiting.append(put(item))
        if len(waiting) > size:
            yield waiting.popleft()
    yield from waiting


def padded_batch(
    features: DialogueFeatures, offsets: np.ndarray, rows: np.ndarray, num_utterances: int
) -> dict[str, np.ndarray]:
    """The batch of the dialogues `rows` [B], padded to `num_utterances`; see `batches`."""
    lengths = np.where(rows >= 0, features.lengths[rows], 0)  # [B]
    places = np.arange(num_utterances)
    mask = places < lengths[:, None]  # [B, T]
    utterances = (offsets[rows][:, None] + places)[mask]  # the rows of the flat arrays

    def padded(values: np.ndarray, field: str, fill: int = 0) -> np.ndarray:
        array: np.ndarray = np.full(mask.shape + values.shape[1:], fill, _BATCH_DTYPES[field])
        array[mask] = values[utterances]
        return array

    return {
        "speech": padded(features.speech, "speech"),
        "text": padded(features.text, "text"),
        "mask": mask,
        "speech_present": padded(features.speech_present, "speech_present"),
        "text_present": padded(features.text_present, "text_present"),
        "label": padded(features.label, "label", UNLABELED),
        "row": rows,
    }


def _batches_and_rows(dialogues: Any, batch_size: int, multiple_of: int) -> tuple[Any, Any]:
    """The batches that a bucket of so many dialogues is spread over, and the rows of each."""
    num_batches = np.maximum(_ceil_div(dialogues, batch_size), 1)
    return num_batches, _ceil_div(_ceil_div(dialogues, num_batches), multiple_of) * multiple_of


def _ceil_div(value: Any, divisor: int) -> Any:
    return -(-value // divisor)
