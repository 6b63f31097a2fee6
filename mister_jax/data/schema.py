"""Dialogue features in memory, and the names of splits and modalities."""

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

SPLITS = ("train", "validation", "test")

MODALITIES = ("speech", "text")

SPEAKER_IN_DIALOGUE = "speaker_in_dialogue"
"""Metadata column for speaker names that are unique only within a dialogue, such as M and F."""

UNLABELED = -1
"""Label of utterances without a class. Losses and metrics that need a label exclude them."""


def fingerprint(*values: Any) -> str:
    """Returns a hash of arrays or lists of strings, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for value in values:
        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
class DialogueFeatures:
    """Feature vectors of all utterances in one split.

    The split has M dialogues with N utterances in total. Utterance arrays are flat and in dialogue
    order: dialogue `m` has the rows `offsets[m]:offsets[m + 1]`.

    Attributes:
        name: Name of the dataset.
        split: One of `SPLITS`.
        class_names: Names of the C classes.
        dialogue_ids: Ids of the M dialogues.
        lengths: Number of utterances in each dialogue, [M] int, at least 1.
        utterance_ids: Ids of the utterances, [N] str.
        speech: Speech features as stored, [N, Ds] float16 or float32, zero if absent.
        text: Text features as stored, [N, Dt] float16 or float32, zero if absent.
        speech_present: Whether the utterance has speech, [N] bool.
        text_present: Whether the utterance has text, [N] bool.
        label: Index of the class or `UNLABELED`, [N] int32.
        score: Sentiment scores, [N] float32, NaN if missing; None for a dataset without scores.
        ratings: Number of raters who chose each class, [N, C] float32, zeros if unknown; None for a
            dataset without ratings.
        metadata: Origin of the features, as JSON values.
        utterance_metadata: JSON objects with a manifest's extra columns, [N] str, or None. No model
            reads these columns, but predictions include them.

    Raises:
        ValueError: The shapes of the arrays do not match.
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
    ratings: np.ndarray | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    utterance_metadata: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.lengths.shape != (len(self.dialogue_ids),):
            raise ValueError(
                f"lengths {self.lengths.shape} for {len(self.dialogue_ids)} dialogue_ids"
            )
        total = int(self.lengths.sum())
        for field in dataclasses.fields(self):
            array = getattr(self, field.name)
            if field.name == "lengths" or not isinstance(array, np.ndarray):
                continue
            expected = (total, *array.shape[1:2]) if field.name in MODALITIES else (total,)
            if field.name == "ratings":
                expected = (total, len(self.class_names))
            if array.shape != expected:
                raise ValueError(f"{field.name} has shape {array.shape}, expected {expected}")

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Row of each dialogue's first utterance, followed by N, [M + 1] int64."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @property
    def speech_dim(self) -> int:
        """Dimension Ds of the speech features."""
        return self.speech.shape[1]

    @property
    def text_dim(self) -> int:
        """Dimension Dt of the text features."""
        return self.text.shape[1]

    @property
    def class_counts(self) -> np.ndarray:
        """Number of utterances per class, [C] int64."""
        return np.bincount(self.label[self.label != UNLABELED], minlength=len(self.class_names))

    def fingerprint(self) -> str:
        """Returns a hash of everything that training reads, including the features."""
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
            *(values for values in (self.score, self.ratings) if values is not None),
        )

    def summary(self) -> dict[str, str]:
        """Returns a table that describes the split, as a dict from row labels to values."""
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
