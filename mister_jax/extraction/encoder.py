"""Encodes utterances, sorted by length, in batches of limited size."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from flax import nnx

from mister_jax.console import ProgressReporter
from mister_jax.data.batching import PlannedBatch, plan_budgeted_batches
from mister_jax.data.pipeline import prefetch_to_device
from mister_jax.data.utterances import Utterances
from mister_jax.encoders import hub
from mister_jax.errors import InputError
from mister_jax.parallel.multihost import assert_visible_to_all_processes
from mister_jax.parallel.oom import explain_oom
from mister_jax.parallel.partitioning import JitPartitioner

_ITEMS_PER_FILE = 2048  # maximum number of items that a resumed run encodes again


class Input(Protocol):
    """Converts utterances of one modality to items, which are arrays, and items to batches.

    Attributes:
      modality: "speech" or "text".
      unit: Name of the unit in which `budget` and the speed are measured.
      budget: Default maximum number of units in a batch on each device, including padding.
      program_cost: Number of units that a device encodes while one program compiles.
      steps_per_unit: Number of length steps per unit. Padded lengths are whole numbers of steps; a
        step is a token or 0.1 s.
      length_steps: Lengths in steps that batches are padded to, in addition to `max_length`.
      max_length: Maximum length of an item in a batch, in steps.
      max_samples: Maximum number of samples to read from a clip; None for no limit and for text.
    """

    modality: str
    unit: str
    budget: int
    program_cost: float
    steps_per_unit: int
    length_steps: tuple[int, ...]
    max_length: int
    max_samples: int | None

    def load(self, dataset: str, split: str, data_dir: epath.PathLike | None) -> Utterances:
        """Loads the utterances of a split from a dialogue dataset."""

    def items(self, utterances: Sequence[Any]) -> list[np.ndarray]:
        """Returns an item for each utterance; an item is empty if there is nothing to encode."""

    def windows(self, item: np.ndarray) -> list[np.ndarray]:
        """Splits an item into windows that fit into a batch. The windows' features are averaged."""

    def lengths(self, items: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the length of each item in steps, [N] int."""

    def num_units(self, items: Sequence[np.ndarray]) -> float:
        """Returns the total number of units in items."""

    def batch(self, items: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Pads items, which may be empty, to a length in steps, and returns the batch."""


class Encoder:
    """An utterance encoder that runs on all devices of its partitioner.

    Args:
      input_: Input of the encoder.
      partitioner: Partitioner of batches and parameters.
      metadata: JSON values that determine the features. `encoder_from_metadata` loads the encoder
        from `kind`, `name` and `options`. The other values detect changes to the encoder's files.
      encode: Function that computes features [B, F] float32 from a batch of `input_`.

    Attributes:
      oom_hint: Advice to the user on how to use less memory.
    """

    def __init__(
        self,
        input_: Input,
        partitioner: JitPartitioner,
        metadata: dict[str, Any],
        encode: Callable[[dict[str, Any]], jax.Array],
    ):
        self.input = input_
        self.partitioner = partitioner
        self.metadata = metadata
        self.oom_hint = "a smaller --budget"
        if metadata["options"].get("dtype", "bfloat16") != "bfloat16":
            self.oom_hint += " or --dtype=bfloat16"
        self._encode = encode

    @property
    def modality(self) -> str:
        """Modality that is encoded, "speech" or "text"."""
        return self.input.modality

    def __call__(self, batch: dict[str, Any]) -> jax.Array:
        """Encodes a batch on the devices to features [B, F] float32."""
        return self._encode(batch)


def encode_utterances(
    encoder: Encoder, utterances: Sequence[Any], *, budget: int | None = None, quiet: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes utterances in memory.

    Args:
      encoder: Encoder of the utterances.
      utterances: N texts, or clips [S] int16 at 16 kHz, of any length.
      budget: Maximum number of tokens or seconds of audio in a batch on each device, including
        padding; `encoder.input.budget` by default.
      quiet: Whether to hide progress.

    Returns:
      Features [N, F] float32, which are zero for absent utterances, and presence flags [N] bool.
      Empty texts, silent clips and clips that are shorter than a frame are absent.

    Raises:
      InputError: All utterances are absent (F is then unknown), or a batch does not fit in device
        memory.
    """
    items = encoder.input.items(utterances)
    present = np.array([len(item) > 0 for item in items], bool)
    if not present.any():
        raise InputError(f"no {encoder.modality} in {len(items)} utterances; needed: at least one")
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
    compiled_shapes: set[tuple[int, int]] | None = None,
) -> np.ndarray:
    """Encodes N >= 1 nonempty items to features [N, F].

    The features of an item that is split into windows are the windows' mean, weighted by length.
    Features are saved in `resume_dir` as they are computed. `compiled_shapes` contains the number
    of rows and the length in steps of earlier batches. The new batches use these shapes where
    possible, and all other shapes of new batches are added to `compiled_shapes`.

    Raises:
      InputError: The folder cannot be written, or a batch does not fit in the devices' memory.
    """
    budget = encoder.input.budget if budget is None else budget
    windows_per_item = [encoder.input.windows(item) for item in items]
    windows = [window for item_windows in windows_per_item for window in item_windows]
    if len(windows) > len(items):
        unit = f"windows of {unit}"
    with ProgressReporter(len(windows), unit=unit, quiet=quiet) as reporter:
        shapes = set() if compiled_shapes is None else compiled_shapes
        features = _encode_windows(encoder, windows, budget, reporter, resume_dir, shapes)
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
    compiled_shapes: set[tuple[int, int]],
) -> np.ndarray:
    """Encodes windows to features [N, F] in several parts; see `encode_items`."""
    # Encode the longest windows first, so that an out-of-memory error occurs immediately.
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
        part = [windows[row] for row in rows]
        # Resumed parts are planned too, so that the plans of later parts are unchanged.
        plan = _plan_part(encoder, part, budget, compiled_shapes)
        path = None if resume_dir is None else resume_dir / f"{number:05d}.npy"
        if path is not None and path.exists():
            with path.open("rb") as file:
                parts.append(np.load(file))
            reporter.advance("resumed", amount=len(rows))
            continue
        parts.append(_encode_part(encoder, part, plan, reporter))
        if path is not None and jax.process_index() == 0:
            partial_path = path.with_name(f"{path.name}.partial")
            with partial_path.open("wb") as file:
                np.save(file, parts[-1])
            partial_path.rename(path)
    sorted_features = np.concatenate(parts)
    features = np.empty_like(sorted_features)
    features[order] = sorted_features
    return features


def _plan_part(
    encoder: Encoder,
    windows: Sequence[np.ndarray],
    budget: int,
    compiled_shapes: set[tuple[int, int]],
) -> list[PlannedBatch]:
    """Plans batches of windows (longest first), and adds the shapes to `compiled_shapes`."""
    input_ = encoder.input
    plan = list(
        plan_budgeted_batches(
            input_.lengths(windows),
            budget * input_.steps_per_unit,
            length_steps=input_.length_steps,
            max_length=input_.max_length,
            num_shards=encoder.partitioner.num_shards,
            program_cost=input_.program_cost * input_.steps_per_unit,
            compiled=compiled_shapes,
        )
    )
    compiled_shapes.update((len(rows), length) for rows, length in plan)
    return plan


def _encode_part(
    encoder: Encoder,
    windows: Sequence[np.ndarray],
    plan: Sequence[PlannedBatch],
    reporter: ProgressReporter,
) -> np.ndarray:
    """Encodes windows in planned batches to features [N, F]."""
    input_ = encoder.input
    empty = windows[0][:0]

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for all_rows, length in plan:
            rows = np.split(all_rows, jax.process_count())[jax.process_index()]
            batch = input_.batch([windows[row] if row >= 0 else empty for row in rows], length)
            yield {**batch, "row": rows}

    features: np.ndarray | None = None
    start, num_units = time.perf_counter(), 0.0
    # The devices compute a batch while the features of the previous batch are fetched.
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


def compile_encoder(
    partitioner: JitPartitioner,
    module: nnx.Module,
    encode: Callable[[Any, dict[str, Any]], jax.Array],
) -> Callable[[dict[str, Any]], jax.Array]:
    """Compiles `encode(module, batch)` for all devices, and binds the module's parameters."""
    graph, params = nnx.split(module)

    def step(params: Any, batch: dict[str, Any], _axis_name: str | None) -> jax.Array:
        return encode(nnx.merge(graph, params), batch)

    return functools.partial(partitioner.compile_eval(step), nnx.as_pure(params))


def pretrained_metadata(
    kind: str, name: str, options: dict[str, Any], files: str, adapter: str
) -> dict[str, Any]:
    """Returns the metadata of a pretrained encoder; see `Encoder`.

    `files` is the fingerprint of the encoder's files. `adapter` is a folder, or empty.
    """
    if adapter:
        options = {**options, "adapter": hub.pinned_name(adapter)}
        files = f"{files} {hub.fingerprint(adapter)}"
    return {"kind": kind, "name": hub.pinned_name(name), "options": options, "files": files}


def explain_load_oom(name: str, dtype: str) -> contextlib.AbstractContextManager[None]:
    """Explains out-of-memory errors that occur while an encoder is loaded; see `explain_oom`."""
    hint = "devices with more memory, or more devices"
    if dtype != "bfloat16":
        hint = f"extraction with --dtype=bfloat16, or {hint}"
    return explain_oom(name, "the encoder's parameters", hint)
