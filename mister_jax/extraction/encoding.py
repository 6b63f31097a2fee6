"""Encodes many utterances: sorted by length, in batches of a budget, resumable."""

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
from mister_jax.extraction.base import Encoder
from mister_jax.parallel.multihost import assert_visible_to_all_processes
from mister_jax.parallel.oom import explain_oom

_ITEMS_PER_FILE = 2048  # a killed run repeats at most this many


def encode_utterances(
    encoder: Encoder, utterances: Sequence[Any], *, budget: int | None = None, quiet: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes utterances in memory.

    Args:
      encoder: Encoder of the utterances.
      utterances: N texts, or clips [S] int16 at 16 kHz, of any length.
      budget: Tokens or seconds of audio in a batch on each device, including padding; by default
        that of the encoder's input.
      quiet: Whether to show no progress.

    Returns:
      Features [N, F] float32, zero where nothing is present; and presence [N] bool. Empty texts and
      clips that are silent or shorter than a frame are not present.

    Raises:
      InputError: No utterance is present, so F is unknown, or a batch does not fit in the devices'
        memory.
    """
    items = encoder.input.items(utterances)
    present = np.array([len(item) > 0 for item in items], bool)
    if not present.any():
        raise InputError(f"{len(items)} utterances: none has {encoder.modality}; needed: one")
    encoded = encode_items(encoder, [item for item in items if len(item)], budget, quiet=quiet)
    features = np.zeros((len(items), encoded.shape[1]), np.float32)
    features[present] = encoded
    return features, present


def encode_items(
    encoder: Encoder,
    items: Sequence[np.ndarray],
    budget: int | None = None,
    *,
    unit: str = "utterances",
    quiet: bool = False,
    resume_dir: epath.Path | None = None,
) -> np.ndarray:
    """Encodes items, none of which is empty.

    If an item is split into windows, its feature is their mean, weighted by their lengths.

    Args:
      encoder: Encoder of the items.
      items: N >= 1 items of the encoder's input.
      budget: Units in a batch on each device, including padding; by default that of the input.
      unit: What the progress bar counts.
      quiet: Whether to show no progress.
      resume_dir: Folder to save features in as they are computed, and to resume from.

    Returns:
      Features [N, F].

    Raises:
      InputError: The folder cannot be written, or a batch does not fit in the devices' memory.
    """
    budget = encoder.input.budget if budget is None else budget
    windows_per_item = [encoder.input.windows(item) for item in items]
    windows = [window for item_windows in windows_per_item for window in item_windows]
    if len(windows) > len(items):
        unit = f"windows of {unit}"
    with ProgressReporter(len(windows), unit=unit, quiet=quiet) as reporter:
        features = _encode_windows(encoder, windows, budget, reporter, resume_dir)
    if len(windows) == len(items):
        return features
    starts = np.cumsum([0, *map(len, windows_per_item)])[:-1]
    weights = np.array([len(window) for window in windows], np.float32)
    sums = np.add.reduceat(features * weights[:, None], starts)
    return sums / np.add.reduceat(weights, starts)[:, None]


def _encode_windows(
    encoder: Encoder,
    windows: Sequence[np.ndarray],
    budget: int,
    reporter: ProgressReporter,
    resume_dir: epath.Path | None,
) -> np.ndarray:
    """Encodes windows to features [N, F] in several parts, see `encode_items`."""
    # The longest windows come first, so that an extraction that runs out of memory fails at once.
    order = np.argsort(-encoder.input.lengths(windows), kind="stable")
    parts: list[np.ndarray] = []
    if resume_dir is not None:
        try:
            if jax.process_index() == 0:
                resume_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            folder = resume_dir.parent
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
        assert_visible_to_all_processes(resume_dir)
    for number, start in enumerate(range(0, len(order), _ITEMS_PER_FILE)):
        rows = order[start : start + _ITEMS_PER_FILE]
        path = None if resume_dir is None else resume_dir / f"{number:05d}.npy"
        if path is not None and path.exists():
            with path.open("rb") as file:
                parts.append(np.load(file))
            reporter.advance("resumed", amount=len(rows))
            continue
        parts.append(_encode_part(encoder, [windows[row] for row in rows], budget, reporter))
        if path is not None and jax.process_index() == 0:
            partial_path = path.with_name(f"{path.name}.partial")
            with partial_path.open("wb") as file:
                np.save(file, parts[-1])
            partial_path.rename(path)
    sorted_features = np.concatenate(parts)
    features = np.empty_like(sorted_features)
    features[order] = sorted_features
    return features


def _encode_part(
    encoder: Encoder, windows: Sequence[np.ndarray], budget: int, reporter: ProgressReporter
) -> np.ndarray:
    """Encodes windows that are sorted by length, longest first, to features [N, F]."""
    input_ = encoder.input
    plan = list(
        plan_budgeted_batches(
            input_.lengths(windows),
            budget * input_.steps_per_unit,
            length_steps=input_.length_steps,
            max_length=input_.max_length,
            num_shards=encoder.partitioner.num_shards,
        )
    )
    empty = windows[0][:0]

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for all_rows, length in plan:
            rows = np.split(all_rows, jax.process_count())[jax.process_index()]
            batch = input_.batch([windows[row] if row >= 0 else empty for row in rows], length)
            yield {**batch, "row": rows}

    features: np.ndarray | None = None
    start, num_units = time.perf_counter(), 0.0
    # One batch is computed while the features of the previous one are fetched.
    pending: list[tuple[np.ndarray, jax.Array]] = []

    def fetch_oldest() -> None:
        nonlocal features, num_units
        rows, batch_features = pending.pop(0)
        values = np.asarray(jax.device_get(batch_features))
        if features is None:
            features = np.zeros((len(windows), values.shape[1]), np.float32)
        is_window = rows >= 0
        features[rows[is_window]] = values[is_window]
        num_units += input_.num_units([windows[row] for row in rows[is_window]])
        rate = num_units / (time.perf_counter() - start)
        reporter.advance(f"{rate:,.0f} {input_.unit}/s", amount=int(is_window.sum()))

    rows, length = plan[0]
    size = f"{len(rows)} x {length / input_.steps_per_unit:g} {input_.unit}"
    work = f"batches of {size} on {jax.device_count()} devices"
    placed_batches = prefetch_to_device(batches(), encoder.partitioner.put_batch)
    with explain_oom("extraction", work, encoder.oom_hint):
        for (rows, _), batch in zip(plan, placed_batches, strict=True):
            pending.append((rows, encoder(batch)))
            if len(pending) == 2:
                fetch_oldest()
        while pending:
            fetch_oldest()
    assert features is not None
    return features
