"""Writes feature datasets, by extraction with an encoder or by merging two feature datasets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mister_jax import data
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.feature_files import write_feature_file
from mister_jax.data.utterances import Utterances
from mister_jax.errors import InputError
from mister_jax.extraction.encoder import Encoder, encode_items


def extract_features(
    encoder: Encoder,
    dataset: str,
    output: str,
    data_dir: epath.PathLike | None = None,
    *,
    budget: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Any:
    """Extracts features from all splits of a dialogue dataset, and writes a feature dataset.

    An interrupted extraction resumes if the encoder, the dataset and the budget are unchanged.

    Args:
      encoder: Encoder of text or speech.
      dataset: Name of the dialogue dataset.
      output: Name of the feature dataset. It contains only the encoder's modality; use
        `merge_features` to add the other modality.
      data_dir: Directory of the datasets.
      budget: Maximum number of tokens or seconds of audio in a batch on each device, including
        padding; `encoder.input.budget` by default.
      overwrite: Whether to replace an existing dataset.
      quiet: Whether to hide progress.

    Returns:
      The feature dataset's TFDS builder in process 0, None in other processes.

    Raises:
      InputError: The dataset does not exist or a split lacks the modality, the output exists or
        cannot be written, or a batch does not fit in the devices' memory.
    """
    source = DialogueDataset(dataset, data_dir)
    target = data.dataset_directory(output, data_dir)
    if "/" in output:
        raise InputError(f"--output={output}; allowed: lower-case letters, digits and _")
    if target.exists() and not overwrite:
        raise InputError(f"{target}: dataset exists; allowed: another --output, or --overwrite")
    budget = encoder.input.budget if budget is None else budget
    metadata = {"dataset": dataset, "budget": budget, **encoder.metadata}
    root, prefix = target.parent.parent, f".extracting.{output}."
    splits = {}
    compiled_shapes: set[tuple[int, int]] = set()
    for split in source.splits:
        # Splits are loaded one at a time, because all recordings of a split are held in memory.
        utterances = encoder.input.load(dataset, split, data_dir)
        if not utterances.items:
            reason = _explain_no_speech(source, split) if encoder.modality == "speech" else ""
            raise InputError(
                f"dataset {dataset}, split {split}: no utterance has {encoder.modality}{reason}"
            )
        encoded = encode_items(
            encoder,
            utterances.items,
            budget,
            unit=f"utterances of {split}",
            quiet=quiet,
            resume_dir=root / f"{prefix}{_digest(metadata, split, utterances)}",
            compiled_shapes=compiled_shapes,
        )
        features = dict(zip(utterances.utterance_ids.tolist(), encoded, strict=True))
        del utterances
        splits[split] = _dialogue_features(source, split, encoder.modality, features)
    # Partial results may be deleted only after all processes have read them.
    multihost_utils.sync_global_devices("extracted")
    if jax.process_index() != 0:
        return None
    builder = data.write_features(
        splits, output, data_dir, metadata={encoder.modality: metadata}, overwrite=overwrite
    )
    for resume_dir in root.glob(f"{prefix}*"):  # including partial results of other encoders
        resume_dir.rmtree()
    return builder


def _explain_no_speech(source: DialogueDataset, split: str) -> str:
    turns = (turn for dialogue in source.dialogues(split) for turn in dialogue.utterances)
    if any(turn.speech_present for turn in turns):
        return ", because all recordings are silent"
    return ", because the split has no usable recordings"


def _digest(metadata: dict[str, Any], split: str, utterances: Utterances) -> str:
    """Returns a hash of the encoder's metadata, the budget, and the utterances of a split."""
    digest = hashlib.sha256(json.dumps([metadata, split], sort_keys=True).encode())
    digest.update(json.dumps(utterances.utterance_ids.tolist()).encode())
    for item in utterances.items:
        digest.update(f"{len(item)};".encode())
        digest.update(item.tobytes())
    return digest.hexdigest()[:16]


def _dialogue_features(
    source: DialogueDataset, split: str, modality: str, features: dict[str, np.ndarray]
) -> data.DialogueFeatures:
    """Returns a split with one modality, given the features [F] by utterance id."""
    dialogues, turns = [], []
    for dialogue in source.dialogues(split):
        dialogues.append((dialogue.id, len(dialogue.utterances)))
        turns += [
            (turn.id, turn.label, turn.score, turn.ratings, json.dumps(dict(turn.metadata)))
            for turn in dialogue.utterances
        ]
    dialogue_ids, lengths = zip(*dialogues, strict=True)
    utterance_ids, labels, scores, ratings, utterance_metadata = zip(*turns, strict=True)
    missing = np.zeros_like(next(iter(features.values())))
    other = "text" if modality == "speech" else "speech"
    return data.DialogueFeatures(
        name=source.name,
        split=split,
        class_names=source.class_names,
        dialogue_ids=dialogue_ids,
        lengths=np.array(lengths),
        utterance_ids=np.array(utterance_ids),
        label=np.array(labels, np.int32),
        score=np.array(scores, np.float32) if source.scored else None,
        ratings=np.stack(ratings) if source.rated else None,
        metadata=source.split_metadata(split),
        utterance_metadata=np.array(utterance_metadata) if source.has_metadata else None,
        **{
            modality: np.stack([features.get(id_, missing) for id_ in utterance_ids]),
            f"{modality}_present": np.array([id_ in features for id_ in utterance_ids]),
            other: np.zeros((len(turns), 1), np.float32),
            f"{other}_present": np.zeros(len(turns), bool),
        },
    )


