"""Single utterances as token sequences, the input of text encoders, and their batches."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from mister_jax.data.batching import BatchPlan
from mister_jax.data.utterances import Batch, Utterances, load_utterances, utterance_batches

Encode = Callable[[Sequence[str]], list[np.ndarray]]
"""Function that maps texts to the token ids [n] int32 of each."""


def load_tokens(
    name: str, split: str, data_dir: epath.PathLike | None, encode: Encode
) -> Utterances:
    """Loads the utterances with text of a split of a dialogue dataset, and tokenizes them.

    Raises:
        InputError: The dataset or split does not exist.
    """
    utterances = load_utterances(
        name, split, data_dir, lambda turn: turn.text if turn.text_present else None
    )
    return dataclasses.replace(utterances, items=tuple(encode(utterances.items)))


def pad_tokens(tokens: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids [B, N] int32, zero-padded on the right, and their mask [B, N] bool."""
    ids = np.zeros((len(tokens), length), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = True
    return ids, mask


def token_batches(tokens: Utterances, plan: BatchPlan, **options: Any) -> Iterator[Batch]:
    """Returns the batches of one epoch; the plan is for `tokens.sizes`.

    Returns:
        An iterator over dicts with the arrays of `utterance_batches`, which has the other options,
        and

        - `input_ids` [B, N] int32, zero in padding
        - `mask` [B, N] bool
    """
    return utterance_batches(tokens, plan, pad_tokens, ("input_ids", "mask"), **options)
