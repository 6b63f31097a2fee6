"""Single utterances as recordings, and their batches: what speech encoders read."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from etils import epath

from mister_jax.data.audio import SAMPLE_RATE
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.pipeline import BatchPlan
from mister_jax.data.schema import UNLABELLED

UNIT = SAMPLE_RATE // 10
"""Samples by which batches grow: clips are padded to a multiple of it."""

SHORTEST = SAMPLE_RATE // 40
"""Samples of the shortest clip that is heard, 25 ms: every encoder makes a frame of as many."""


@dataclasses.dataclass(frozen=True, eq=False)
class UtteranceClips:
    """The utterances of a split that have sound, in the order of the dataset.

    All of their sound is in memory: 115 MB an hour.

    Attributes:
        name: of the dataset.
        split: of it.
        class_names: emotions.
        dialogue_ids: N ids, of the dialogue each utterance is in.
        utterance_ids: [N] str.
        clips: N arrays of samples [s] int16, `SAMPLE_RATE` a second, all of them heard.
        label: [N] int32, `UNLABELLED` or a class.
        score: [N] float32, or None for a dataset without scores.
        metadata: of the split.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    dialogue_ids: tuple[str, ...]
    utterance_ids: np.ndarray
    clips: tuple[np.ndarray, ...]
    label: np.ndarray
    score: np.ndarray | None = None
    metadata: dict = dataclasses.field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """[N] ones: each utterance stands alone, as in a dialogue of its own."""
        return np.ones(len(self.clips), int)

    @property
    def offsets(self) -> np.ndarray:
        """[N + 1], as in `DialogueFeatures`."""
        return np.arange(len(self.clips) + 1)

    def units(self, most: int) -> np.ndarray:
        """[N] int: lengths in `UNIT`, rounded up, of clips cut at `most` samples."""
        return np.array([-(-min(len(clip), most) // UNIT) for clip in self.clips])

    def take(self, rows: np.ndarray) -> "UtteranceClips":
        """The utterances of these rows."""
        return dataclasses.replace(
            self,
            dialogue_ids=tuple(self.dialogue_ids[row] for row in rows),
            utterance_ids=self.utterance_ids[rows],
            clips=tuple(self.clips[row] for row in rows),
            label=self.label[rows],
            score=None if self.score is None else self.score[rows],
        )

    def labelled(self) -> "UtteranceClips":
        """Those with a label."""
        return self.take(np.flatnonzero(self.label != UNLABELLED))


def is_heard(clip: np.ndarray) -> bool:
    """Whether there is anything in samples [s]: at least a frame, and not the same throughout."""
    return len(clip) >= SHORTEST and bool((clip != clip[0]).any())


def load_clips(name: str, split: str, data_dir: epath.PathLike | None) -> UtteranceClips:
    """Reads the recordings of a split; those with nothing to hear, see `is_heard`, are left out.

    Raises:
        InputError: there is no such dataset or split.
    """
    dataset = DialogueDataset(name, data_dir)
    turns, dialogues = [], []
    for dialogue in dataset.dialogues(split):
        for turn in dialogue.utterances:
            if turn.speech_present and is_heard(turn.audio):
                turns.append(turn)
                dialogues.append(dialogue.id)
    scores = np.array([turn.score for turn in turns], np.float32)
    return UtteranceClips(
        name=name,
        split=split,
        class_names=dataset.class_names,
        dialogue_ids=tuple(dialogues),
        utterance_ids=np.array([turn.id for turn in turns], str),
        clips=tuple(turn.audio for turn in turns),
        label=np.array([turn.label for turn in turns], np.int32),
        score=scores if dataset.scored else None,
        metadata=dataset.known(split),
    )


def pad_clips(clips: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples [B, S] int16, zero in padding on the right, and lengths [B] int32."""
    waveform = np.zeros((len(clips), length), np.int16)
    for row, clip in enumerate(clips):
        waveform[row, : len(clip)] = clip[:length]
    return waveform, np.array([min(len(clip), length) for clip in clips], np.int32)


def clip_batches(
    utterances: UtteranceClips,
    plan: BatchPlan,
    *,
    most: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Makes the batches of one epoch, each process its share of the rows.

    Args:
        utterances: the split.
        plan: made from `utterances.units(most)`.
        most: samples that are kept of a clip: its beginning, or with `shuffle` a stretch whose
            place is drawn anew in every epoch.
        seed: of the shuffle and the stretches, with `epoch`.
        epoch: counts from 0.
        start_step: batches to leave out at the start.
        shuffle: for training; see `BatchPlan.epoch`.
        process_index: of this process.
        process_count: divides `plan.multiple_of`.

    Returns:
        An iterator over dicts.

        - `waveform` [B, S] int16, zero in padding
        - `lengths` [B] int32
        - `label` [B] int32, -1 where unlabelled
        - `weight` [B] float32: of a labelled row 1 over their number in the global batch, else 0
        - `row` [B] int32, the index of the utterance, -1 for an empty row
    """
    planned = plan.epoch(seed, epoch, shuffle=shuffle)
    nothing = np.zeros(0, np.int16)

    def stretch(row: int) -> np.ndarray:
        if row < 0:
            return nothing
        clip = utterances.clips[row]
        start: int = 0
        if shuffle and len(clip) > most:
            generator = np.random.default_rng([seed, epoch, row])
            start = int(generator.integers(len(clip) - most + 1))
        return clip[start : start + most]

    def batch(all_rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        counted = (all_rows >= 0) & (utterances.label[all_rows] != UNLABELLED)
        share = 1 / max(1, counted.sum())
        rows = np.split(all_rows, process_count)[process_index]
        waveform, lengths = pad_clips([stretch(row) for row in rows], length * UNIT)
        label = np.where(rows >= 0, utterances.label[rows], UNLABELLED).astype(np.int32)
        return {
            "waveform": waveform,
            "lengths": lengths,
            "label": label,
            "weight": np.where(label != UNLABELLED, share, 0).astype(np.float32),
            "row": rows,
        }

    return (batch(rows, length) for rows, length in planned[start_step:])