def export_features(
    name: str,
    files: Sequence[pathlib.Path],
    data_dir: epath.PathLike | None = None,
    *,
    times_of: str = "",
) -> None:
    """Writes a feature dataset to npz, CSV or Parquet files; see `write_feature_file`.

    Args:
      name: Name of the feature dataset.
      files: Files to write; existing files are replaced.
      data_dir: Directory of the datasets.
      times_of: Name of the dialogue dataset that contains the start and end of the utterances; if
        empty, the files have no times.

    Raises:
      InputError: The dataset does not exist or has no features, or a file cannot be written.
    """
    splits = {
        split: data.load_features(name, split, data_dir)
        for split in data.split_names(name, data_dir)
    }
    times: dict[str, dict[tuple[str, str], float]] = {"start": {}, "end": {}}
    if times_of:
        source = DialogueDataset(times_of, data_dir)
        for split in splits:
            for dialogue in source.dialogues(split):
                for turn in dialogue.utterances:
                    times["start"][split, turn.id] = turn.start
                    times["end"][split, turn.id] = turn.end
    are_known = np.isfinite(list(times["start"].values())).any()
    for path in files:
        write_feature_file(path, splits, times if are_known else None)


def merge_features(
    speech: str,
    text: str,
    output: str,
    data_dir: epath.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> Any:
    """Merges the speech of one feature dataset and the text of another into a new dataset.

    Args:
      speech: Name of the dataset with the speech.
      text: Name of the dataset with the text, which also determines the order of dialogues and
        utterances. Both datasets must have the same utterances with the same labels.
      output: Name of the merged dataset.
      data_dir: Directory of the datasets.
      overwrite: Whether to replace an existing dataset.

    Returns:
      The merged dataset's TFDS builder in process 0, None in other processes.

    Raises:
      InputError: The datasets have different splits, utterances or labels, one of them lacks the
        requested modality, or the output exists or cannot be written.
    """
    names = {name: sorted(data.split_names(name, data_dir)) for name in (speech, text)}
    if names[speech] != names[text]:
        raise InputError(
            f"{speech} has splits {names[speech]}, but {text} has {names[text]}; needed: the same "
            "splits"
        )
    splits = {
        split: _merge_split(*(data.load_features(name, split, data_dir) for name in (speech, text)))
        for split in names[text]
    }
    for name, modality in ((speech, "speech"), (text, "text")):
        if not any(getattr(split, f"{modality}_present").any() for split in splits.values()):
            raise InputError(f"dataset {name}: no utterance has {modality}")
    if jax.process_index() != 0:
        return None
    return data.write_features(splits, output, data_dir, overwrite=overwrite)


def _merge_split(
    speech: data.DialogueFeatures, text: data.DialogueFeatures
) -> data.DialogueFeatures:
    where = f"{speech.name} and {text.name}, split {text.split}"
    if speech.class_names != text.class_names:
        raise InputError(
            f"{where}: classes {speech.class_names} and {text.class_names}; needed: the same "
            "classes"
        )
    speech_rows = {id_: row for row, id_ in enumerate(speech.utterance_ids.tolist())}
    unmatched = sorted(speech_rows.keys() ^ set(text.utterance_ids.tolist()))
    if unmatched:
        raise InputError(
            f"{where}: {len(unmatched)} utterances are in only one of the datasets, for example "
            f"{unmatched[0]}"
        )
    rows = np.array([speech_rows[id_] for id_ in text.utterance_ids.tolist()])
    differences = np.flatnonzero(speech.label[rows] != text.label)
    if len(differences):
        raise InputError(
            f"{where}: {len(differences)} labels differ, for example the label of utterance "
            f"{text.utterance_ids[differences[0]]}"
        )
    # Each dataset may itself be merged, with metadata of a modality that is not used here.
    metadata = {**speech.metadata, **text.metadata}
    for modality, features in (("speech", speech), ("text", text)):
        metadata.pop(modality, None)
        if modality in features.metadata:
            metadata[modality] = features.metadata[modality]
    return dataclasses.replace(
        text,
        speech=speech.speech[rows],
        speech_present=speech.speech_present[rows],
        metadata=metadata,
    )
