"""Reads dialogue datasets: recordings, transcripts and labels, one dialogue at a time."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from mister_jax.data.storage import REPORT, open_builder, read_split, split_sizes, utterance_fields
from mister_jax.errors import InputError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder


@dataclasses.dataclass(frozen=True, eq=False)
class StoredUtterance:
    """Utterance in a stored dialogue.

    Attributes:
        id: Utterance id, unique in the dataset.
        audio: Samples, [S] int16, 16 kHz, mono; empty if the speech is missing.
        text: Transcript; empty if missing.
        label: Index of the class, or `UNLABELED`.
        score: Sentiment; NaN if missing.
        ratings: Number of raters per class, [C] float32; None for a dataset without ratings.
        start, end: Start and end in seconds from the beginning of the dialogue; NaN if unknown.
        speech_present: Whether the utterance has a usable recording.
        text_present: Whether the utterance has a transcript.
        metadata: Extra columns of the manifest by name.
    """

    id: str
    audio: np.ndarray
    text: str
    label: int
    score: float
    ratings: np.ndarray | None
    start: float
    end: float
    speech_present: bool
    text_present: bool
    metadata: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class StoredDialogue:
    """Dialogue in a dataset, with utterances in spoken order."""

    id: str
    utterances: tuple[StoredUtterance, ...]


class DialogueDataset:
    """Reads a dialogue dataset `DATASET/CONFIG` that `mister-jax prepare` has written.

    Raises:
        InputError: The dataset does not exist, or does not contain recordings and transcripts.
    """

    def __init__(self, name: str, data_dir: epath.PathLike | None = None) -> None:
        self.name = name
        self._builder: DatasetBuilder = open_builder(name, data_dir)
        self.directory = epath.Path(self._builder.data_dir)
        fields = utterance_fields(self._builder)
        if "audio" not in fields:
            raise InputError(
                f"{self.directory}: a dataset of features; needed: a dataset of dialogues that "
                "`mister-jax prepare` has written"
            )
        self.class_names: tuple[str, ...] = tuple(fields["label"].names)
        self.scored = "score" in fields
        self.rated = "ratings" in fields
        self.has_metadata = "metadata" in fields

    @property
    def splits(self) -> dict[str, int]:
        """Number of dialogues in each split that is not empty."""
        return split_sizes(self._builder)

    def split_metadata(self, split: str) -> dict[str, Any]:
        """Returns `{"reference_scores": ...}` for a synthetic split, and {} for other splits.

        See `dialogue_process.reference_scores`.
        """
        path = self.directory / REPORT
        scores = json.loads(path.read_text()).get("reference_scores", {}) if path.exists() else {}
        return {"reference_scores": scores[split]} if split in scores else {}

    def dialogues(self, split: str) -> Iterator[StoredDialogue]:
        """Reads a split's dialogues in stored order.

        Raises:
            InputError: The split does not exist, or a file is missing or damaged.
            RuntimeError: The test split is opened during training.
        """
        return map(self._dialogue, read_split(self._builder, split))

    def _dialogue(self, example: dict[str, Any]) -> StoredDialogue:
        utterances = tuple(
            StoredUtterance(
                id=values["utterance"].decode(),
                audio=values["audio"],
                text=values["text"].decode(),
                label=int(values["label"]),
                score=float(values.get("score", np.nan)),
                ratings=values.get("ratings"),
                start=float(values["start"]),
                end=float(values["end"]),
                speech_present=bool(values["speech_present"]),
                text_present=bool(values["text_present"]),
                metadata=json.loads(values.get("metadata", b"{}")),
            )
            for values in example["utterances"]
        )
        return StoredDialogue(example["dialogue"].decode(), utterances)
