"""From texts to the tokens that text encoders read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from mister_jax.errors import InputError


def encode_texts(
    tokenizer: Any, texts: Sequence[str], max_tokens: int, *, where: str = ""
) -> list[np.ndarray]:
    """Token ids of texts, no prompt before them.

    The tokenizer adds what its model expects around a sentence. Where that has no end, as with
    most decoders, its end-of-text token is added: the last token sees all of the others.

    Args:
      tokenizer: of transformers.
      texts: none empty.
      max_tokens: longer texts lose their end; how many did is logged.
      where: the texts are from, for the log.

    Returns:
      Arrays [n] int32, 1 <= n <= `max_tokens`.

    Raises:
      InputError: `max_tokens` leaves no room for text, or the tokenizer finds none in one.
    """
    if max_tokens < 3:
        raise InputError(f"max_tokens={max_tokens}; allowed: 3 or more, two may be special")
    if not texts:
        return []
    around = tokenizer("")["input_ids"]
    end = []
    if tokenizer.sep_token_id is None and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id] if around[-1:] != [tokenizer.eos_token_id] else []
    limit = max_tokens - len(end)
    encoded = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    too_long = sum(len(ids) > limit for ids in encoded)
    if too_long:
        told = f"{where}: " if where else ""
        logging.warning("%s%d of %d texts cut at %d tokens", told, too_long, len(texts), max_tokens)
        encoded = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        if not ids and not end:
            raise InputError(f"text {text!r}: the tokenizer makes no tokens of it")
    return [np.array([*ids, *end], np.int32) for ids in encoded]


def check_max_tokens(backbone: Any, max_tokens: int) -> None:
    """Raises InputError if a backbone has no positions for so many tokens."""
    longest = getattr(backbone.config, "max_length", None)
    if longest is not None and max_tokens > longest:
        raise InputError(f"max_tokens={max_tokens}; allowed: at most {longest}, as the encoder has")
