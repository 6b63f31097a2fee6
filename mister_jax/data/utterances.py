"""Single utterances as token sequences, and their batches: what text encoders are trained on."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath

from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.pipeline import BatchPlan
from mister_jax.data.schema import UNLABELLED

Encode = Callable[[Sequence[str]], list[np.ndarray]]
"""From texts to token ids [n] int32 of each."""


@dataclasses.dataclass(frozen=True, eq=False)
class UtteranceTokens:
    """The utterances of a split that have text, in the order of the dataset.

    Attributes:
        name: of the dataset.
        split: of it.
        class_names: emotions.
        dialogue_ids: N ids, of the dialogue each utterance is in.
        utterance_ids: [N] str.
        tokens: N arrays of token ids [n] int32, none empty.
        label: [N] int32, `UNLABELLED` or a class.
        score: [N] float32, or None for a dataset without scores.
        metadata: of the dataset.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    dialogue_ids: tuple[str, ...]
    utterance_ids: np.ndarray
    tokens: tuple[np.ndarray, ...]
    label: np.ndarray
    score: np.ndarray | None = None
    metadata: dict = dataclasses.field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """[N] ones: each utterance stands alone, as in a dialogue of its own."""
        return np.ones(len(self.tokens), int)

    @property
    def offsets(self) -> np.ndarray:
        """[N + 1], as in `DialogueFeatures`."""
        return np.arange(len(self.tokens) + 1)

    @property
    def token_counts(self) -> np.ndarray:
        """[N] int."""
        return np.array([len(tokens) for tokens in self.tokens])

    def take(self, rows: np.ndarray) -> "UtteranceTokens":
        """The utterances of these rows."""
        return dataclasses.replace(
            self,
            dialogue_ids=tuple(self.dialogue_ids[row] for row in rows),
            utterance_ids=self.utterance_ids[rows],
            tokens=tuple(self.tokens[row] for row in rows),
            label=self.label[rows],
            score=None if self.score is None else self.score[rows],
        )

    def labelled(self) -> "UtteranceTokens":
        """Those with a label."""
        return self.take(np.flatnonzero(self.label != UNLABELLED))


def load_tokens(
    name: str, split: str, data_dir: epath.PathLike | None, encode: Encode
) -> UtteranceTokens:
    """Reads a split of a dataset of dialogues and encodes its texts.

    Raises:
        InputError: there is no such dataset or split.
    """
    dataset = DialogueDataset(name, data_dir)
    # Not the turns themselves: they would keep a split's recordings in memory.
    rows = [
        (dialogue.id, turn.id, turn.text, turn.label, turn.score)
        for dialogue in dataset.dialogues(split)
        for turn in dialogue.utterances
        if turn.text_present
    ]
    dialogue_ids, utterance_ids, texts, labels, scores = (
        zip(*rows, strict=True) if rows else [()] * 5
    )
    return UtteranceTokens(
        name=name,
        split=split,
        class_names=dataset.class_names,
        dialogue_ids=dialogue_ids,
        utterance_ids=np.array(utterance_ids, str),
        tokens=tuple(encode(texts)),
        label=np.array(labels, np.int32),
        score=np.array(scores, np.float32) if dataset.scored else None,
    )


def pad_tokens(tokens: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, N] int32, zero in padding on the right, and what is valid [B, N] bool."""
    ids = np.zeros((len(tokens), length), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = True
    return ids, mask


def token_batches(
    utterances: UtteranceTokens,
    plan: BatchPlan,
    *,
    seed: int,
    epoch: int,
    start_step: int = 0,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Makes the batches of one epoch, each process its share of the rows.

    Args:
        utterances: the split.
        plan: made from `utterances.token_counts`.
        seed: of the shuffle, with `epoch`.
        epoch: counts from 0.
        start_step: batches to leave out at the start.
        shuffle: see `BatchPlan.epoch`.
        process_index: of this process.
        process_count: divides `plan.multiple_of`.

    Returns:
        An iterator over dicts.

        - `input_ids` [B, N] int32, zero in padding
        - `mask` [B, N] bool
        - `label` [B] int32, -1 where unlabelled
        - `weight` [B] float32: of a labelled row 1 over their number in the global batch, else 0
        - `row` [B] int32, the index of the utterance, -1 for an empty row
    """
    planned = plan.epoch(seed, epoch, shuffle=shuffle)
    nothing = np.zeros(0, np.int32)

    def batch(all_rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        counted = (all_rows >= 0) & (utterances.label[all_rows] != UNLABELLED)
        share = 1 / max(1, counted.sum())
        rows = np.split(all_rows, process_count)[process_index]
        there = rows >= 0
        ids, mask = pad_tokens(
            [utterances.tokens[row] if row >= 0 else nothing for row in rows], length
        )
        label = np.where(there, utterances.label[rows], UNLABELLED).astype(np.int32)
        return {
            "input_ids": ids,
            "mask": mask,
            "label": label,
            "weight": np.where(label != UNLABELLED, share, 0).astype(np.float32),
            "row": rows,
        }

    return (batch(rows, length) for rows, length in planned[start_step:])
