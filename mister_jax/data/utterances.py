"""Single utterances, each alone: what encoders are trained on and read.

Here is what texts (`tokens`) and recordings (`clips`) have in common.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from mister_jax.data.batching import BatchPlan
from mister_jax.data.dialogues import DialogueDataset, StoredUtterance
from mister_jax.data.schema import UNLABELED, fingerprint

Fields = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Utterances:
    """The utterances of a split that have a modality, in the order of the dataset.

    Attributes:
        name: of the dataset.
        split: of it.
        class_names: emotions.
        dialogue_ids: N ids, of the dialogue each utterance is in.
        utterance_ids: [N] str.
        items: N arrays, none empty: token ids [n] int32, or samples [s] int16, `SAMPLE_RATE` a
            second.
        label: [N] int32, `UNLABELED` or a class.
        score: [N] float32, or None for a dataset without scores.
        metadata: of the split.
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

    @property
    def lengths(self) -> np.ndarray:
        """[N] ones: each utterance stands alone, as in a dialogue of its own."""
        return np.ones(len(self.items), int)

    @property
    def offsets(self) -> np.ndarray:
        """[N + 1], as in `DialogueFeatures`."""
        return np.arange(len(self.items) + 1)

    @property
    def sizes(self) -> np.ndarray:
        """[N] int, tokens or samples of each."""
        return np.array([len(item) for item in self.items], int)

    def take(self, rows: np.ndarray) -> "Utterances":
        """The utterances of these rows."""
        return dataclasses.replace(
            self,
            dialogue_ids=tuple(self.dialogue_ids[row] for row in rows),
            utterance_ids=self.utterance_ids[rows],
            items=tuple(self.items[row] for row in rows),
            label=self.label[rows],
            score=None if self.score is None else self.score[rows],
        )

    def fingerprint(self) -> str:
        """Of all that a training reads: other tokens or samples have another."""
        return fingerprint(
            self.class_names, self.dialogue_ids, self.utterance_ids, self.label, *self.items
        )

    def labeled(self) -> "Utterances":
        """Those with a label."""
        return self.take(np.flatnonzero(self.label != UNLABELED))


def load_utterances(
    name: str,
    split: str,
    data_dir: epath.PathLike | None,
    item: Callable[[StoredUtterance], Any],
) -> Utterances:
    """Reads a split of a dataset of dialogues.

    Args:
        name: of the dataset.
        split: of it.
        data_dir: the directory that holds datasets; that of TFDS when None.
        item: what is kept of an utterance, None to leave it out.

    Raises:
        InputError: there is no such dataset or split.
    """
    dataset = DialogueDataset(name, data_dir)
    # Not the turns themselves: they would keep a split's recordings in memory.
    rows = [
        (dialogue.id, turn.id, kept, turn.label, turn.score)
        for dialogue in dataset.dialogues(split)
        for turn in dialogue.utterances
        if (kept := item(turn)) is not None
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
    fields: Callable[[np.ndarray, int], Fields],
    *,
    seed: int,
    epoch: int,
    start_step: int = 0,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Fields]:
    """Makes the batches of one epoch, each process its share of the rows.

    Args:
        utterances: the split.
        plan: made from their lengths.
        fields: of the items of rows [B], -1 for an empty one, padded to a length of the plan's.
        seed: of the shuffle, with `epoch`.
        epoch: counts from 0.
        start_step: batches to leave out at the start.
        shuffle: for training; see `BatchPlan.epoch`.
        process_index: of this process.
        process_count: divides `plan.multiple_of`.

    Returns:
        An iterator over dicts with these fields and

        - `label` [B] int32, -1 where unlabeled
        - `weight` [B] float32: of a labeled row 1 over their number in the global batch, else 0
        - `row` [B] int32, the index of the utterance, -1 for an empty row
    """
    planned = plan.epoch(seed, epoch, shuffle=shuffle)

    def batch(all_rows: np.ndarray, length: int) -> Fields:
        counted = (all_rows >= 0) & (utterances.label[all_rows] != UNLABELED)
        share = 1 / max(1, counted.sum())
        rows = np.split(all_rows, process_count)[process_index]
        label = np.where(rows >= 0, utterances.label[rows], UNLABELED).astype(np.int32)
        return {
            **fields(rows, length),
            "label": label,
            "weight": np.where(label != UNLABELED, share, 0).astype(np.float32),
            "row": rows,
        }

    return (batch(rows, length) for rows, length in planned[start_step:])
