"""Text tokenization, and checks that a tokenizer matches its model."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from mister_jax.encoders.hf_config import CONFIG_FILE
from mister_jax.errors import InputError

# Files with a vocabulary. If a folder has none, transformers creates an empty tokenizer.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.*", "*.model")


def check_tokenizer(
    tokenizer: Any,
    folder: pathlib.Path,
    hf_config: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    needs_cls_token: bool = False,
) -> None:
    """Checks that a tokenizer matches the model in its folder.

    Args:
      tokenizer: Tokenizer from transformers.
      folder: Folder of the tokenizer.
      hf_config: Content of the folder's config.json.
      vocab_size: Number of rows in the model's embedding; None skips this check.
      needs_cls_token: Whether the model needs a token at the start of a text.

    Raises:
      InputError: The folder has no vocabulary, or the tokenizer does not match the model.
    """
    if not any(file for pattern in _VOCABULARY_FILES for file in folder.glob(pattern)):
        raise InputError(f"{folder}: no tokenizer; allowed: {', '.join(_VOCABULARY_FILES)}")
    max_id = max(tokenizer.get_vocab().values(), default=-1)
    problem = _special_token_mismatch(
        tokenizer, {**hf_config, **(hf_config.get("text_config") or {})}
    )
    if vocab_size is not None and max_id >= vocab_size:
        problem = f"the largest token ID is {max_id}; allowed: below {vocab_size}"
    elif not problem and needs_cls_token and tokenizer.cls_token_id is None:
        problem = "it has no token at the start of a text (cls_token), which BERT models need"
    if problem:
        raise InputError(f"{folder}: the tokenizer does not belong to the model: {problem}")


def _special_token_mismatch(tokenizer: Any, config: Mapping[str, Any]) -> str:
    """Describes a conflict between a tokenizer's special tokens and a config.json, or returns "".

    The tokenizer may have fewer tokens than the embedding has rows, because many models have spare
    rows. A token ID in config.json may also be the ID of another special token of the tokenizer:
    for example, chat models end a text and an answer with different tokens.
    """
    vocabulary = set(tokenizer.get_vocab().values())
    added = tokenizer.added_tokens_decoder.items()
    special_ids = {*tokenizer.all_special_ids, *(id for id, token in added if token.special)}
    for name in ("bos", "eos", "cls", "sep", "pad"):
        value = config.get(f"{name}_token_id")
        ids = value if isinstance(value, list) else [value]
        config_ids = {id for id in ids if type(id) is int and id >= 0}
        token_id = getattr(tokenizer, f"{name}_token_id", None)
        if not config_ids or config_ids & (vocabulary if token_id is None else special_ids):
            continue
        if token_id is not None:
            return f"its {name} token is {token_id}; {CONFIG_FILE} has {name}_token_id={value}"
        if name != "pad":  # The model may have a padding token that the tokenizer lacks.
            return f"it has {len(vocabulary)} tokens; {CONFIG_FILE} has {name}_token_id={value}"
    return ""


def encode_texts(
    tokenizer: Any,
    texts: Sequence[str],
    max_tokens: int,
    *,
    where: str = "",
    truncated: list[int] | None = None,
) -> list[np.ndarray]:
    """Encodes texts as token IDs.

    The tokenizer adds the model's special tokens. Most decoders' tokenizers add no token at the end
    of a text. In this case, the end-of-text token is appended, because only the last token attends
    to the whole text.

    Args:
      tokenizer: Tokenizer from transformers.
      texts: Texts to encode, which must not be empty.
      max_tokens: Maximum number of tokens; longer texts are truncated.
      where: Origin of the texts, for the log message on truncated texts.
      truncated: List to which the indices of truncated texts are added. If it is given, no message
        is logged.

    Returns:
      Token IDs of each text, [n] int32 with 1 <= n <= `max_tokens`.

    Raises:
      InputError: `max_tokens` leaves no room for text, or a text has no tokens.
    """
    if max_tokens < 3:
        raise InputError(
            f"max_tokens={max_tokens}; allowed: at least 3, two of which may be special tokens"
        )
    if not texts:
        return []
    special_tokens = tokenizer("")["input_ids"]
    end = []
    if tokenizer.sep_token_id is None and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id] if special_tokens[-1:] != [tokenizer.eos_token_id] else []
    limit = max_tokens - len(end)
    encoded = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    too_long = [index for index, ids in enumerate(encoded) if len(ids) > limit]
    if too_long:
        if truncated is None:
            prefix = f"{where}: " if where else ""
            logging.warning(
                "%s%d of %d texts truncated to %d tokens",
                prefix,
                len(too_long),
                len(texts),
                max_tokens,
            )
        else:
            truncated += too_long
        encoded = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        if not ids and not end:
            raise InputError(f"text {text!r}: the tokenizer returns no tokens")
    return [np.array([*ids, *end], np.int32) for ids in encoded]


def check_max_tokens(encoder: Any, max_tokens: int) -> None:
    """Raises InputError if an encoder has fewer positions than `max_tokens`."""
    max_length = getattr(encoder.config, "max_length", None)
    if max_length is not None and max_tokens > max_length:
        raise InputError(
            f"max_tokens={max_tokens}; allowed: at most {max_length}, the encoder's limit"
        )
