"""Reads feature files whose dialogues are padded to one length, with separate arrays per split.

The contextual LSTM of Poria et al. (ACL 2017) introduced two layouts. The first layout is a tuple.
For each split of D dialogues, it contains features [D, T, F], labels ([D, T] or one-hot [D, T, C]),
and lengths [D]. The splits are training and test, and in some files also validation. The second
layout is a dict that contains the same arrays by name, but masks [D, T] instead of lengths.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from mister_jax.data.feature_files.source import Columns, FeatureSource, Field, Roles
from mister_jax.data.feature_files.values import FEATURES
from mister_jax.data.schema import MODALITIES, UNLABELED

_SPLITS = {2: ("train", "test"), 3: ("train", "validation", "test")}
_SPLIT_NAMES = {"train": "train", "valid": "validation", "val": "validation", "test": "test"}
_NAMED = re.compile(rf"(?:(\w+)_)?({'|'.join(_SPLIT_NAMES)})(?:_(label|mask|length)s?)?")
_MODALITY_NAMES = {"text": "text", "audio": "speech", "speech": "speech"}

Arrays = dict[str, np.ndarray]
"""Arrays by split."""


def open_padded_arrays(path: pathlib.Path, content: Any) -> "PaddedArrays | None":
    """Recognizes padded arrays; returns None if the file has another layout."""
    if isinstance(content, dict):
        parts = _parts_by_name(content)
        layout = "padded arrays by name (contextual LSTM)"
    elif isinstance(content, list | tuple):
        parts = _parts_by_order(content)
        layout = "padded arrays (contextual LSTM)"
    else:
        return None
    return None if parts is None else PaddedArrays(path, layout, *parts)


def _parts_by_order(
    content: Sequence[Any],
) -> tuple[dict[str, Arrays], Arrays, Arrays] | None:
    """Returns the features by key and split, the labels by split, and the lengths [D] by split."""
    arrays = [
        (index, value) for index, value in enumerate(content) if isinstance(value, np.ndarray)
    ]
    labels = [value for _, value in arrays if _is_label(value)]
    data = [
        (str(index), value)
        for index, value in arrays
        if value.ndim == 3 and value.dtype.kind == "f" and not _is_label(value)
    ]
    lengths = [
        np.asarray(value)
        for value in content
        if isinstance(value, list | tuple | np.ndarray)
        and np.ndim(value) == 1
        and len(value)
        and np.asarray(value).dtype.kind in "iu"
    ]
    splits = _SPLITS.get(len(data))
    if splits is None or not len(data) == len(labels) == len(lengths):
        return None
    features = {data[0][0]: {split: value for split, (_, value) in zip(splits, data, strict=True)}}
    return (
        features,
        dict(zip(splits, labels, strict=True)),
        dict(zip(splits, lengths, strict=True)),
    )


def _is_label(value: np.ndarray) -> bool:
    if value.ndim == 2:
        return value.dtype.kind in "biuf"
    if value.ndim != 3 or value.dtype.kind not in "biuf" or not value.size:
        return False
    # Padding may consist of rows of zeros.
    return bool(np.isin(value, (0, 1)).all() and np.isin(value.sum(2), (0, 1)).all())


def _parts_by_name(
    content: Mapping[Any, Any],
) -> tuple[dict[str, Arrays], Arrays, Arrays] | None:
    features: dict[str, Arrays] = {}
    labels: Arrays = {}
    lengths: Arrays = {}
    for key, value in content.items():
        match = _NAMED.fullmatch(str(key))
        if not match or not isinstance(value, list | np.ndarray):
            continue
        name, split, kind = match[1], _SPLIT_NAMES[match[2]], match[3]
        array = np.asarray(value)
        if kind == "label" and not name:
            labels[split] = array
        elif kind in ("mask", "length") and not name:
            lengths[split] = array
        elif name and not kind and array.ndim == 3:
            features.setdefault(name, {})[split] = array
    complete = labels and labels.keys() == lengths.keys()
    if (
        not complete
        or not features
        or any(part.keys() != labels.keys() for part in features.values())
    ):
        return None
    return features, labels, lengths


class PaddedArrays(FeatureSource):
    """Feature file with padded arrays for each split."""

    roles: ClassVar[Sequence[str]] = MODALITIES

    def __init__(
        self,
        path: pathlib.Path,
        layout: str,
        features: Mapping[str, Arrays],
        labels: Arrays,
        lengths: Arrays,
    ) -> None:
        fields = [
            Field(
                key,
                FEATURES,
                ", ".join(f"{len(array)} {split}" for split, array in arrays.items())
                + " dialogues",
                str(next(iter(arrays.values())).shape[2]),
                " ".join(str(list(array.shape)) for array in arrays.values()),
                "visual features" if key in ("video", "visual") else "",
            )
            for key, arrays in features.items()
        ]
        defaults = {_MODALITY_NAMES[key]: (key,) for key in features if key in _MODALITY_NAMES}
        super().__init__(path, layout, fields, defaults)
        self._features, self._labels, self._lengths = features, labels, lengths

    def columns(self, roles: Roles) -> Columns:
        """Returns the utterances without padding."""
        if not any(modality in roles for modality in MODALITIES):
            key = self.fields[0].key
            self.fail(
                f"are the features text or speech? Set --fields=text={key} or --fields=speech={key}"
            )
        masks = {split: self._mask(split) for split in self._labels}
        label = [self._split_labels(split)[mask] for split, mask in masks.items()]
        features = {}
        for modality in MODALITIES:
            if modality not in roles:
                continue
            rows = []
            for split, mask in masks.items():
                array = self._features[roles[modality][0]][split]
                if array.shape[:2] != mask.shape:
                    self.fail(f"{split}: features {array.shape}, but labels {mask.shape}")
                rows.append(array[mask])
            if len({row.shape[1] for row in rows}) > 1:
                self.fail(f"{modality}: the splits have different numbers of features")
            values = np.concatenate(rows)
            present = np.isfinite(values).all(axis=1)
            features[modality] = np.where(present[:, None], values, 0), present
        owners = [
            (split, dialogue, position)
            for split, mask in masks.items()
            for dialogue, position in zip(*np.nonzero(mask), strict=True)
        ]
        missing = {name: int(np.sum(~present)) for name, (_, present) in features.items()}
        return Columns(
            dialogue=[f"{split}_{dialogue}" for split, dialogue, _ in owners],
            utterance=[f"{split}_{dialogue}_{position}" for split, dialogue, position in owners],
            position=[int(position) for _, _, position in owners],
            label=np.concatenate(label),
            split=[split for split, _, _ in owners],
            features=features,
            notes=[
                "the file has no ids; dialogues are numbered within their split",
                *(
                    f"{count} utterances lack {name}: values that are not finite"
                    for name, count in missing.items()
                    if count
                ),
            ],
        )

    def _mask(self, split: str) -> np.ndarray:
        """Returns whether each position is an utterance, [D, T] bool."""
        shape, lengths = self._labels[split].shape[:2], self._lengths[split]
        if lengths.shape == shape:
            return lengths.astype(bool)
        if lengths.shape != shape[:1] or lengths.min() < 0 or lengths.max() > shape[1]:
            self.fail(f"{split}: lengths {lengths.shape} do not fit labels {shape}")
        return np.arange(shape[1]) < lengths[:, None]

    def _split_labels(self, split: str) -> np.ndarray:
        """Returns the class of each position, [D, T] int."""
        label = self._labels[split]
        if label.ndim == 3:
            return np.where(label.any(axis=2), label.argmax(axis=2), UNLABELED)
        valid = label[self._mask(split)]
        if not np.equal(np.mod(valid, 1), 0).all():
            self.fail(f"{split}: labels are not whole numbers")
        return np.nan_to_num(label).astype(np.int64)
