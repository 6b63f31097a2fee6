"""Reads feature files that list dialogues as records.

DAG-ERC (ACL 2021) has one JSON file per split, which contains a list of dialogues. A dialogue is a
list of utterances such as `{"text": ..., "speaker": ..., "label": ..., "cls": [...]}`. Other
projects pickle a dict of splits, in which a dialogue is either such a list or a dict that maps each
field to a list.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mister_jax.data.feature_files.dialogue_fields import (
    DialogueFields,
    has_name,
    open_dialogue_fields,
)
from mister_jax.data.feature_files.unpickling import load_pickle
from mister_jax.errors import InputError

_SPLITS = {"train": "train", "dev": "validation", "val": "validation", "test": "test"}
_ID_KEYS = ("vid", "id", "dialogue", "dialogue_id", "dialog_id", "conv_id")


def split_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the JSON file of each split in a folder, recognized by the start of the file name."""
    files: dict[str, pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
        if ".json" not in path.name or not path.is_file():
            continue
        for prefix, split in _SPLITS.items():
            if path.name.startswith(prefix) and files.setdefault(split, path) != path:
                raise InputError(
                    f"{folder}: {files[split].name} and {path.name} for the split {split}; "
                    "allowed: one file"
                )
    return files


def read_json(path: pathlib.Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON, or truncated") from error


def open_split_folder(folder: pathlib.Path) -> DialogueFields:
    """Opens a folder in DAG-ERC's layout, with a JSON file for each split.

    If the folder contains `label_vocab.pkl`, that file determines the order of the classes.

    Raises:
        InputError: The folder has no JSON file for the training split, or a file cannot be used.
    """
    files = split_files(folder)
    if "train" not in files:
        raise InputError(
            f"{folder}: no feature files; needed in a folder: train*.json*, dev*.json* and "
            "test*.json* with lists of dialogues"
        )
    content = {split: read_json(path) for split, path in files.items()}
    names: list[str] = []
    if (folder / "label_vocab.pkl").is_file():
        vocabulary = load_pickle(folder / "label_vocab.pkl")
        if isinstance(vocabulary, dict) and isinstance(vocabulary.get("itos"), list):
            names = [str(name) for name in vocabulary["itos"]]
    source = open_records(folder, content, class_names=names)
    if source is None:
        raise InputError(
            f"{folder}: {files['train'].name}: no dialogues with features; needed: a list of "
            'dialogues, each a list of utterances with "text", "speaker", "label" and "cls"'
        )
    return source


def open_records(
    path: pathlib.Path, content: Any, *, class_names: list[str] | None = None
) -> DialogueFields | None:
    """Opens a list of dialogues, or a dict with such a list for each split.

    Returns:
        The source, or None if the content has another layout.

    Raises:
        InputError: A dialogue id occurs twice.
    """
    splits: Mapping[str, Any]
    if isinstance(content, list):
        splits = {"": content}
    elif isinstance(content, dict) and content and all(key in _ALL_SPLITS for key in content):
        splits = {_ALL_SPLITS[key]: dialogues for key, dialogues in content.items()}
    else:
        return None
    fields: dict[str, Any] = {}
    for split, dialogues in splits.items():
        if not isinstance(dialogues, list) or not dialogues:
            return None
        for index, dialogue in enumerate(dialogues):
            name = f"{split}_{index}" if split else str(index)
            if isinstance(dialogue, dict):
                if not any(has_name(str(key), "label") for key in dialogue):
                    return None
                ids = [
                    dialogue[key] for key in _ID_KEYS if isinstance(dialogue.get(key), str | int)
                ]
                name = str(ids[0]) if ids else name
                values = {key: value for key, value in dialogue.items() if key not in _ID_KEYS}
            elif _is_list_of_records(dialogue):
                keys = dict.fromkeys(key for utterance in dialogue for key in utterance)
                values = {key: [utterance.get(key) for utterance in dialogue] for key in keys}
            else:
                return None
            for key, value in values.items():
                if name in fields.setdefault(str(key), {}):
                    raise InputError(f"{path}: dialogue {name} occurs twice")
                fields[str(key)][name] = value
            if split:
                fields.setdefault(f"{split}_ids", []).append(name)
    return open_dialogue_fields(
        path, fields, layout="list of dialogues (DAG-ERC)", class_names=class_names or ()
    )


_ALL_SPLITS = _SPLITS | {"valid": "validation", "validation": "validation"}


def _is_list_of_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
