"""Computes the features of many utterances: sorted by length, in batches of a budget, resumable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from mister_jax.console import ProgressReporter
from mister_jax.data.batching import plan_budgeted_batches
from mister_jax.data.pipeline import prefetch_to_device
from mister_jax.errors import InputError
from mister_jax.extraction.encoders import Encoder
from mister_jax.parallel.multihost import assert_visible_to_all_processes
from mister_jax.parallel.oom import explain_oom

_PART = 2048  # utterances kept together on disk, and lost at most when a run is killed


def encode_utterances(
    encoder: Encoder, utterances: Sequence[Any], *, budget: int | None = None, quiet: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the features of utterances in memory.

    Args:
      encoder: Encoder of the utterances.
      utterances: N texts, or clips [s] int16 of `SAMPLE_RATE`, of any length.
      budget: Tokens or seconds of audio in a batch on each device, padding counted; the input's
        default if None.
      quiet: Show no progress.

    Returns:
      Features [N, F] float32, zero where nothing is present; and presence [N] bool. An empty text,
      and a clip that is silent or shorter than a frame, are not present.

    Raises:
      InputError: No utterance is present, so F is unknown, or a batch does not fit into the
        devices' memory.
    """
    items = encoder.input.items(utterances)
    present = np.array([len(item) > 0 for item in items], bool)
    if not present.any():
        raise InputError(f"{len(items)} utterances: none has {encoder.modality}; needed: one")
    budget = encoder.input.budget if budget is None else budget
    encoded = encode_items(encoder, [item for item in items if len(item)], budget, quiet=quiet)
    features = np.zeros((len(items), encoded.shape[1]), np.float32)
    features[present] = encoded
    return features, present


def encode_items(
    encoder: Encoder,
    items: Sequence[np.ndarray],
    budget: int,
    *,
    unit: str = "utterances",
    quiet: bool = False,
    parts: epath.Path | None = None,
) -> np.ndarray:
    """Returns features [N, F] of items, none of them empty.

    An item that is split into windows gets the mean of their features, weighted by their lengths.

    Args:
      encoder: Encoder of the items.
      items: N >= 1 items of the encoder's input.
      budget: Units in a batch on each device, padding counted.
      unit: What the progress bar counts.
      quiet: Show no progress.
      parts: A folder where features are kept as soon as they are computed, to resume from.

    Raises:
      InputError: The folder cannot be written, or a batch does not fit into the devices' memory.
    """
    split = [encoder.input.windows(item) for item in items]
    windows = [window for windows in split for window in windows]
    if len(windows) > len(items):
        unit = f"windows of {unit}"
    with ProgressReporter(len(windows), unit=unit, quiet=quiet) as reporter:
        features = _encode_windows(encoder, windows, budget, reporter, parts)
    if len(windows) == len(items):
        return features
    starts = np.cumsum([0, *(len(windows) for windows in split)])[:-1]
    weights = np.array([len(window) for window in windows], np.float32)
    sums = np.add.reduceat(features * weights[:, None], starts)
    return sums / np.add.reduceat(weights, starts)[:, None]


def _encode_windows(
    encoder: Encoder,
    items: Sequence[np.ndarray],
    budget: int,
    reporter: ProgressReporter,
    parts: epath.Path | None,
) -> np.ndarray:
    """Returns features [N, F] of items that batches can hold; see `encode_items`."""
    # Long ones first: what does not fit into memory fails at once.
    order = np.argsort(-encoder.input.lengths(items), kind="stable")
    done: list[np.ndarray] = []
    if parts is not None:
        try:
            if jax.process_index() == 0:
                parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{parts.parent}: cannot be written ({error.strerror})") from error
        assert_visible_to_all_processes(parts)
    for number, start in enumerate(range(0, len(order), _PART)):
        rows = order[start : start + _PART]
        path = None if parts is None else parts / f"{number:05d}.npy"
        if path is not None and path.exists():
            with path.open("rb") as file:
                done.append(np.load(file))
            reporter.advance("resumed", amount=len(rows))
            continue
        done.append(_encode_part(encoder, [items[row] for row in rows], budget, reporter))
        if path is not None and jax.process_index() == 0:
            partial = path.with_name(f"{path.name}.partial")
            with partial.open("wb") as file:
                np.save(file, done[-1])
            partial.rename(path)
    sorted_features = np.concatenate(done)
    features = np.empty_like(sorted_features)
    features[order] = sorted_features
    return features


def _encode_part(
    encoder: Encoder, items: Sequence[np.ndarray], budget: int, reporter: ProgressReporter
) -> np.ndarray:
    """Computes features [N, F] of items that are sorted by length, longest first."""
    source = encoder.input
    lengths = source.lengths(items)
    planned = list(
        plan_budgeted_batches(
            lengths,
            budget * source.scale,
            length_steps=source.steps,
            max_length=source.longest,
            num_shards=encoder.partitioner.num_shards,
        )
    )
    nothing = items[0][:0]

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for rows, length in planned:
            there = np.split(rows, jax.process_count())[jax.process_index()]
            batch = source.batch([items[row] if row >= 0 else nothing for row in there], length)
            yield {**batch, "row": there}

    features: np.ndarray | None = None
    began, read = time.perf_counter(), 0.0
    placed = prefetch_to_device(batches(), encoder.partitioner.put_batch)
    # A batch is computed while the one before it is fetched.
    pending: list[tuple[np.ndarray, jax.Array]] = []

    def take() -> None:
        nonlocal features, read
        rows, found = pending.pop(0)
        values = np.asarray(jax.device_get(found))
        if features is None:
            features = np.zeros((len(items), values.shape[1]), np.float32)
        kept = rows >= 0
        features[rows[kept]] = values[kept]
        read += source.amount([items[row] for row in rows[kept]])
        rate = read / (time.perf_counter() - began)
        reporter.advance(f"{rate:,.0f} {source.unit}/s", amount=int(kept.sum()))

    rows, length = planned[0]
    size = f"{len(rows)} x {length / source.scale:g} {source.unit}"
    work = f"batches of {size} on {jax.device_count()} devices"
    with explain_oom("extraction", work, encoder.oom_hint):
        for (rows, _), batch in zip(planned, placed, strict=True):
            pending.append((rows, encoder(batch)))
            if len(pending) == 2:
                take()
        while pending:
            take()
    assert features is not None
    return features
