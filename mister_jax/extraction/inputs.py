"""Inputs of text and speech encoders: turns utterances into items, and items into batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from mister_jax import data
from mister_jax.data.clips import (
    LENGTH_STEP,
    is_audible,
    lengths_in_steps,
    load_clips,
    pad_clips,
    truncate,
)
from mister_jax.data.tokens import load_tokens, pad_tokens
from mister_jax.data.utterances import Utterances

TOKEN_BUDGET = 4096
CPU_TOKEN_BUDGET = 1024  # what a layer computes of it stays in the cache
SECONDS_BUDGET = 120

# Lengths are rounded up to these steps: what is short pads little, and programs are few.
_TOKENS = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512)
# On a CPU a program costs little to compile, and padding as much as tokens.
_CPU_TOKENS = (*range(4, 25, 2), *_TOKENS[6:])
_TENTHS = (
    *(5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 125, 150, 200, 250, 300, 400, 500, 600, 800),
    *(1000, 1500, 2000, 3000, 4500, 6000, 9000, 12000, 18000, 24000, 36000),
)


class Input(Protocol):
    """Reads utterances of a modality. An item is an array; a batch holds several items."""

    modality: str
    """Field of a feature dataset, "speech" or "text"."""
    unit: str
    """Unit of budgets and speeds."""
    budget: int
    """Default number of units in a batch on each device, padding counted."""
    scale: int
    """Length steps per unit."""
    steps: tuple[int, ...]
    """Lengths that batches are padded to, besides `longest`."""
    longest: int
    """Length of the longest item that a batch holds."""
    max_samples: int | None
    """Samples of a clip that are read; None for all of them, and for text."""

    def load(self, dataset: str, split: str, data_dir: epath.PathLike | None) -> Utterances:
        """Loads the utterances of a split of a dialogue dataset."""

    def items(self, utterances: Sequence[Any]) -> list[np.ndarray]:
        """Returns the items of utterances in memory; empty items where there is nothing to read."""

    def windows(self, item: np.ndarray) -> list[np.ndarray]:
        """Splits an item into parts that a batch can hold; their features are averaged."""

    def lengths(self, items: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the lengths of items [N] int, in steps."""

    def amount(self, items: Sequence[np.ndarray]) -> float:
        """Returns the number of units in items."""

    def batch(self, items: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Returns items, which may be empty, padded to a length in steps."""


class TextInput:
    """Texts as tokens.

    Args:
      encode: Function that returns the token ids of each text; `where` names their source for logs.
      max_tokens: Maximum number of tokens of a text.
    """

    modality, unit, scale = "text", "tokens", 1
    max_samples: int | None = None

    def __init__(self, encode: Callable[..., list[np.ndarray]], max_tokens: int):
        self.encode = encode
        self.longest = max_tokens
        on_cpu = jax.default_backend() == "cpu"
        self.budget = CPU_TOKEN_BUDGET if on_cpu else TOKEN_BUDGET
        self.steps: tuple[int, ...] = _CPU_TOKENS if on_cpu else _TOKENS

    def load(self, dataset: str, split: str, data_dir: epath.PathLike | None) -> Utterances:
        encode = functools.partial(self.encode, where=f"dataset {dataset}, split {split}")
        return load_tokens(dataset, split, data_dir, encode)

    def items(self, utterances: Sequence[str]) -> list[np.ndarray]:
        items = [np.zeros(0, np.int32)] * len(utterances)
        there = [row for row, text in enumerate(utterances) if text.strip()]
        encoded = self.encode([utterances[row] for row in there])
        for row, tokens in zip(there, encoded, strict=True):
            items[row] = tokens
        return items

    def windows(self, item: np.ndarray) -> list[np.ndarray]:
        return [item]

    def lengths(self, items: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([len(tokens) for tokens in items], int)

    def amount(self, items: Sequence[np.ndarray]) -> float:
        return sum(map(len, items))

    def batch(self, items: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
        ids, mask = pad_tokens(items, length)
        return {"input_ids": ids, "mask": mask}


class SpeechInput:
    """Clips of speech.

    Args:
      max_seconds: Seconds of a clip that a batch holds; longer clips lose their end.
      pads_to_max: Each clip costs as much as the longest, so all are padded to it.
      split: Split longer clips into windows of equal length instead.
    """

    modality, unit, budget, scale = "speech", "s of audio", SECONDS_BUDGET, 10

    def __init__(self, max_seconds: float, *, pads_to_max: bool = False, split: bool = False):
        self._most = round(max_seconds * data.SAMPLE_RATE)
        self.max_samples = None if split else self._most
        self.longest = -(-self._most // LENGTH_STEP)
        self.steps: tuple[int, ...] = () if pads_to_max else _TENTHS

    def load(self, dataset: str, split: str, data_dir: epath.PathLike | None) -> Utterances:
        return load_clips(dataset, split, data_dir, self.max_samples)

    def items(self, utterances: Sequence[np.ndarray]) -> list[np.ndarray]:
        for clip in utterances:
            if clip.ndim != 1 or clip.dtype != np.int16:
                raise ValueError(f"a clip of {clip.shape} {clip.dtype}; needed: [s] int16")
        return [truncate(clip, self.max_samples) for clip in utterances]

    def windows(self, item: np.ndarray) -> list[np.ndarray]:
        windows = np.array_split(item, max(1, -(-len(item) // self._most)))
        return [window for window in windows if is_audible(window)] or windows

    def lengths(self, items: Sequence[np.ndarray]) -> np.ndarray:
        return lengths_in_steps(np.array([len(clip) for clip in items], int), self._most)

    def amount(self, items: Sequence[np.ndarray]) -> float:
        return sum(map(len, items)) / data.SAMPLE_RATE

    def batch(self, items: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
        waveform, lengths = pad_clips(list(items), length * LENGTH_STEP)
        return {"waveform": waveform, "lengths": lengths}
