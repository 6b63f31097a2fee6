"""Recordings of single utterances and their batches, the input of speech encoders."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from mister_jax.data.audio import SAMPLE_RATE
from mister_jax.data.batching import BatchPlan
from mister_jax.data.dialogues import StoredUtterance
from mister_jax.data.utterances import Fields, Utterances, load_utterances, utterance_batches

UNIT = SAMPLE_RATE // 10
"""Granularity of batch lengths in samples: clips are padded to a multiple of it."""

SHORTEST = SAMPLE_RATE // 40
"""Samples of the shortest clip that counts as sound, 25 ms: one frame of every encoder."""

QUIETEST = 2**15 * 10 ** (-80 / 20)
"""Root mean square of the quietest sound: 3.3 steps of int16, 80 dB below full scale.

It is above the dither and rounding of a silent recording, up to one step each (-90 dB), and far
below the softest speech (-60 dB).
"""


def is_heard(clip: np.ndarray) -> bool:
    """Returns whether samples [S] hold sound: a frame of `SHORTEST` that is loud enough.

    Frames are compared because silence around a sound lowers the level of the whole. The mean of a
    frame is subtracted, so a constant is silent.
    """
    if len(clip) < SHORTEST:
        return False
    whole = len(clip) // SHORTEST * SHORTEST
    frames = [*clip[:whole].reshape(-1, SHORTEST), clip[-SHORTEST:]]
    # The first few frames decide for most clips.
    return any(frame.std(dtype=np.float32) >= QUIETEST for frame in frames)


def beginning(clip: np.ndarray, most: int | None = None) -> np.ndarray:
    """Returns the first `most` samples of a clip [S], all by default; none if they are silent."""
    kept = clip[:most]
    return kept if is_heard(kept) else kept[:0]


def load_clips(
    name: str, split: str, data_dir: epath.PathLike | None, most: int | None = None
) -> Utterances:
    """Reads the recordings of a split without the silent ones, see `is_heard`.

    All sound is held in memory, 115 MB an hour. The log says how many recordings were skipped.

    Args:
        name: Name of a dataset of dialogues.
        split: Name of the split.
        data_dir: Directory that holds datasets; that of TFDS if None.
        most: Number of samples to keep from the beginning of a clip; all by default.

    Raises:
        InputError: The dataset or split does not exist.
    """
    silent = missing = cut = 0

    def item(turn: StoredUtterance) -> np.ndarray | None:
        nonlocal silent, missing, cut
        if not turn.speech_present:
            missing += 1
            return None
        clip = beginning(turn.audio, most)
        silent += not len(clip)
        cut += most is not None and len(turn.audio) > most
        return clip if len(clip) else None

    utterances = load_utterances(name, split, data_dir, item)
    if silent or missing:
        logging.warning(
            "dataset %s, split %s: of %d utterances %d are silent and %d have no usable recording",
            name,
            split,
            len(utterances.items) + silent + missing,
            silent,
            missing,
        )
    if cut and most is not None:
        logging.warning(
            "dataset %s, split %s: %d utterances are longer than %g s, and the rest is not read",
            name,
            split,
            cut,
            most / SAMPLE_RATE,
        )
    return utterances


def units(sizes: np.ndarray, most: int) -> np.ndarray:
    """Returns lengths [N] int in `UNIT`, rounded up, of clips of `sizes` [N] cut at `most`."""
    return -(-np.minimum(sizes, most) // UNIT)


def pad_clips(clips: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns samples [B, S] int16, padded with zeros on the right, and lengths [B] int32."""
    waveform = np.zeros((len(clips), length), np.int16)
    for row, clip in enumerate(clips):
        waveform[row, : len(clip)] = clip[:length]
    return waveform, np.array([min(len(clip), length) for clip in clips], np.int32)


def clip_batches(
    clips: Utterances,
    plan: BatchPlan,
    *,
    most: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    **options: Any,
) -> Iterator[Fields]:
    """Makes the batches of one epoch.

    Args:
        clips: Clips of the split.
        plan: Plan made from `units(clips.sizes, most)`.
        most: Number of samples to keep of a clip: its beginning, or with `shuffle` a window at a
            random position, drawn again in every epoch.
        seed: Seed of the shuffle and of the windows, together with `epoch`.
        epoch: Epoch, counted from 0.
        shuffle: Shuffle for training; see `BatchPlan.epoch`.
        **options: Further options of `utterance_batches`.

    Returns:
        An iterator over the dicts of `utterance_batches` with

        - `waveform` [B, S] int16, zero in padding
        - `lengths` [B] int32
    """
    nothing = np.zeros(0, np.int16)

    def window(row: int) -> np.ndarray:
        if row < 0:
            return nothing
        clip = clips.items[row]
        start: int = 0
        if shuffle and len(clip) > most:
            generator = np.random.default_rng([seed, epoch, row])
            start = int(generator.integers(len(clip) - most + 1))
        return clip[start : start + most]

    def fields(rows: np.ndarray, length: int) -> Fields:
        waveform, lengths = pad_clips([window(row) for row in rows], length * UNIT)
        return {"waveform": waveform, "lengths": lengths}

    return utterance_batches(
        clips, plan, fields, seed=seed, epoch=epoch, shuffle=shuffle, **options
    )
