"""From texts to the tokens that text encoders read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from mister_jax.errors import InputError


def encode_texts(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Token ids of texts, no prompt before them.

    The tokenizer adds what its model expects around a sentence. Where that has no end, as with
    decoders, its end-of-text token is added: the last token sees all of the others.

    Args:
      tokenizer: of transformers.
      texts: none empty.
      max_tokens: longer texts lose their end; how many did is logged.

    Returns:
      Arrays [n] int32, 1 <= n <= `max_tokens`.

    Raises:
      InputError: `max_tokens` leaves no room for text.
    """
    if max_tokens < 3:
        raise InputError(f"max_tokens={max_tokens}; allowed: 3 or more, two may be special")
    if not texts:
        return []
    end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else None
    limit = max_tokens if end is None else max_tokens - 1
    encoded = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    whole = sum(len(ids) > limit for ids in encoded)
    if whole:
        logging.warning("%d of %d texts cut at %d tokens", whole, len(texts), max_tokens)
        encoded = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    arrays = []
    for ids in encoded:
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        arrays.append(np.asarray(ids, np.int32))
    return arrays
