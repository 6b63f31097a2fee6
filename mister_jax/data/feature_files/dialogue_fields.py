"""Reads feature files with a tuple, list or dict of fields, where a field is a dict of dialogues.

DialogueRNN (arXiv 1811.00405) introduced this kind of file. Most later work on emotion recognition
in conversations also uses such files, but with other fields or another order of the fields. This
module recognizes the fields of a tuple or a list by their kinds and order, and the fields of a dict
by their names and kinds.
"""

import copy
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from mister_jax.data.feature_files.source import Columns, FeatureSource, Field, Roles, shorten
from mister_jax.data.feature_files.values import (
    FEATURES,
    IDS,
    INTEGERS,
    NUMBERS,
    ONE_HOT,
    OTHER,
    TEXT,
    as_labels,
    clean_text,
    identifier,
    kind_of,
    stack_features,
)
from mister_jax.data.schema import MODALITIES, SPEAKER_IN_DIALOGUE, SPLITS, UNLABELED

_ALL = (FEATURES, ONE_HOT, INTEGERS, NUMBERS, TEXT, OTHER)

# Allowed kinds of fields for each role, and for the other entries in `_LAYOUTS`.
_KINDS = {
    **dict.fromkeys(("text", "speech", "visual", "other_text"), (FEATURES,)),
    **dict.fromkeys(SPLITS, (IDS,)),
    "label": (INTEGERS,),
    "other_label": (INTEGERS,),
    "score": (NUMBERS, INTEGERS),
    "speaker": (TEXT, ONE_HOT, INTEGERS),
    "sentence": (TEXT,),
    "utterance": _ALL,
    "any": (*_ALL, IDS),
}
_CHOOSABLE = {**_KINDS, "label": (INTEGERS, TEXT, ONE_HOT)}
_NOTES = {
    "visual": "visual features",
    "other_text": "other text features",
    "other_label": "other labels",
}

_SPLIT_LISTS = "train test"
_LAYOUTS = {
    "DialogueRNN, DialogueGCN, MMGCN, MM-DFN (IEMOCAP)": (
        f"utterance speaker label text speech visual sentence {_SPLIT_LISTS}"
    ),
    "MMGCN, MM-DFN (MELD)": (
        f"utterance speaker label text speech visual sentence {_SPLIT_LISTS} any"
    ),
    "DialogueRNN, DialogueGCN (MELD)": (
        f"utterance speaker label text speech sentence {_SPLIT_LISTS} other_label"
    ),
    # The four text fields are the last four layers of RoBERTa, which COSMIC averages.
    "COSMIC (IEMOCAP, DailyDialog, EmoryNLP)": (
        f"speaker label text text text text sentence {_SPLIT_LISTS} validation"
    ),
    "COSMIC (MELD)": (
        f"speaker label other_label text text text text sentence {_SPLIT_LISTS} validation"
    ),
    # SDT and GraphSmile use only the first text field, the last layer of RoBERTa.
    "SDT, GraphSmile (IEMOCAP)": (
        "utterance speaker label text other_text other_text other_text speech visual sentence "
        f"{_SPLIT_LISTS}"
    ),
    "SDT (MELD)": (
        "utterance speaker label text other_text other_text other_text speech visual sentence "
        f"{_SPLIT_LISTS} any"
    ),
    "GraphSmile (MELD)": (
        "utterance speaker label other_label text other_text other_text other_text speech visual "
        f"sentence {_SPLIT_LISTS} any"
    ),
    "MMGCN (DailyDialog)": f"speaker text other_label label {_SPLIT_LISTS} validation",
}
"""Maps the name of a layout to one entry per field: a role, a key of `_NOTES`, or "any"."""

# Regular expressions for the names of fields in dicts. `has_name` lowercases a name, removes
# underscores and spaces, and matches the result with and without a leading "video".
_NAMES = {
    "text": r"(text|textual|language|roberta|bert|cls)(features?)?[01]?",
    "speech": r"(audio|acoustic|speech|a)(features?)?",
    "visual": r"(visual|vision|video|v)(features?)?",
    "label": r"(emotion)?(labels?|emotions?)",
    "other_label": r"sentiment(label)?s?",
    "speaker": r"speakers?",
    "sentence": r"(sentences?|texts?|rawtext|utterances?)",
    "utterance": r"(ids?|utteranceids?|uttids?)",
    "train": r"train(vid|ids?|keys)?s?",
    "validation": r"(dev|val|valid|validation)(vid|ids?|keys)?s?",
    "test": r"test(vid|ids?|keys)?s?",
}

