"""Single utterances as recordings, and their batches: what speech encoders read."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from mister_jax.data.audio import SAMPLE_RATE
from mister_jax.data.dialogues import StoredUtterance
from mister_jax.data.pipeline import BatchPlan
from mister_jax.data.utterances import Fields, Utterances, load_utterances, utterance_batches

UNIT = SAMPLE_RATE // 10
"""Samples by which batches grow: clips are padded to a multiple of it."""

SHORTEST = SAMPLE_RATE // 40
"""Samples of the shortest clip that is heard, 25 ms: every encoder makes a frame of as many."""


QUIETEST = 2**15 * 10 ** (-80 / 20)
"""Root mean square of the quietest sound that is heard: 3.3 steps of int16, 80 dB below full scale.

Above the dither of a silent recording and the rounding of its samples, which are of up to a step
each (-90 dB); far below the softest speech (-60 dB).
"""


def is_heard(clip: np.ndarray) -> bool:
    """Whether there is sound in samples [s]: a stretch of `SHORTEST` that is loud enough.

    A stretch, since the level of the whole falls with the silence around a sound. Its mean does not
    count: a constant is not heard.
    """
    if len(clip) < SHORTEST:
        return False
    whole = len(clip) // SHORTEST * SHORTEST
    frames = [*clip[:whole].reshape(-1, SHORTEST), clip[-SHORTEST:]]
    # A frame at a time: most clips are told by their first few.
    return any(frame.std(dtype=np.float32) >= QUIETEST for frame in frames)


def beginning(clip: np.ndarray, most: int | None = None) -> np.ndarray:
    """The first `most` samples of a clip [s], all by default; none where they are not heard."""
    kept = clip[:most]
    return kept if is_heard(kept) else kept[:0]


def load_clips(
    name: str, split: str, data_dir: epath.PathLike | None, most: int | None = None
) -> Utterances:
    """Reads the recordings of a split; those with nothing to hear, see `is_heard`, are left out.

    All of their sound is in memory: 115 MB an hour. How many were left out is logged.

    Args:
        name: of a dataset of dialogues.
        split: of it.
        data_dir: the directory that holds datasets; that of TFDS when None.
        most: samples that are kept of a clip, from its beginning; all by default.

    Raises:
        InputError: there is no such dataset or split.
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

    found = load_utterances(name, split, data_dir, item)
    if silent or missing:
        logging.warning(
            "dataset %s, split %s: of %d utterances %d are silent and %d have no usable recording",
            name,
            split,
            len(found.items) + silent + missing,
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
    return found


def units(sizes: np.ndarray, most: int) -> np.ndarray:
    """[N] int: lengths in `UNIT`, rounded up, of clips of these samples [N] cut at `most`."""
    return -(-np.minimum(sizes, most) // UNIT)


def pad_clips(clips: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples [B, S] int16, zero in padding on the right, and lengths [B] int32."""
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
        clips: the split.
        plan: made from `units(clips.sizes, most)`.
        most: samples that are kept of a clip: its beginning, or with `shuffle` a stretch whose
            place is drawn anew in every epoch.
        seed: of the shuffle and the stretches, with `epoch`.
        epoch: counts from 0.
        shuffle: for training; see `BatchPlan.epoch`.
        **options: the others of `utterance_batches`.

    Returns:
        An iterator over dicts, of `utterance_batches` with

        - `waveform` [B, S] int16, zero in padding
        - `lengths` [B] int32
    """
    nothing = np.zeros(0, np.int16)

    def stretch(row: int) -> np.ndarray:
        if row < 0:
            return nothing
        clip = clips.items[row]
        start: int = 0
        if shuffle and len(clip) > most:
            generator = np.random.default_rng([seed, epoch, row])
            start = int(generator.integers(len(clip) - most + 1))
        return clip[start : start + most]

    def fields(rows: np.ndarray, length: int) -> Fields:
        waveform, lengths = pad_clips([stretch(row) for row in rows], length * UNIT)
        return {"waveform": waveform, "lengths": lengths}

    return utterance_batches(
        clips, plan, fields, seed=seed, epoch=epoch, shuffle=shuffle, **options
    )
