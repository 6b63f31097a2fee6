"""Reads feature files of MMSA: sequences of features for each segment of a video.

MMSA (ACL 2022, arXiv 2203.12441) publishes `aligned_50.pkl` and `unaligned_50.pkl` for CMU-MOSI,
CMU-MOSEI and CH-SIMS. A file contains one dict per split. The dict has ids `VIDEO$_$NUMBER`,
features [N, T, F] that are padded with zeros, and labels. The vector of a segment is the mean over
the finite steps that are not padding.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from mister_jax.data.feature_files.source import Columns, FeatureSource, Field, Roles, shorten
from mister_jax.data.feature_files.values import (
    FEATURES,
    INTEGERS,
    NUMBERS,
    OTHER,
    TEXT,
    as_labels,
    clean_text,
    identifier,
)
from mister_jax.data.schema import MODALITIES, UNLABELED

_SPLITS = {"train": "train", "valid": "validation", "val": "validation", "test": "test"}
_SEPARATOR = "$_$"
_IDS = ("id", "ids")
_SCORES, _CLASSES = "regression_labels", "classification_labels"
_SENTENCES = ("raw_text",)

BINARY = ("negative", "non_negative")
"""Class of scores below 0, and class of all other scores, as in `corpora.mosi`."""


def open_mmsa(path: pathlib.Path, content: Any) -> "MmsaFeatures | None":
    """Opens a file in MMSA's layout, a dict of splits; returns None for other layouts."""
    if not isinstance(content, dict):
        return None
    splits = {
        _SPLITS[key]: {str(name): value for name, value in part.items() if value is not None}
        for key, part in content.items()
        if key in _SPLITS and isinstance(part, dict)
    }
    if not splits or not all({*_IDS} & part.keys() for part in splits.values()):
        return None
    if not all({_SCORES, _CLASSES, "annotations"} & part.keys() for part in splits.values()):
        return None
    return MmsaFeatures(path, splits)


