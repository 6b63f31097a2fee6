"""Summarizes datasets for `mister-jax prepare --inspect`."""

import dataclasses

import numpy as np
from etils import epath

from mister_jax.data.audio import SAMPLE_RATE
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.features import load_features
from mister_jax.data.schema import UNLABELED
from mister_jax.data.storage import open_builder, split_sizes, utterance_fields


@dataclasses.dataclass(frozen=True)
class DatasetSummary:
    """Summary of a dataset.

    Attributes:
        name: Name of the dataset.
        directory: Directory of the dataset.
        class_counts: Number of utterances by split, and then by class name or "unlabeled".
        lengths: Number of utterances in each dialogue [M] by split.
        seconds: Length of each recording [N] in seconds by split; empty for a feature dataset.
        first_dialogue: One line per utterance of the first dialogue.
    """

    name: str
    directory: epath.Path
    class_counts: dict[str, dict[str, int]]
    lengths: dict[str, np.ndarray]
    seconds: dict[str, np.ndarray]
    first_dialogue: tuple[str, ...]


def inspect_dataset(name: str, data_dir: epath.PathLike | None = None) -> DatasetSummary:
    """Reads and summarizes a dialogue or feature dataset.

    Raises:
        InputError: The dataset does not exist.
    """
    builder = open_builder(name, data_dir)
    fields = utterance_fields(builder)
    has_audio = "audio" in fields
    class_names = [*fields["label"].names, "unlabeled"]  # `UNLABELED` is -1, the last index.
    summary = DatasetSummary(name, epath.Path(builder.data_dir), {}, {}, {}, ())
    for split in split_sizes(builder):
        read = _read_dialogues if has_audio else _read_features
        labels, summary.lengths[split], seconds, first = read(name, split, data_dir)
        if has_audio:
            summary.seconds[split] = seconds
        counts = np.bincount(labels % len(class_names), minlength=len(class_names)).tolist()
        if not counts[UNLABELED]:
            counts.pop()
        summary.class_counts[split] = dict(zip(class_names, counts, strict=False))
        if not summary.first_dialogue:
            lines = (f"{id_}  {class_names[label]}  {detail}" for id_, label, detail in first)
            summary = dataclasses.replace(summary, first_dialogue=tuple(lines))
    return summary


Part = tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[str, int, str]]]
"""Labels, dialogue lengths and recording seconds of a split, and the id, label and details of each
utterance in its first dialogue."""


def _read_dialogues(name: str, split: str, data_dir: epath.PathLike | None) -> Part:
    labels, lengths, seconds, first = [], [], [], []
    for dialogue in DialogueDataset(name, data_dir).dialogues(split):
        lengths.append(len(dialogue.utterances))
        for turn in dialogue.utterances:
            labels.append(turn.label)
            turn_seconds = len(turn.audio) / SAMPLE_RATE
            if turn.speech_present:
                seconds.append(turn_seconds)
            if len(lengths) == 1:
                first.append((turn.id, turn.label, f"{turn_seconds:.2f} s  {turn.text}"))
    return np.array(labels), np.array(lengths), np.array(seconds), first


def _read_features(name: str, split: str, data_dir: epath.PathLike | None) -> Part:
    features = load_features(name, split, data_dir)
    first = [
        (
            features.utterance_ids[row],
            int(features.label[row]),
            f"speech {_norm(features.speech[row])}  text {_norm(features.text[row])}",
        )
        for row in range(int(features.lengths[0]))
    ]
    return features.label, features.lengths, np.zeros(0), first


def _norm(vector: np.ndarray) -> str:
    return f"[{len(vector)}] of length {np.linalg.norm(vector.astype(np.float32)):.2f}"
