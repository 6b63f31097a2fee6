"""Summaries of a dataset as numbers and text, from which a picture is drawn."""

import dataclasses

import numpy as np
from etils import epath

from mister_jax.data.audio import SAMPLE_RATE
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.features import load
from mister_jax.data.schema import UNLABELED
from mister_jax.data.storage import stored


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Summary of a dataset.

    Attributes:
        name: Name of the dataset.
        directory: Directory of the dataset.
        class_counts: Number of utterances by split and class name, or `unlabeled`.
        lengths: Numbers of utterances of the dialogues, [M], by split.
        seconds: Lengths of the recordings, [N], by split; empty for features.
        first: First dialogue, a line for each utterance.
    """

    name: str
    directory: epath.Path
    class_counts: dict[str, dict[str, int]]
    lengths: dict[str, np.ndarray]
    seconds: dict[str, np.ndarray]
    first: tuple[str, ...]


def inspect(name: str, data_dir: epath.PathLike | None = None) -> Inspection:
    """Reads a whole dataset of dialogues or features and returns its summary.

    Raises:
        InputError: The dataset does not exist.
    """
    builder = stored(name, data_dir)
    spec = dict(builder.info.features.items())
    has_audio = "audio" in getattr(spec.get("utterances"), "feature", {})
    return (_of_dialogues if has_audio else _of_features)(name, data_dir)


def _of_dialogues(name: str, data_dir: epath.PathLike | None) -> Inspection:
    dataset = DialogueDataset(name, data_dir)
    labels: dict[str, list[int]] = {}
    lengths: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {}
    first: tuple[str, ...] = ()
    for split in dataset.splits:
        labels[split], lengths[split], seconds[split] = [], [], []
        for dialogue in dataset.dialogues(split):
            lengths[split].append(len(dialogue.utterances))
            for turn in dialogue.utterances:
                labels[split].append(turn.label)
                if turn.speech_present:
                    seconds[split].append(len(turn.audio) / SAMPLE_RATE)
            if not first:
                first = tuple(
                    f"{turn.id}  {_name(turn.label, dataset.class_names)}  "
                    f"{len(turn.audio) / SAMPLE_RATE:.2f} s  {turn.text}"
                    for turn in dialogue.utterances
                )
    return Inspection(
        name,
        dataset.directory,
        {split: _counts(np.array(labels[split]), dataset.class_names) for split in labels},
        {split: np.array(values) for split, values in lengths.items()},
        {split: np.array(values) for split, values in seconds.items()},
        first,
    )


def _of_features(name: str, data_dir: epath.PathLike | None) -> Inspection:
    builder = stored(name, data_dir)
    splits = {
        split: load(name, split, data_dir)
        for split, info in builder.info.splits.items()
        if info.num_examples
    }
    features = next(iter(splits.values()))
    first = tuple(
        f"{features.utterance_ids[row]}  {_name(int(features.label[row]), features.class_names)}  "
        f"speech {_norm(features.speech[row])}  text {_norm(features.text[row])}"
        for row in range(int(features.lengths[0]))
    )
    return Inspection(
        name,
        epath.Path(builder.data_dir),
        {split: _counts(values.label, values.class_names) for split, values in splits.items()},
        {split: values.lengths for split, values in splits.items()},
        {},
        first,
    )


def _norm(vector: np.ndarray) -> str:
    return f"[{len(vector)}] of length {np.linalg.norm(vector.astype(np.float32)):.2f}"


def _name(label: int, class_names: tuple[str, ...]) -> str:
    return "unlabeled" if label == UNLABELED else class_names[label]


def _counts(labels: np.ndarray, class_names: tuple[str, ...]) -> dict[str, int]:
    counts = {name: int(np.sum(labels == index)) for index, name in enumerate(class_names)}
    unlabeled = int(np.sum(labels == UNLABELED))
    return counts | ({"unlabeled": unlabeled} if unlabeled else {})
