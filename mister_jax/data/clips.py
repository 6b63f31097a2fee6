"""Loads the recordings of utterances, and makes batches of recordings for speech encoders."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from mister_jax.data.audio import SAMPLE_RATE
from mister_jax.data.batching import BatchPlan
from mister_jax.data.dialogues import StoredUtterance
from mister_jax.data.padding import pad_clips
from mister_jax.data.utterances import Batch, Utterances, load_utterances, utterance_batches

LENGTH_STEP = SAMPLE_RATE // 10
"""Padded lengths of batches are multiples of this number of samples."""

MIN_AUDIBLE_SAMPLES = SAMPLE_RATE // 40
"""Number of samples in the shortest audible clip: 25 ms, the length of an encoder frame."""

MIN_AUDIBLE_RMS = 2**15 * 10 ** (-80 / 20)
"""Root mean square of the softest audible frame: 3.3 steps of int16, or 80 dB below full scale.

The dither and rounding errors in a silent recording are up to one step each (-90 dB). The softest
speech is at -60 dB.
"""


def is_audible(clip: np.ndarray) -> bool:
    """Returns whether any frame in a clip [S] reaches `MIN_AUDIBLE_RMS`.

    Frames are checked separately because silence around a sound lowers the clip's overall level.
    Each frame's mean is subtracted, so a constant signal is silent.
    """
    if len(clip) < MIN_AUDIBLE_SAMPLES:
        return False
    end = len(clip) // MIN_AUDIBLE_SAMPLES * MIN_AUDIBLE_SAMPLES
    frames = [*clip[:end].reshape(-1, MIN_AUDIBLE_SAMPLES), clip[-MIN_AUDIBLE_SAMPLES:]]
    # `any` stops at the first audible frame, which is early in most clips.
    return any(frame.std(dtype=np.float32) >= MIN_AUDIBLE_RMS for frame in frames)


def truncate(clip: np.ndarray, max_samples: int | None = None) -> np.ndarray:
    """Returns the first `max_samples` of a clip [S], or an empty clip if that part is silent."""
    samples = clip[:max_samples]
    return samples if is_audible(samples) else samples[:0]


def load_clips(
    name: str, split: str, data_dir: epath.PathLike | None, max_samples: int | None = None
) -> Utterances:
    """Loads the audible recordings of a split into memory, truncated to `max_samples` samples each.

    One hour of audio takes 115 MB. The function logs how many recordings it skips and truncates.

    Raises:
        InputError: The dataset or split does not exist.
    """
    num_silent = num_missing = num_truncated = 0

    def read_clip(turn: StoredUtterance) -> np.ndarray | None:
        nonlocal num_silent, num_missing, num_truncated
        if not turn.speech_present:
            num_missing += 1
            return None
        clip = truncate(turn.audio, max_samples)
        num_silent += not len(clip)
        num_truncated += max_samples is not None and len(turn.audio) > max_samples
        return clip if len(clip) else None

    utterances = load_utterances(name, split, data_dir, read_clip)
    where = f"dataset {name}, split {split}"
    if num_silent or num_missing:
        logging.warning(
            "%s: %d utterances, of which %d are silent and %d have no usable recording",
            where,
            len(utterances.items) + num_silent + num_missing,
            num_silent,
            num_missing,
        )
    if num_truncated and max_samples is not None:
        seconds = max_samples / SAMPLE_RATE
        logging.warning(
            "%s: %d utterances are longer than %g s and are truncated",
            where,
            num_truncated,
            seconds,
        )
    return utterances


def lengths_in_steps(sizes: np.ndarray, max_samples: int) -> np.ndarray:
    """Caps `sizes` [N] at `max_samples`, and divides them by `LENGTH_STEP`, rounding up."""
    return -(-np.minimum(sizes, max_samples) // LENGTH_STEP)


def clip_batches(
    clips: Utterances,
    plan: BatchPlan,
    *,
    max_samples: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    **options: Any,
) -> Iterator[Batch]:
    """Returns an iterator over the batches of one epoch.

    `plan` must be made for `lengths_in_steps(clips.sizes, max_samples)`. Clips longer than
    `max_samples` are truncated at the end or, with `shuffle`, cropped at a random position that
    depends on `seed` and `epoch`. `options` are passed to `utterance_batches`.

    Returns:
        An iterator over the dicts that `utterance_batches` returns, with these additional entries:

        - `waveform` [B, S] int16, zero in padding
        - `lengths` [B] int32, number of samples in each clip
    """
    crops = []
    for row, clip in enumerate(clips.items):
        start = 0
        if shuffle and len(clip) > max_samples:
            generator = np.random.default_rng([seed, epoch, row])
            start = int(generator.integers(len(clip) - max_samples + 1))
        crops.append(clip[start : start + max_samples])

    def pad_crops(items: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
        return pad_clips(items, length * LENGTH_STEP)

    return utterance_batches(
        dataclasses.replace(clips, items=tuple(crops)),
        plan,
        pad_crops,
        ("waveform", "lengths"),
        seed=seed,
        epoch=epoch,
        shuffle=shuffle,
        **options,
    )