_NUM_SAMPLED = 50


@dataclasses.dataclass
class _DialogueField:
    """A field with either the values of each dialogue (`values`) or dialogue ids (`ids`)."""

    kind: str
    dim: int = 0
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    ids: list[str] = dataclasses.field(default_factory=list)


def open_dialogue_fields(
    path: pathlib.Path,
    content: Any,
    *,
    layout: str = "fields by name",
    class_names: Sequence[str] = (),
) -> "DialogueFields | None":
    """Recognizes fields that are dicts of dialogues.

    Args:
        path: Path of the file.
        content: Fields in a tuple, a list or a dict.
        layout: Name of the layout if `content` is a dict.
        class_names: Class names in the order of the labels, if known.

    Returns:
        The source, or None if the file has another layout.
    """
    is_dict = isinstance(content, dict)
    if not is_dict and not isinstance(content, list | tuple):
        return None
    entries = content.items() if is_dict else enumerate(content)
    named = {str(key): value for key, value in entries}
    dialogues = {
        id_
        for value in named.values()
        if isinstance(value, dict)
        for key in value
        if (id_ := identifier(key)) is not None
    }
    parsed = {key: _parse(value, dialogues) for key, value in named.items()}
    if not any(field.values and field.kind in (FEATURES, INTEGERS) for field in parsed.values()):
        return None
    if is_dict:
        roles = _match_names(parsed)
    else:
        layout, roles = _match_order(parsed)
    return DialogueFields(path, layout, parsed, roles, named, class_names)


def _parse(value: Any, dialogues: set[str]) -> _DialogueField:
    if isinstance(value, dict):
        values = {}
        for key, item in value.items():
            id_ = identifier(key)
            if id_ is None or id_ in values:
                return _DialogueField(OTHER)
            values[id_] = item
        kind, dim = _common_kind(values.values())
        return _DialogueField(kind, dim, values)
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        if isinstance(value, np.ndarray) and value.ndim != 1:
            return _DialogueField(OTHER)
        ids = [id_ for item in value if (id_ := identifier(item)) is not None]
        if isinstance(value, set | frozenset):
            ids.sort()
        if ids and len(ids) == len(value) and sum(id_ in dialogues for id_ in ids) * 2 > len(ids):
            return _DialogueField(IDS, ids=ids)
    return _DialogueField(OTHER)


def _common_kind(values: Iterable[Any]) -> tuple[str, int]:
    """Returns the kind that the first values of a field share, and the feature dimension."""
    kinds = (kind for value in values if (kind := kind_of(value)) is not None)
    sampled = list(itertools.islice(kinds, _NUM_SAMPLED))
    names = {kind for kind, _ in sampled}
    # A single dialogue can be misleading: all of its numbers may be integers, and all of its
    # feature vectors may look like one-hot rows.
    for broader, narrower in ((NUMBERS, INTEGERS), (FEATURES, ONE_HOT)):
        if broader in names:
            names.discard(narrower)
    if len(names) != 1:
        return OTHER, 0
    return names.pop(), max(dim for _, dim in sampled)


def _match_order(fields: Mapping[str, _DialogueField]) -> tuple[str, dict[str, list[str]]]:
    """Returns the first layout that matches the kinds of all fields, and the field keys by entry.

    If no layout matches, only the label is recognized, and only if exactly one field has integers.
    """
    for layout, order in _LAYOUTS.items():
        entries = order.split()
        if len(entries) == len(fields) and all(
            field.kind in _KINDS[entry]
            for entry, field in zip(entries, fields.values(), strict=True)
        ):
            keys: dict[str, list[str]] = {}
            for entry, key in zip(entries, fields, strict=True):
                keys.setdefault(entry, []).append(key)
            return layout, keys
    labels = [key for key, field in fields.items() if field.kind == INTEGERS]
    return f"unknown, {len(fields)} fields", {"label": labels} if len(labels) == 1 else {}


