"""Single utterances as token sequences, and their batches: what text encoders read."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from mister_jax.data.batching import BatchPlan
from mister_jax.data.utterances import Fields, Utterances, load_utterances, utterance_batches

Encode = Callable[[Sequence[str]], list[np.ndarray]]
"""From texts to token ids [n] int32 of each."""


def load_tokens(
    name: str, split: str, data_dir: epath.PathLike | None, encode: Encode
) -> Utterances:
    """Reads a split of a dataset of dialogues and encodes its texts.

    Raises:
        InputError: there is no such dataset or split.
    """
    found = load_utterances(
        name, split, data_dir, lambda turn: turn.text if turn.text_present else None
    )
    return dataclasses.replace(found, items=tuple(encode(found.items)))


def pad_tokens(tokens: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, N] int32, zero in padding on the right, and what is valid [B, N] bool."""
    ids = np.zeros((len(tokens), length), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = True
    return ids, mask


def token_batches(tokens: Utterances, plan: BatchPlan, **options: Any) -> Iterator[Fields]:
    """Makes the batches of one epoch.

    Args:
        tokens: the split.
        plan: made from `tokens.sizes`.
        **options: of `utterance_batches`.

    Returns:
        An iterator over dicts, of `utterance_batches` with

        - `input_ids` [B, N] int32, zero in padding
        - `mask` [B, N] bool
    """
    nothing = np.zeros(0, np.int32)

    def fields(rows: np.ndarray, length: int) -> Fields:
        ids, mask = pad_tokens([tokens.items[row] if row >= 0 else nothing for row in rows], length)
        return {"input_ids": ids, "mask": mask}

    return utterance_batches(tokens, plan, fields, **options)
