"""Datasets of features: of one encoder's, and of two modalities together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mister_jax import data
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.utterances import Utterances
from mister_jax.errors import InputError
from mister_jax.extraction.encoders import Encoder
from mister_jax.extraction.encoding import encode_items


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
    """Writes the features of all splits of a dialogue dataset.

    An interrupted extraction resumes if encoder, dataset and budget are the same.

    Args:
      encoder: Encoder of text or speech.
      dataset: Name of the dialogue dataset.
      output: Name of the feature dataset; its other modality is missing, see `merge_features`.
      data_dir: Directory that holds datasets.
      budget: Tokens or seconds of audio in a batch on each device, padding counted; the input's
        default if None.
      overwrite: Replace a dataset of this name.
      quiet: Show no progress.

    Returns:
      The TFDS builder of the features; None for processes but the first.

    Raises:
      InputError: a dataset that is not there, or lacks the modality in a split; an output that is
        there or cannot be written; a batch that does not fit into the devices' memory.
    """
    source = DialogueDataset(dataset, data_dir)
    target = data.dataset_directory(output, data_dir)
    if "/" in output:
        raise InputError(f"--output={output}; allowed: lower-case letters, digits and _")
    if target.exists() and not overwrite:
        raise InputError(f"{target}: dataset exists; allowed: another --output, or --overwrite")
    budget = encoder.input.budget if budget is None else budget
    told = {"dataset": dataset, "budget": budget, **encoder.identity()}
    root, prefix = target.parent.parent, f".extracting.{output}."
    splits = {}
    for split in source.splits:
        # A split at a time: its recordings are in memory.
        utterances = encoder.input.load(dataset, split, data_dir)
        if not utterances.items:
            raise InputError(
                f"dataset {dataset}, split {split}: no utterance has {encoder.modality}"
            )
        parts = root / f"{prefix}{_digest(told, split, utterances)}"
        encoded = encode_items(
            encoder,
            utterances.items,
            budget,
            unit=f"utterances of {split}",
            quiet=quiet,
            parts=parts,
        )
        features = dict(zip(utterances.utterance_ids.tolist(), encoded, strict=True))
        splits[split] = _of_modality(source, split, encoder.modality, features, encoded.shape[1])
    # The parts are there until every process has read them.
    multihost_utils.sync_global_devices("extracted")
    if jax.process_index() != 0:
        return None
    metadata = {encoder.modality: told}
    builder = data.write_features(splits, output, data_dir, metadata=metadata, overwrite=overwrite)
    for left in root.glob(f"{prefix}*"):  # those of other encoders, too
        left.rmtree()
    return builder


def _digest(told: dict[str, Any], split: str, utterances: Utterances) -> str:
    """Returns a hash of everything that a split's features depend on."""
    digest = hashlib.sha256(json.dumps([told, split], sort_keys=True).encode())
    digest.update(json.dumps(utterances.utterance_ids.tolist()).encode())
    for item in utterances.items:
        digest.update(f"{len(item)};".encode())
        digest.update(item.tobytes())
    return digest.hexdigest()[:16]


def _of_modality(
    source: DialogueDataset,
    split: str,
    modality: str,
    features: dict[str, np.ndarray],
    width: int,
) -> data.DialogueFeatures:
    """Returns a split with these features by utterance, and without the other modality."""
    dialogues, turns = [], []
    for dialogue in source.dialogues(split):
        dialogues.append((dialogue.id, len(dialogue.utterances)))
        turns += [
            (turn.id, turn.label, turn.score, json.dumps(dict(turn.metadata)))
            for turn in dialogue.utterances
        ]
    dialogue_ids, lengths = zip(*dialogues, strict=True)
    utterance_ids, labels, scores, further = zip(*turns, strict=True)
    missing = np.zeros(width, np.float32)
    found = np.stack([features.get(utterance, missing) for utterance in utterance_ids])
    present = np.array([utterance in features for utterance in utterance_ids])
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
        metadata=source.split_metadata(split),
        utterance_metadata=np.array(further) if source.has_metadata else None,
        **{modality: found, f"{modality}_present": present},
        **{other: np.zeros((len(turns), 1), np.float32)},
        **{f"{other}_present": np.zeros(len(turns), bool)},
    )


def merge_features(
    speech: str,
    text: str,
    output: str,
    data_dir: epath.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> Any:
    """Writes a dataset with the speech of one feature dataset and the text of another.

    Args:
      speech: Dataset whose speech is taken.
      text: Dataset whose text is taken, and the order of dialogues and utterances; both have the
        same utterances with the same labels.
      output: Name of the merged dataset.
      data_dir: Directory that holds datasets.
      overwrite: Replace a dataset of this name.

    Returns:
      The TFDS builder of the merged dataset; None for processes but the first.

    Raises:
      InputError: the two are not of the same utterances, or lack what is taken.
    """
    names = {name: sorted(data.split_names(name, data_dir)) for name in (speech, text)}
    if names[speech] != names[text]:
        raise InputError(f"{speech} has splits {names[speech]}, {text} {names[text]}")
    splits = {
        split: _joined(*(data.load_features(name, split, data_dir) for name in (speech, text)))
        for split in names[text]
    }
    for name, modality in ((speech, "speech"), (text, "text")):
        if not any(getattr(split, f"{modality}_present").any() for split in splits.values()):
            raise InputError(f"dataset {name}: no utterance has {modality}")
    if jax.process_index() != 0:
        return None
    return data.write_features(splits, output, data_dir, overwrite=overwrite)


def _joined(speech: data.DialogueFeatures, text: data.DialogueFeatures) -> data.DialogueFeatures:
    """A split of `merge_features`."""
    where = f"{speech.name} and {text.name}, split {text.split}"
    if speech.class_names != text.class_names:
        raise InputError(f"{where}: classes {speech.class_names} and {text.class_names}")
    places = {utterance: row for row, utterance in enumerate(speech.utterance_ids.tolist())}
    alone = sorted(places.keys() ^ set(text.utterance_ids.tolist()))
    if alone:
        raise InputError(
            f"{where}: {len(alone)} utterances are in one of them alone, the first is {alone[0]}"
        )
    rows = np.array([places[utterance] for utterance in text.utterance_ids.tolist()])
    differ = np.flatnonzero(speech.label[rows] != text.label)
    if len(differ):
        raise InputError(
            f"{where}: {len(differ)} labels differ, the first is that of utterance "
            f"{text.utterance_ids[differ[0]]}"
        )
    # Either may be a merged one, and tell of a modality that is not taken.
    own = {
        name: told.metadata[name]
        for name, told in (("speech", speech), ("text", text))
        if name in told.metadata
    }
    others = {
        name: value
        for name, value in {**speech.metadata, **text.metadata}.items()
        if name not in ("speech", "text")
    }
    return dataclasses.replace(
        text,
        speech=speech.speech[rows],
        speech_present=speech.speech_present[rows],
        metadata={**others, **own},
    )