def _match_names(fields: Mapping[str, _DialogueField]) -> dict[str, list[str]]:
    """Returns, for each entry, the keys of the fields whose names and kinds fit the entry.

    An entry is a role or a key of `_NOTES`. A role has a single field: if several fields fit, only
    the field whose key is the role itself, such as "text". If there is no such field, the role is
    left out.
    """
    keys: dict[str, list[str]] = {}
    for key, field in fields.items():
        for entry in _NAMES:
            if field.kind in _CHOOSABLE.get(entry, ()) and has_name(key, entry):
                keys.setdefault(entry, []).append(key)
                break
    for entry, found in keys.items():
        if entry not in _NOTES and entry in found:
            keys[entry] = [entry]
    return {entry: found for entry, found in keys.items() if len(found) == 1 or entry in _NOTES}


def has_name(key: str, entry: str) -> bool:
    """Returns whether a field's name matches the regular expression of an entry in `_NAMES`."""
    name = key.casefold().replace("_", "").replace(" ", "")
    names = (name, name.removeprefix("video"))
    return any(re.fullmatch(_NAMES[entry], candidate) for candidate in names)


class DialogueFields(FeatureSource):
    """Feature file with one dict of dialogues per field."""

    averages: ClassVar[bool] = True

    def __init__(
        self,
        path: pathlib.Path,
        layout: str,
        fields: Mapping[str, _DialogueField],
        entries: Mapping[str, Sequence[str]],
        content: Mapping[str, Any],
        class_names: Sequence[str] = (),
    ) -> None:
        notes = {
            key: _NOTES[entry] for entry, keys in entries.items() for key in keys if entry in _NOTES
        }
        described = [
            _describe(key, field, content[key], notes.get(key, "")) for key, field in fields.items()
        ]
        roles = {role: tuple(keys) for role, keys in entries.items() if role in self.roles}
        super().__init__(path, layout, described, roles, class_names)
        self._fields = fields
        self._num_files = 1

    def join(self, other: "DialogueFields") -> "DialogueFields":
        """Returns a source with the fields of both files, such as the two files of M3NET.

        The keys of the other file's fields get a prefix with the position of the file, such as
        `2:`. The features of the other file replace the features of this file. The splits of the
        other file replace the splits of this file if only the other file has a validation split.
        """
        prefix = f"{self._num_files + 1}:"
        roles = dict(self.defaults)
        adds_validation = "validation" in other.defaults and "validation" not in roles
        replaced = (*MODALITIES, *(SPLITS if adds_validation else ()))
        for role, keys in other.defaults.items():
            if role in replaced or role not in roles:
                roles[role] = tuple(prefix + key for key in keys)
        joined = copy.copy(self)
        joined.defaults = roles
        joined.layout = f"{self.layout} + {other.layout}"
        joined.fields = (
            *self.fields,
            *(dataclasses.replace(field, key=prefix + field.key) for field in other.fields),
        )
        joined._fields = {
            **self._fields,
            **{prefix + key: field for key, field in other._fields.items()},
        }
        joined._num_files = self._num_files + 1
        return joined

    def columns(self, roles: Roles) -> Columns:
        """Returns the utterances of the dialogues in the splits.

        If the file has no splits, returns the utterances of all dialogues.
        """
        self._check(roles)
        (label_key,) = roles["label"]
        labels = {
            dialogue: self._labels(label_key, dialogue, values)
            for dialogue, values in self._fields[label_key].values.items()
        }
        labels = {dialogue: values for dialogue, values in labels.items() if values}
        if not labels:
            self.fail(f"field {label_key}: no labels")
        notes: list[str] = []
        split = self._splits(roles, labels, notes)
        dialogues = [dialogue for dialogue in labels if not split or dialogue in split]
        lengths = {dialogue: len(labels[dialogue]) for dialogue in dialogues}
        features = {
            modality: self._modality(modality, roles[modality], lengths, notes)
            for modality in MODALITIES
            if modality in roles
        }
        metadata = {}
        if "speaker" in roles:
            speakers = self._texts(roles["speaker"][0], lengths)
            # The same letter, number or one-hot row may stand for different speakers in different
            # dialogues.
            is_local = all(len(name) == 1 or name.isdecimal() for name in speakers if name)
            metadata[SPEAKER_IN_DIALOGUE if is_local else "speaker"] = speakers
        if "sentence" in roles:
            metadata["text"] = self._texts(roles["sentence"][0], lengths)
        score = None
        if "score" in roles:
            rows = self._rows(roles["score"][0], lengths)
            score = np.array([np.nan if row is None else row for row in rows], np.float32)
        flat = [label for dialogue in dialogues for label in labels[dialogue]]
        return Columns(
            dialogue=[dialogue for dialogue, count in lengths.items() for _ in range(count)],
            utterance=self._utterance_ids(roles.get("utterance", ()), lengths),
            position=[index for count in lengths.values() for index in range(count)],
            label=self._label_array(label_key, flat),
            split=[split[name] for name, count in lengths.items() for _ in range(count)]
            if split
            else None,
            features=features,
            score=score,
            metadata=metadata,
            notes=notes,
        )

    def _check(self, roles: Roles) -> None:
        """Raises InputError if a needed role is missing, or a field has the wrong kind."""
        for role, keys in roles.items():
            for key in keys:
                if self._fields[key].kind not in _CHOOSABLE[role]:
                    allowed = ", ".join(_CHOOSABLE[role])
                    self.fail(
                        f"--fields={role}={key}: field {key} holds {self._fields[key].kind}; "
                        f"allowed: {allowed}"
                    )
        used = {key for keys in roles.values() for key in keys}
        unused = [key for key, field in self._fields.items() if key not in used]
        needs: list[tuple[str, str, Sequence[str]]] = []
        if not any(modality in roles for modality in MODALITIES):
            needs.append(("text or speech features", "text", (FEATURES,)))
        if "label" not in roles:
            needs.append(("labels", "label", (INTEGERS, TEXT, ONE_HOT)))
        id_lists = [key for key in unused if self._fields[key].kind == IDS]
        if id_lists and not any(split in roles for split in SPLITS):
            needs.append(("splits", "train", (IDS,)))
        questions = []
        found = f"layout {self.layout}: {self.describe_fields()}"
        for what, role, kinds in needs:
            candidates = [key for key, field in self._fields.items() if field.kind in kinds]
            if not candidates:
                self.fail(f"no {what} in the file; {found}")
            questions.append((what, f"{role}={candidates[0]}"))
        if questions:
            missing = ", the ".join(what for what, _ in questions)
            example = ",".join(choice for _, choice in questions)
            self.fail(f"which fields have the {missing}? Set --fields={example},...; {found}")

    def _labels(self, key: str, dialogue: str, values: Any) -> list[Any]:
        try:
            return as_labels([] if values is None else values)
        except (TypeError, ValueError) as error:
            self.fail(f"field {key}: dialogue {dialogue}: {error}")

    def _label_array(self, key: str, labels: Sequence[Any]) -> np.ndarray:
        kinds = {type(label) for label in labels if label is not None}
        if len(kinds) > 1:
            self.fail(f"field {key}: the labels mix numbers and names; allowed: only one kind")
        if kinds == {str}:
            return np.array([label or "" for label in labels])
        return np.array([UNLABELED if label is None else label for label in labels])

    def _splits(self, roles: Roles, labels: Mapping[str, Any], notes: list[str]) -> dict[str, str]:
        """Returns the split of each dialogue, or an empty dict if no role is a split."""
        split_of: dict[str, str] = {}
        for split in SPLITS:
            ids = [id_ for key in roles.get(split, ()) for id_ in self._fields[key].ids]
            missing = [id_ for id_ in ids if id_ not in labels]
            if missing:
                notes.append(
                    f"{split}: ids without a dialogue are left out: {len(missing)}, the first is "
                    f"{missing[0]}"
                )
            for id_ in ids:
                if split_of.setdefault(id_, split) != split:
                    self.fail(f"dialogue {id_} is in {split_of[id_]} and in {split}")
        split_of = {id_: split for id_, split in split_of.items() if id_ in labels}
        if any(split in roles for split in SPLITS):
            if not split_of:
                self.fail("none of the ids in the splits belongs to a dialogue")
            unused = [dialogue for dialogue in labels if dialogue not in split_of]
            if unused:
                notes.append(
                    f"{len(unused)} dialogues are in no split and are left out, the first is "
                    f"{unused[0]}"
                )
        return split_of

    def _rows(self, key: str, lengths: Mapping[str, int]) -> list[Any]:
        """Returns a field's value for each utterance, or None for utterances of missing dialogues.

        Raises:
            InputError: A dialogue has more or fewer values than labels.
        """
        rows: list[Any] = []
        for dialogue, count in lengths.items():
            values = self._fields[key].values.get(dialogue)
            if values is None or len(values) == 0:
                rows += [None] * count
                continue
            if len(values) != count:
                self.fail(
                    f"dialogue {dialogue}: {len(values)} utterances in field {key}, but {count} "
                    "labels; all fields need the same number"
                )
            rows += list(values)
        return rows

    def _modality(
        self, name: str, keys: Sequence[str], lengths: Mapping[str, int], notes: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean [N, D] of one or more feature fields, and presence flags [N]."""
        owners = [(name, index) for name, count in lengths.items() for index in range(count)]
        parts = []
        for key in keys:

            def describe(row: int, key: str = key) -> str:
                dialogue, index = owners[row]
                return f"field {key}: dialogue {dialogue}, utterance {index}"

            try:
                parts.append(stack_features(self._rows(key, lengths), describe))
            except ValueError as error:
                self.fail(str(error))
        dims = {features.shape[1] for features, _ in parts}
        if len(dims) > 1:
            self.fail(f"--fields={name}={'+'.join(keys)}: dimensions {sorted(dims)} differ")
        features = np.stack([features for features, _ in parts]).mean(0, dtype=np.float32)
        present = np.all([present for _, present in parts], axis=0)
        features[~present] = 0
        if len(keys) > 1:
            notes.append(
                f"{name}: mean of the fields {', '.join(keys)}; --fields={name}={keys[0]} uses "
                "only one field"
            )
        if not present.all():
            notes.append(
                f"{np.sum(~present)} utterances lack {name}: no dialogue in the field, an empty "
                "vector, or values that are not finite"
            )
        return features, present

    def _texts(self, key: str, lengths: Mapping[str, int]) -> list[str]:
        texts = []
        for value in self._rows(key, lengths):
            if isinstance(value, np.ndarray | list | tuple):
                value = int(np.argmax(value))
            texts.append("" if value is None else clean_text(value))
        return texts

    def _utterance_ids(self, keys: Sequence[str], lengths: Mapping[str, int]) -> list[str]:
        """Returns utterance ids that are unique in the file.

        If the file's ids are unique, they are returned unchanged. If they are unique only in their
        dialogues, each id gets the prefix `DIALOGUE_`. Otherwise, the ids are `DIALOGUE_POSITION`.
        """
        dialogues = [dialogue for dialogue, count in lengths.items() for _ in range(count)]
        positions = [str(index) for count in lengths.values() for index in range(count)]
        if keys and all(
            values is not None and np.ndim(values) >= 1 and len(values) == lengths[dialogue]
            for dialogue in lengths
            for values in (self._fields[keys[0]].values.get(dialogue),)
        ):
            ids = [identifier(value) for value in self._rows(keys[0], lengths)]
            if None not in ids and len(set(ids)) == len(ids):
                return [str(id_) for id_ in ids]
            pairs = list(zip(dialogues, ids, strict=True))
            if None not in ids and len(set(pairs)) == len(pairs):
                positions = [str(id_) for id_ in ids]
        return [f"{dialogue}_{id_}" for dialogue, id_ in zip(dialogues, positions, strict=True)]


def _describe(key: str, field: _DialogueField, value: Any, note: str) -> Field:
    if field.kind == IDS:
        example, count = shorten(field.ids[0]), f"{len(field.ids)} ids"
    elif field.values:
        dialogue, values = next(iter(field.values.items()))
        first = values[0] if isinstance(values, list | tuple | np.ndarray) and len(values) else ""
        is_vector = field.kind in (FEATURES, ONE_HOT, OTHER) and np.ndim(first) > 0
        first = f"[{len(first)}]" if is_vector else first
        example, count = shorten(f"{dialogue}: {first}"), f"{len(field.values)} dialogues"
    else:
        count = f"{len(value)} values" if hasattr(value, "__len__") else "1 value"
        example = shorten(type(value).__name__ if hasattr(value, "__len__") else value)
    dims = str(field.dim) if field.kind in (FEATURES, ONE_HOT) else ""
    return Field(key, field.kind, count, dims, example, note)
