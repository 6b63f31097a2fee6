"""Plans batches: which items share a batch, and the padded length of each batch.

- `BatchPlan` plans epochs of training or evaluation, with few shapes and little padding.
- `plan_inference_batches` plans the batches of a single request. It uses few shapes, so that later
  requests can reuse compiled programs.
- `plan_budgeted_batches` plans one pass of an encoder over many items of very different lengths.

An item, such as a dialogue, is a sequence. A batch of B items padded to length T has B * T
positions. The modules `pipeline` and `utterances` turn plans into padded arrays and masks.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

DEFAULT_NUM_BUCKETS = 7

_INFERENCE_BATCH_SIZE = 8
_MIN_INFERENCE_LENGTH = 8

# Compile time of a training step, divided by the training time per position and parameter. On two
# CPU cores with the model sizes of configs/fusion.py, compiling takes 5 s, and training takes
# 0.08 ms per position with 0.5 M parameters.
_STEP_COMPILE_COST = 3e10


def bucket_cost(num_params: int, epochs: int) -> float:
    """Returns how many positions per epoch another padded length must save to pay off.

    Each padded length needs a compiled training step. Compiling the step takes as long as training
    on the returned number of positions in every epoch.

    Args:
        num_params: Total number of parameters of all models that train together.
        epochs: Number of epochs.
    """
    return _STEP_COMPILE_COST / num_params / epochs


def is_short_training(num_params: int, num_positions: int) -> bool:
    """Returns whether a faster compilation saves more time than it costs in slower steps.

    With `parallel.partitioning.fast_compiler_options`, compiling a training step takes about 40%
    less time, and the steps take about 20% more time.

    Args:
        num_params: Total number of parameters of all models that train together.
        num_positions: Number of positions in the batches of all epochs, or an upper bound.
    """
    return 0.2 * num_params * num_positions < 0.4 * _STEP_COMPILE_COST


class PlannedBatch(NamedTuple):
    """The items of one global batch, and the length to which all items are padded.

    Attributes:
        rows: Indices of the items, [B] int32, -1 for an empty row.
        padded_length: Length T of all rows.
    """

    rows: np.ndarray
    padded_length: int


def length_buckets(
    lengths: np.ndarray,
    num_buckets: int,
    *,
    batch_size: int = 1,
    multiple_of: int = 1,
    bucket_cost: float = 0.0,
) -> tuple[int, ...]:
    """Finds the bucket boundaries that minimize padding.

    Each item is padded to the smallest boundary that is not below its length. Dynamic programming
    over the distinct lengths finds the exact minimum. Positions in the empty rows that fill up
    batches count as padding, too.

    Args:
        lengths: Length of each item, [M] int, at least 1.
        num_buckets: Maximum number of buckets. Fewer buckets are used if more buckets would not
            reduce padding.
        batch_size: Maximum number of items in a batch; see `BatchPlan`.
        multiple_of: Divisor of the number of rows in a batch; see `BatchPlan`.
        bucket_cost: Cost of each additional bucket, in positions. The boundaries minimize the
            number of positions, including padding, plus these costs.

    Returns:
        The boundaries in ascending order; the last is the maximum length.

    Raises:
        ValueError: There are no lengths, or a length, `num_buckets`, `batch_size` or `multiple_of`
            is below 1.
    """
    if len(lengths) == 0 or np.min(lengths) < 1:
        raise ValueError(f"{len(lengths)} lengths; needed: one or more, all at least 1")
    if min(num_buckets, batch_size, multiple_of) < 1:
        raise ValueError(f"{num_buckets=}, {batch_size=}, {multiple_of=}; all must be at least 1")
    values, counts = np.unique(lengths, return_counts=True)  # [V]
    num_shorter = np.concatenate([[0], np.cumsum(counts)])  # [V + 1] items shorter than values[v]

    # positions[i, j]: number of positions, including padding, if values[i:j] share a bucket.
    num_batches, num_rows = _batches_and_rows(
        num_shorter - num_shorter[:, None], batch_size, multiple_of
    )
    positions = np.concatenate([[0], values]) * (num_batches * num_rows).astype(float)
    positions[np.tril_indices(len(positions))] = np.inf
    # best[j]: smallest number of positions for the items with lengths in values[:j].
    best = np.full(len(positions), np.inf)
    best[0] = 0
    starts, totals = [], []
    for _ in range(min(num_buckets, len(values))):
        candidates = best[:, None] + positions
        starts.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
        totals.append(best[-1])

    boundaries = []
    end = len(values)
    costs = np.array(totals) + bucket_cost * np.arange(len(totals))
    for start in reversed(starts[: int(np.argmin(costs)) + 1]):
        boundaries.append(int(values[end - 1]))
        end = start[end]
    return tuple(reversed(boundaries))


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlan:
    """Plans the batches of each epoch.

    The items with the same padded length, a bucket, are spread evenly over as few batches as
    possible, so the last batch is not small. Empty rows fill up batches with fewer items, so all
    batches of a bucket have the same shape, and training compiles one program per bucket.

    Attributes:
        lengths: Length of each item, [M] int.
        batch_size: Maximum number of items in a global batch.
        num_buckets: Maximum number of padded lengths.
        bucket_cost: Cost of each additional padded length, in positions per epoch; see
            `length_buckets`.
        multiple_of: Divisor of the number of rows, usually the number of devices. It only adds
            empty rows.
        fitted_to: Value of `multiple_of` for which the buckets are chosen. Evaluation uses
            `multiple_of` itself. Training uses the value for one device, so that batches contain
            the same items on any number of devices.
        weights: Sampling weight of each item in shuffled epochs, [M], positive. From a bucket of n
            items, n items are drawn with replacement. By default, each item is in exactly one
            batch per epoch.
        compiled: Pairs of row count and padded length that need no compilation. The batches of a
            bucket are padded to such a shape if this adds at most `bucket_cost` positions.

    Raises:
        ValueError: There are no lengths, or a length, `batch_size`, `num_buckets`, `multiple_of` or
            `fitted_to` is below 1.
    """

    lengths: np.ndarray
    batch_size: int
    num_buckets: int = DEFAULT_NUM_BUCKETS
    bucket_cost: float = 0.0
    multiple_of: int = 1
    fitted_to: int = 1
    weights: np.ndarray | None = None
    compiled: Collection[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of {self.multiple_of}; allowed: at least 1")
        _ = self.boundaries  # Raise an error for an impossible plan here, not in the first epoch.

    @functools.cached_property
    def boundaries(self) -> tuple[int, ...]:
        """Padded lengths in ascending order."""
        return length_buckets(
            self.lengths,
            self.num_buckets,
            batch_size=self.batch_size,
            multiple_of=self.fitted_to,
            bucket_cost=self.bucket_cost,
        )

    @functools.cached_property
    def _buckets(self) -> list[np.ndarray]:
        bucket = np.searchsorted(self.boundaries, self.lengths)
        return [np.flatnonzero(bucket == index) for index in range(len(self.boundaries))]

    def epoch(self, seed: int, epoch: int, *, shuffle: bool = True) -> list[PlannedBatch]:
        """Plans the batches of one epoch.

        Args:
            seed: Seed of the shuffle, at least 0.
            epoch: Index of the epoch, from 0.
            shuffle: Whether to permute the items within each bucket and the order of the batches.
                If False, all epochs have the same plan, and batches are in order of padded length.
        """
        generator = np.random.default_rng([seed, epoch])
        planned = []
        for padded_length, members in zip(self.boundaries, self._buckets, strict=True):
            if shuffle and self.weights is not None:
                weights = self.weights[members] / self.weights[members].sum()
                members = generator.choice(members, len(members), p=weights)
            elif shuffle:
                members = generator.permutation(members)
            num_batches, num_rows = _batches_and_rows(
                len(members), self.batch_size, self.multiple_of
            )
            num_rows, padded_length = self._batch_shape(num_batches, num_rows, padded_length)
            for chunk in np.array_split(members, num_batches):
                planned.append(PlannedBatch(_fill_up(chunk, num_rows), padded_length))
        if shuffle:
            planned = [planned[index] for index in generator.permutation(len(planned))]
        return planned

    def _batch_shape(self, num_batches: int, num_rows: int, length: int) -> tuple[int, int]:
        """Returns the row count and padded length of the batches of a bucket."""
        fitting = [shape for shape in self.compiled if shape[0] >= num_rows and shape[1] >= length]
        smallest = min(fitting, key=math.prod, default=(num_rows, length))
        added_positions = num_batches * (math.prod(smallest) - num_rows * length)
        return smallest if added_positions <= self.bucket_cost else (num_rows, length)

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Distinct pairs of row count and padded length, in ascending order."""
        return tuple(sorted({(len(rows), length) for rows, length in self._unshuffled_epoch}))

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return len(self._unshuffled_epoch)

    @property
    def padding_fraction(self) -> float:
        """Fraction of the batches' positions that is padding, including empty rows."""
        positions = sum(len(rows) * length for rows, length in self._unshuffled_epoch)
        return 1 - int(self.lengths.sum()) / positions

    @functools.cached_property
    def _unshuffled_epoch(self) -> list[PlannedBatch]:
        return self.epoch(0, 0, shuffle=False)


