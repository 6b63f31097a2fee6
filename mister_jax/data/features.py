"""Feature datasets: dialogues of utterance vectors, stored with TFDS.

`feature_files` reads features from files, and `pipeline` makes batches of a loaded split.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from mister_jax.data.lazy import tfds
from mister_jax.data.schema import MODALITIES, SPLITS, DialogueFeatures
from mister_jax.data.storage import (
    VERSION,
    atomic_dataset,
    dataset_directory,
    open_builder,
    read_split,
    silence_tfds,
    split_sizes,
    utterance_fields,
)
from mister_jax.errors import InputError
from mister_jax.moved_paths import find_moved_encoder, location

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder


def write_features(
    splits: Mapping[str, DialogueFeatures],
    name: str,
    data_dir: epath.PathLike | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> "DatasetBuilder":
    """Atomically stores splits as a feature dataset.

    All splits must have the same dimensions, dtypes and class names. An optional array, such as
    `score`, must be in all splits or in none. `metadata` contains JSON values about the whole
    dataset. `load_features` merges these values with the metadata of a split.

    Returns:
        The dataset's TFDS builder.

    Raises:
        InputError: The name is not allowed, the dataset exists, or the directory cannot be written.
        ValueError: The splits do not match, or the name of a split is not in `SPLITS`.
    """
    if "/" in name:
        raise InputError(f"dataset name {name!r}; allowed: lower-case letters, digits and _")
    spec = _feature_spec(splits)
    split_metadata = {split: features.metadata for split, features in splits.items()}
    with atomic_dataset(name, data_dir, overwrite=overwrite) as temporary:
        with silence_tfds():
            builder = tfds.dataset_builders.store_as_tfds_dataset(
                name=name,
                version=VERSION,
                features=spec,
                split_datasets={split: _examples(splits[split]) for split in splits},
                data_dir=temporary,
                description="Dialogues of utterances as speech and text features.",
                disable_shuffling=True,
            )
        all_metadata = tfds.core.MetadataDict(
            {
                **(metadata or {}),
                "location": location(dataset_directory(name, data_dir)),
                "splits": split_metadata,
            }
        )
        all_metadata.save_metadata(builder.data_dir)
    return open_builder(name, data_dir)


def split_names(name: str, data_dir: epath.PathLike | None = None) -> tuple[str, ...]:
    """Returns the names of a dataset's nonempty splits.

    Raises:
        InputError: The dataset does not exist.
    """
    return tuple(split_sizes(open_builder(name, data_dir)))


def load_features(
    name: str, split: str, data_dir: epath.PathLike | None = None
) -> DialogueFeatures:
    """Loads a split of a feature dataset into memory.

    Returns:
        The split in stored order, with the metadata of the dataset and of the split. If encoders
        have moved together with the dataset, the metadata contains the new paths.

    Raises:
        InputError: The dataset or split does not exist, or the dataset contains no features.
        RuntimeError: The test split is opened during training.
    """
    builder = open_builder(name, data_dir)
    fields = utterance_fields(builder)
    if "speech" not in fields or "text" not in fields:
        raise InputError(
            f"{builder.data_dir}: a dataset without features; needed: a dataset that "
            "`mister-jax extract` or `mister-jax prepare --corpus=features` has written"
        )
    dialogues = list(read_split(builder, split))
    utterances = [dialogue["utterances"] for dialogue in dialogues]

    def concatenate(field: str) -> np.ndarray:
        return np.concatenate([values[field] for values in utterances])

    def concatenate_text(field: str) -> np.ndarray:
        return np.array([text.decode() for text in concatenate(field)])

    metadata = dict(builder.info.metadata or {})
    metadata |= metadata.pop("splits", {}).get(split, {})
    stored_location = metadata.pop("location", None)
    for modality in MODALITIES:
        if stored_location and modality in metadata:
            metadata[modality] = find_moved_encoder(
                metadata[modality], stored_location, builder.data_dir
            )
    return DialogueFeatures(
        name=name,
        split=split,
        class_names=tuple(fields["label"].names),
        dialogue_ids=tuple(dialogue["dialogue"].decode() for dialogue in dialogues),
        lengths=np.array([len(values["label"]) for values in utterances]),
        utterance_ids=concatenate_text("utterance"),
        speech=concatenate("speech"),
        text=concatenate("text"),
        speech_present=concatenate("speech_present"),
        text_present=concatenate("text_present"),
        label=concatenate("label").astype(np.int32),
        score=concatenate("score") if "score" in fields else None,
        ratings=concatenate("ratings") if "ratings" in fields else None,
        metadata=metadata,
        utterance_metadata=concatenate_text("metadata") if "metadata" in fields else None,
    )


def _feature_spec(splits: Mapping[str, DialogueFeatures]) -> Any:
    """Returns the TFDS feature specification, which must be the same for all splits."""
    specs = {
        (
            split.class_names,
            split.speech_dim,
            split.text_dim,
            split.speech.dtype,
            split.text.dtype,
            split.score is not None,
            split.ratings is not None,
            split.utterance_metadata is not None,
        )
        for split in splits.values()
    }
    if len(specs) != 1:
        raise ValueError(f"splits must have the same classes, dims, dtypes and scores, got {specs}")
    unknown = set(splits) - set(SPLITS)
    if unknown:
        raise ValueError(f"splits {sorted(unknown)}; allowed: {', '.join(SPLITS)}")
    (spec,) = specs
    class_names, speech_dim, text_dim, speech_dtype, text_dtype, scored, rated, has_metadata = spec
    # Bytes are written many times faster than float lists and, for float16, take half the space.
    utterance = {
        "utterance": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=class_names),
        "speech": tfds.features.Tensor(shape=(speech_dim,), dtype=speech_dtype, encoding="bytes"),
        "text": tfds.features.Tensor(shape=(text_dim,), dtype=text_dtype, encoding="bytes"),
        "speech_present": np.bool_,
        "text_present": np.bool_,
    }
    if scored:
        utterance["score"] = np.float32
    if rated:
        utterance["ratings"] = tfds.features.Tensor(shape=(len(class_names),), dtype=np.float32)
    if has_metadata:
        utterance["metadata"] = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {"dialogue": tfds.features.Text(), "utterances": tfds.features.Sequence(utterance)}
    )


def _examples(features: DialogueFeatures) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields a split's keys and examples for TFDS."""
    columns = {
        "utterance": features.utterance_ids,
        "label": features.label,
        "speech": features.speech,
        "text": features.text,
        "speech_present": features.speech_present,
        "text_present": features.text_present,
        "score": features.score,
        "ratings": features.ratings,
        "metadata": features.utterance_metadata,
    }
    for index, dialogue in enumerate(features.dialogue_ids):
        rows = slice(features.offsets[index], features.offsets[index + 1])
        utterances = {
            field: values[rows] for field, values in columns.items() if values is not None
        }
        yield index, {"dialogue": dialogue, "utterances": utterances}
