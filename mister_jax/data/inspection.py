"""Summarizes a dataset as numbers and text, which `evaluation.figures` plots."""

import dataclasses

import numpy as np
from etils import epath

from mister_jax.data.audio import SAMPLE_RATE
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.features import load_features
from mister_jax.data.schema import UNLABELED
from mister_jax.data.storage import open_builder


@dataclasses.dataclass(frozen=True)
class DatasetSummary:
    """Summary of a dataset.

    Attributes:
        name: Name of the dataset.
        directory: Directory of the dataset.
        class_counts: Number of utterances by split and class name, or `unlabeled`.
        lengths: Number of utterances in each dialogue [M] by split.
        seconds: Length of each recording [N] by split; empty for features.
        first_dialogue: One line per utterance of the first dialogue.
    """

    name: str
    directory: epath.Path
    class_counts: dict[str, dict[str, int]]
    lengths: dict[str, np.ndarray]
    seconds: dict[str, np.ndarray]
    first_dialogue: tuple[str, ...]


def inspect_dataset(name: str, data_dir: epath.PathLike | None = None) -> DatasetSummary:
    """Reads a dataset of dialogues or features and returns its summary.

    Raises:
        InputError: The dataset does not exist.
    """
    builder = open_builder(name, data_dir)
    spec = dict(builder.info.features.items())
    has_audio = "audio" in getattr(spec.get("utterances"), "feature", {})
    summarize = _summarize_dialogues if has_audio else _summarize_features
    return summarize(name, data_dir)


def _summarize_dialogues(name: str, data_dir: epath.PathLike | None) -> DatasetSummary:
    dataset = DialogueDataset(name, data_dir)
    labels: dict[str, list[int]] = {}
    lengths: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {}
    first_dialogue: tuple[str, ...] = ()
    for split in dataset.splits:
        labels[split], lengths[split], seconds[split] = [], [], []
        for dialogue in dataset.dialogues(split):
            lengths[split].append(len(dialogue.utterances))
            for turn in dialogue.utterances:
                labels[split].append(turn.label)
                if turn.speech_present:
                    seconds[split].append(len(turn.audio) / SAMPLE_RATE)
            if not first_dialogue:
                first_dialogue = tuple(
                    f"{turn.id}  {_class_name(turn.label, dataset.class_names)}  "
                    f"{len(turn.audio) / SAMPLE_RATE:.2f} s  {turn.text}"
                    for turn in dialogue.utterances
                )
    return DatasetSummary(
        name=name,
        directory=dataset.directory,
        class_counts={
            split: _class_counts(np.array(values), dataset.class_names)
            for split, values in labels.items()
        },
        lengths={split: np.array(values) for split, values in lengths.items()},
        seconds={split: np.array(values) for split, values in seconds.items()},
        first_dialogue=first_dialogue,
    )


def _summarize_features(name: str, data_dir: epath.PathLike | None) -> DatasetSummary:
    builder = open_builder(name, data_dir)
    splits = {
        split: load_features(name, split, data_dir)
        for split, info in builder.info.splits.items()
        if info.num_examples
    }
    features = next(iter(splits.values()))
    first_dialogue = tuple(
        f"{features.utterance_ids[row]}  "
        f"{_class_name(int(features.label[row]), features.class_names)}  "
        f"speech {_norm(features.speech[row])}  text {_norm(features.text[row])}"
        for row in range(int(features.lengths[0]))
    )
    return DatasetSummary(
        name=name,
        directory=epath.Path(builder.data_dir),
        class_counts={
            split: _class_counts(values.label, values.class_names)
            for split, values in splits.items()
        },
        lengths={split: values.lengths for split, values in splits.items()},
        seconds={},
        first_dialogue=first_dialogue,
    )


def _norm(vector: np.ndarray) -> str:
    return f"[{len(vector)}] of length {np.linalg.norm(vector.astype(np.float32)):.2f}"


def _class_name(label: int, class_names: tuple[str, ...]) -> str:
    return "unlabeled" if label == UNLABELED else class_names[label]


def _class_counts(labels: np.ndarray, class_names: tuple[str, ...]) -> dict[str, int]:
    counts = {name: int(np.sum(labels == index)) for index, name in enumerate(class_names)}
    num_unlabeled = int(np.sum(labels == UNLABELED))
    return counts | ({"unlabeled": num_unlabeled} if num_unlabeled else {})