def plan_inference_batches(lengths: np.ndarray, *, num_shards: int) -> Iterator[PlannedBatch]:
    """Plans the batches of a single request, with lengths padded to powers of 2.

    Args:
        lengths: Length of each item, [M] int, at least 1.
        num_shards: Divisor of the number of rows in each batch.
    """
    padded = np.maximum(_MIN_INFERENCE_LENGTH, 2 ** np.ceil(np.log2(lengths)).astype(int))
    for padded_length in np.unique(padded):
        members = np.flatnonzero(padded == padded_length)
        num_rows = _ceil_div(min(len(members), _INFERENCE_BATCH_SIZE), num_shards) * num_shards
        for start in range(0, len(members), num_rows):
            rows = _fill_up(members[start : start + num_rows], num_rows)
            yield PlannedBatch(rows, int(padded_length))


def plan_budgeted_batches(
    lengths: np.ndarray,
    budget: int,
    *,
    length_steps: Sequence[int],
    max_length: int,
    num_shards: int,
    program_cost: float,
    compiled: Collection[tuple[int, int]] = (),
) -> Iterator[PlannedBatch]:
    """Plans batches of bounded size for items that are sorted by length, longest first.

    Each pair of row count and padded length needs a compiled program. An additional padded length
    is used only if it saves more computation than its program costs.

    Args:
        lengths: Length of each of N >= 1 items, [N] int, descending.
        budget: Maximum number of a batch's positions on each device, including padding. An item
            that is longer than the budget is alone on its device.
        length_steps: Lengths that items can be padded to, ascending.
        max_length: Maximum length of an item. No item is padded beyond this length.
        num_shards: Divisor of the number of rows in each batch.
        program_cost: Number of positions that a device computes while one program compiles.
        compiled: Pairs of row count and padded length that need no compilation.

    Yields:
        Planned batches. All batches with the same padded length have the same number of rows,
        except for the last few batches.
    """
    steps = np.append(np.array(length_steps, int), max_length)
    rounded_lengths = np.minimum(steps[np.searchsorted(steps[:-1], lengths)], max_length)
    program_cost *= num_shards
    shapes = set(compiled)

    def full_rows(length: int) -> int:
        return max(1, budget // length) * num_shards

    boundaries = np.array(
        _budgeted_lengths(
            rounded_lengths,
            {length for rows, length in shapes if rows == full_rows(length)},
            program_cost,
        )
    )
    padded_lengths = boundaries[np.searchsorted(boundaries, rounded_lengths)]
    start = 0
    while start < len(lengths):
        padded_length = int(padded_lengths[start])
        num_rows = full_rows(padded_length)
        if start + num_rows > len(lengths):
            # The remaining items do not fill a batch. Use a compiled shape if it can hold all
            # remaining items, and costs no more than compiling and running a batch with fewer rows.
            # Otherwise, use fewer rows: a power of 2 per device, because such shapes are likely to
            # recur.
            num_items = int(np.sum(padded_lengths[start:] == padded_length))
            rows_per_shard = 1 << (_ceil_div(num_items, num_shards) - 1).bit_length()
            fewer_rows = min(num_rows, rows_per_shard * num_shards)
            cost = fewer_rows * padded_length
            if (fewer_rows, padded_length) not in shapes:
                cost += program_cost
            num_remaining = len(lengths) - start
            compiled_shapes = [
                (rows * length, rows, length)
                for rows, length in shapes
                if rows >= num_remaining and length >= padded_length
            ]
            num_rows = fewer_rows
            if compiled_shapes and min(compiled_shapes)[0] <= cost:
                _, num_rows, padded_length = min(compiled_shapes)
        end = min(start + num_rows, len(lengths))
        shapes.add((num_rows, padded_length))
        yield PlannedBatch(_fill_up(np.arange(start, end), num_rows), padded_length)
        start = end


def _budgeted_lengths(
    lengths: np.ndarray, compiled: Collection[int], program_cost: float
) -> list[int]:
    """Chooses the padded lengths that minimize the positions plus the cost of the programs.

    Args:
        lengths: Length of each item, [N] int.
        compiled: Lengths whose programs are already compiled.
        program_cost: Number of positions that can be computed while one program compiles.

    Returns:
        Padded lengths in ascending order; the last is at least the maximum of `lengths`.
    """
    values = sorted({*lengths.tolist(), *compiled})
    num_up_to = np.searchsorted(np.sort(lengths), values, side="right")
    # num_up_to[i] is the number of items that are not longer than values[i].
    # best[i] is the cost of all items up to values[i] if this is the longest padded length;
    # previous[i] is the index of the next shorter padded length, or -1.
    best, previous = np.empty(len(values)), np.empty(len(values), int)
    for index, value in enumerate(values):
        costs = np.append(best[:index], 0) + value * (
            num_up_to[index] - np.append(num_up_to[:index], 0)
        )
        choice = int(costs.argmin())
        previous[index] = choice if choice < index else -1
        best[index] = costs[choice] + (0 if value in compiled else program_cost)
    longest = int(np.searchsorted(values, lengths.max()))
    index = longest + int(best[longest:].argmin())
    chosen = []
    while index >= 0:
        chosen.append(values[index])
        index = int(previous[index])
    return chosen[::-1]


def _fill_up(members: np.ndarray, num_rows: int) -> np.ndarray:
    """Returns the members' indices followed by -1 for empty rows, [num_rows] int32."""
    rows = np.full(num_rows, -1, np.int32)
    rows[: len(members)] = members
    return rows


def _batches_and_rows(num_items: Any, batch_size: int, multiple_of: int) -> tuple[Any, Any]:
    """Returns the number of batches for a bucket, and the number of rows in each batch."""
    num_batches = np.maximum(_ceil_div(num_items, batch_size), 1)
    return num_batches, _ceil_div(_ceil_div(num_items, num_batches), multiple_of) * multiple_of


def _ceil_div(value: Any, divisor: Any) -> Any:
    return -(-value // divisor)
