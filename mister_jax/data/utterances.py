"""Loads single utterances without their dialogues, and makes batches of utterances for encoders.

`clips` contains the functions that are specific to speech.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from mister_jax.data.batching import BatchPlan
from mister_jax.data.dialogues import DialogueDataset, StoredUtterance
from mister_jax.data.padding import pad_tokens
from mister_jax.data.schema import UNLABELED, fingerprint

Batch = dict[str, np.ndarray]

Encode = Callable[[Sequence[str]], list[np.ndarray]]
"""Function that returns the token ids [n] int32 of each text."""


@dataclasses.dataclass(frozen=True, eq=False)
class Utterances:
    """The N utterances of a split that have a certain modality, in stored order.

    Attributes:
        dialogue_ids: Dialogue id of each utterance.
        utterance_ids: Ids of the utterances, [N] str.
        items: N nonempty arrays: token ids [n] int32, or samples [s] int16 at `SAMPLE_RATE`.
        label: Index of the class or `UNLABELED`, [N] int32.
        score: Sentiment scores, [N] float32; None for a dataset without scores.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    dialogue_ids: tuple[str, ...]
    utterance_ids: np.ndarray
    items: tuple[Any, ...]
    label: np.ndarray
    score: np.ndarray | None = None
    metadata: dict = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Lengths [N] of dialogues with one utterance each: all 1. See `DialogueFeatures`."""
        return np.ones(len(self.items), int)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Offsets [N + 1] of dialogues with one utterance each: 0 to N. See `DialogueFeatures`."""
        return np.arange(len(self.items) + 1)

    @property
    def sizes(self) -> np.ndarray:
        """Number of tokens or samples in each utterance, [N] int."""
        return np.array([len(item) for item in self.items], int)

    def take(self, rows: np.ndarray) -> "Utterances":
        """Selects utterances by row."""
        return dataclasses.replace(
            self,
            dialogue_ids=tuple(self.dialogue_ids[row] for row in rows),
            utterance_ids=self.utterance_ids[rows],
            items=tuple(self.items[row] for row in rows),
            label=self.label[rows],
            score=None if self.score is None else self.score[rows],
        )

    def fingerprint(self) -> str:
        """Returns a hash of everything that training reads."""
        return fingerprint(
            self.class_names, self.dialogue_ids, self.utterance_ids, self.label, *self.items
        )

    def labeled(self) -> "Utterances":
        """Returns the utterances that have a label."""
        return self.take(np.flatnonzero(self.label != UNLABELED))


def load_utterances(
    name: str,
    split: str,
    data_dir: epath.PathLike | None,
    item: Callable[[StoredUtterance], Any],
) -> Utterances:
    """Loads a split's utterances from a dialogue dataset.

    Utterances for which `item` returns None are skipped.

    Raises:
        InputError: The dataset or split does not exist.
    """
    dataset = DialogueDataset(name, data_dir)
    # Keep only some fields, because the stored utterances contain all recordings of the split.
    rows = [
        (dialogue.id, turn.id, value, turn.label, turn.score)
        for dialogue in dataset.dialogues(split)
        for turn in dialogue.utterances
        if (value := item(turn)) is not None
    ]
    dialogue_ids, utterance_ids, items, labels, scores = (
        zip(*rows, strict=True) if rows else [()] * 5
    )
    return Utterances(
        name=name,
        split=split,
        class_names=dataset.class_names,
        dialogue_ids=dialogue_ids,
        utterance_ids=np.array(utterance_ids, str),
        items=items,
        label=np.array(labels, np.int32),
        score=np.array(scores, np.float32) if dataset.scored else None,
        metadata=dataset.split_metadata(split),
    )


def utterance_batches(
    utterances: Utterances,
    plan: BatchPlan,
    pad_items: Callable[[list[np.ndarray], int], tuple[np.ndarray, np.ndarray]],
    fields: tuple[str, str],
    *,
    seed: int,
    epoch: int,
    start_step: int = 0,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Returns an iterator over the batches of one epoch. Each process gets its share of the rows.

    `pad_items` pads B items to a given length and returns two arrays, which `fields` names. An
    empty row, which fills up a batch, has an empty item. For other options, see `pipeline.batches`.

    Returns:
        An iterator over dicts with the arrays of `pad_items` and these entries:

        - `label` [B] int32, -1 if unlabeled
        - `weight` [B] float32: 1 / (number of labeled rows in the global batch) for a labeled row,
          0 for other rows
        - `row` [B] int32, index of the utterance, -1 for an empty row
    """
    planned = plan.epoch(seed, epoch, shuffle=shuffle)
    empty = utterances.items[0][:0]

    def make_batch(global_rows: np.ndarray, padded_length: int) -> Batch:
        is_labeled = (global_rows >= 0) & (utterances.label[global_rows] != UNLABELED)
        weight = 1 / max(1, is_labeled.sum())
        rows = np.split(global_rows, process_count)[process_index]
        label = np.where(rows >= 0, utterances.label[rows], UNLABELED).astype(np.int32)
        items = [utterances.items[row] if row >= 0 else empty for row in rows]
        return {
            **dict(zip(fields, pad_items(items, padded_length), strict=True)),
            "label": label,
            "weight": np.where(label != UNLABELED, weight, 0).astype(np.float32),
            "row": rows,
        }

    return (make_batch(rows, padded_length) for rows, padded_length in planned[start_step:])


def load_tokens(
    name: str, split: str, data_dir: epath.PathLike | None, encode: Encode
) -> Utterances:
    """Loads the utterances that have text from a split of a dialogue dataset, and tokenizes them.

    Raises:
        InputError: The dataset or split does not exist.
    """
    utterances = load_utterances(
        name, split, data_dir, lambda turn: turn.text if turn.text_present else None
    )
    return dataclasses.replace(utterances, items=tuple(encode(utterances.items)))


def token_batches(tokens: Utterances, plan: BatchPlan, **options: Any) -> Iterator[Batch]:
    """Returns an iterator over the batches of one epoch.

    `plan` must be made for `tokens.sizes`. `options` are passed to `utterance_batches`.

    Returns:
        An iterator over the dicts that `utterance_batches` returns, with these additional entries:

        - `input_ids` [B, N] int32, zero in padding
        - `mask` [B, N] bool
    """
    return utterance_batches(tokens, plan, pad_tokens, ("input_ids", "mask"), **options)