class MmsaFeatures(FeatureSource):
    """Feature file of MMSA."""

    roles: ClassVar[Sequence[str]] = (*MODALITIES, "label", "score", "sentence")

    def __init__(self, path: pathlib.Path, splits: Mapping[str, Mapping[str, Any]]) -> None:
        self._splits = splits
        names = dict.fromkeys(name for part in splits.values() for name in part)
        fields = [_describe(name, [part.get(name) for part in splits.values()]) for name in names]
        kinds = {field.key: field.kind for field in fields}
        defaults: dict[str, tuple[str, ...]] = {}
        for role, key in (("text", "text"), ("speech", "audio")):
            if kinds.get(key) == FEATURES:
                defaults[role] = (key,)
        if _SCORES in names:
            defaults["score"] = (_SCORES,)
        elif _CLASSES in names:
            defaults["label"] = (_CLASSES,)
        elif "annotations" in names:
            defaults["label"] = ("annotations",)
        for key in _SENTENCES:
            if key in names:
                defaults["sentence"] = (key,)
        super().__init__(path, "MMSA", fields, defaults)
        (self._id,) = [key for key in _IDS if key in names][:1]

    def columns(self, roles: Roles) -> Columns:
        """Returns the segments with pooled features."""
        if not any(modality in roles for modality in MODALITIES):
            self.fail(f"no text or speech features; the file has {self.describe_fields()}")
        if "label" not in roles and "score" not in roles:
            self.fail(f"no labels; set --fields=label=...; the file has {self.describe_fields()}")
        notes: list[str] = []
        ids = {
            split: [identifier(value) or "" for value in part[self._id]]
            for split, part in self._splits.items()
        }
        split = [name for name, values in ids.items() for _ in values]
        utterance = [value for values in ids.values() for value in values]
        dialogue, position = self._dialogues(utterance, split, notes)
        features = {}
        for modality in MODALITIES:
            for key in roles.get(modality, ())[:1]:
                vectors, present = self._pool(key)
                features[modality] = vectors, present
                notes.append(f"{modality}: mean of {key} over the steps of each segment")
                if not present.all():
                    notes.append(f"{np.sum(~present)} segments lack {modality}: no step has values")
        score = None
        if "score" in roles:
            score = np.array(self._values(roles["score"][0]), np.float64).reshape(-1)
        if "label" in roles:
            label = self._labels(roles["label"][0])
        else:
            assert score is not None
            label = np.where(np.isnan(score), UNLABELED, score >= 0).astype(np.int64)
            self.class_names = self.class_names or BINARY
            note = f"classes {' and '.join(BINARY)} from the sign of {roles['score'][0]}"
            if _CLASSES in (field.key for field in self.fields):
                note += f"; --fields=label={_CLASSES} uses the classes of the file"
            notes.append(note)
        metadata = {}
        if "sentence" in roles:
            metadata["text"] = [clean_text(text) for text in self._values(roles["sentence"][0])]
        return Columns(
            dialogue, utterance, position, label, split, features, score, metadata, notes
        )

    def _dialogues(
        self, ids: Sequence[str], split: Sequence[str], notes: list[str]
    ) -> tuple[list[str], list[int]]:
        """Returns the video of each segment, and the segment's number in the video."""
        pairs = [id_.rpartition(_SEPARATOR) for id_ in ids]
        for id_, (video, _, number) in zip(ids, pairs, strict=True):
            if not video or not number.isdecimal():
                self.fail(f"id {shorten(id_)!r}; allowed: VIDEO{_SEPARATOR}NUMBER")
        videos = [video for video, _, _ in pairs]
        splits_of: dict[str, set[str]] = {}
        for video, name in zip(videos, split, strict=True):
            splits_of.setdefault(video, set()).add(name)
        shared = [video for video, names in splits_of.items() if len(names) > 1]
        if shared:
            notes.append(
                f"WARNING: {len(shared)} of {len(splits_of)} videos are in several splits, for "
                f"example {shared[0]}; their segments are separate dialogues in each split"
            )
            videos = [
                f"{video}/{name}" if len(splits_of[video]) > 1 else video
                for video, name in zip(videos, split, strict=True)
            ]
        return videos, [int(number) for _, _, number in pairs]

    def _values(self, key: str) -> list[Any]:
        """Returns a field's values in all splits.

        Raises:
            InputError: A split lacks the field, or the number of its values differs from the number
                of ids.
        """
        values: list[Any] = []
        for split, part in self._splits.items():
            if key not in part:
                self.fail(f"{split}: no field {key!r}; the file has {self.describe_fields()}")
            if len(part[key]) != len(part[self._id]):
                self.fail(
                    f"{split}: {len(part[key])} values in {key}, but {len(part[self._id])} ids"
                )
            values += list(part[key])
        return values

    def _labels(self, key: str) -> np.ndarray:
        values = [
            np.ravel(value)[0] if np.size(value) == 1 else value for value in self._values(key)
        ]
        try:
            labels = as_labels(values)
        except ValueError as error:
            self.fail(f"{key}: {error}")
        if all(isinstance(label, str) for label in labels):
            return np.array(labels)
        return np.array([UNLABELED if label is None else label for label in labels])

    def _pool(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns each segment's mean over the valid steps [N, F], and presence flags [N].

        A step is valid if it is finite and not padding.
        """
        vectors, present = [], []
        for split, part in self._splits.items():
            lengths = part.get(f"{key}_lengths")
            tokens = np.asarray(part.get("text_bert", ())) if key == "text" else np.zeros(0)
            segments = self._split_values(split, key)
            for index, segment in enumerate(segments):
                steps = np.asarray(segment)
                if steps.dtype.kind not in "fiu" or steps.ndim not in (1, 2):
                    self.fail(f"{split}: {key}: segment {index}: not features [T, F] or [F]")
                if steps.ndim == 1:
                    steps = steps[None]
                if tokens.ndim == 3 and tokens.shape[1:] == (3, len(steps)):
                    steps = steps[tokens[index, 1] > 0]  # The second row is the attention mask.
                if lengths is not None:
                    steps = steps[: max(int(np.ravel(lengths[index])[0]), 0)]
                # COVAREP features have infinite values in some steps.
                valid = np.isfinite(steps).all(axis=1) & steps.any(axis=1)
                present.append(bool(valid.any()))
                mean = steps[valid].mean(axis=0, dtype=np.float64) if valid.any() else None
                vectors.append(np.zeros(steps.shape[1]) if mean is None else mean)
        if len({len(vector) for vector in vectors}) > 1:
            self.fail(f"{key}: segments have different numbers of features")
        return np.stack(vectors), np.array(present, bool)

    def _split_values(self, split: str, key: str) -> Any:
        self._values(key)  # Raises an error if a field has the wrong number of values.
        return self._splits[split][key]


def _describe(name: str, values: Sequence[Any]) -> Field:
    value = next(value for value in values if value is not None)
    count = sum(len(part) for part in values if hasattr(part, "__len__"))
    first = value[0] if hasattr(value, "__len__") and len(value) else ""
    array = np.asarray(first)
    kind, dims, example, note = OTHER, "", shorten(first), ""
    if array.ndim == 2 and array.dtype.kind == "f" and name != "text_bert":
        kind, dims, example = FEATURES, str(array.shape[1]), str(list(array.shape))
    elif array.ndim >= 1 and array.size > 1:
        example = str(list(array.shape))
    elif array.dtype.kind in "US":
        kind = TEXT
    elif array.dtype.kind in "iu":
        kind = INTEGERS
    elif array.dtype.kind == "f":
        kind = NUMBERS
    if name == "text_bert":
        note = "token ids"
    elif name in ("vision", "visual", "video"):
        note = "visual features"
    return Field(name, kind, f"{count} segments", dims, example, note)
