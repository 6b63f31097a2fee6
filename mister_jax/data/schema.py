"""What a split of dialogues looks like in memory, between a dataset and its batches."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

SPLITS = ("train", "validation", "test")

MODALITIES = ("speech", "text")

UNLABELED = -1
"""The label of an utterance that is context only: no loss, no metric."""


def fingerprint(*values: Any) -> str:
    """16 hexadecimal digits of arrays or lists of texts; others have another."""
    digest = hashlib.sha256()
    for value in values:
        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
class DialogueFeatures:
    """One split of a dataset: the feature vectors of its utterances, dialogue after dialogue.

    M dialogues hold N utterances in all. Arrays over utterances are flat and in dialogue order, so
    dialogue `m` owns rows `offsets[m]:offsets[m + 1]`.

    Attributes:
        name: dataset name.
        split: one of `SPLITS`.
        class_names: emotion names; `label` counts into them.
        dialogue_ids: M ids.
        lengths: [M] int, utterances of each dialogue, all at least 1.
        utterance_ids: [N] str.
        speech: [N, Ds] float16 or float32, as stored; zero where speech is absent.
        text: [N, Dt] float16 or float32, as stored; zero where text is absent.
        speech_present: [N] bool.
        text_present: [N] bool.
        label: [N] int32, `UNLABELED` or a class.
        score: [N] float32, or None for a dataset without scores. NaN marks an unscored utterance.
        metadata: Where the features come from; plain JSON values.
        utterance_metadata: JSON objects of further columns of a manifest [N] str, which travel to
            predictions and which no model reads; None if there are none.

    Raises:
        ValueError: arrays do not fit each other.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    dialogue_ids: tuple[str, ...]
    lengths: np.ndarray
    utterance_ids: np.ndarray
    speech: np.ndarray
    text: np.ndarray
    speech_present: np.ndarray
    text_present: np.ndarray
    label: np.ndarray
    score: np.ndarray | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    utterance_metadata: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.lengths.shape != (len(self.dialogue_ids),):
            raise ValueError(
                f"lengths {self.lengths.shape} for {len(self.dialogue_ids)} dialogue_ids"
            )
        total = int(self.lengths.sum())
        for field in (
            "utterance_ids",
            "speech_present",
            "text_present",
            "label",
            "score",
            "utterance_metadata",
        ):
            array = getattr(self, field)
            if array is not None and array.shape != (total,):
                raise ValueError(f"{field} has shape {array.shape}, expected ({total},)")
        for field in ("speech", "text"):
            array = getattr(self, field)
            if array.ndim != 2 or len(array) != total:
                raise ValueError(f"{field} has shape {array.shape}, expected ({total}, width)")

    @property
    def offsets(self) -> np.ndarray:
        """[M + 1] int64, the first utterance of each dialogue, and N at the end."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @property
    def speech_dim(self) -> int:
        return self.speech.shape[1]

    @property
    def text_dim(self) -> int:
        return self.text.shape[1]

    @property
    def class_counts(self) -> np.ndarray:
        """[C] int64, labeled utterances of each class."""
        return np.bincount(self.label[self.label != UNLABELED], minlength=len(self.class_names))

    def fingerprint(self) -> str:
        """Of all that a training reads: features of another encoder have another."""
        return fingerprint(
            self.class_names,
            self.dialogue_ids,
            self.lengths,
            self.utterance_ids,
            self.speech,
            self.text,
            self.speech_present,
            self.text_present,
            self.label,
        )

    def summary(self) -> dict[str, str]:
        """What the split holds, in the lines of a table for people."""
        lengths = self.lengths
        return {
            "dialogues": f"{len(lengths)}",
            "utterances": f"{len(self.label)}",
            **{
                f"  {name}": f"{count}"
                for name, count in zip(self.class_names, self.class_counts, strict=True)
            },
            "  unlabeled": f"{np.sum(self.label == UNLABELED)}",
            "without speech": f"{np.sum(~self.speech_present)}",
            "without text": f"{np.sum(~self.text_present)}",
            "length min / mean / max": f"{lengths.min()} / {lengths.mean():.1f} / {lengths.max()}",
        }
