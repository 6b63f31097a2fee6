"""Checks the utterance features of a file, and groups utterances into dialogues and splits."""

import collections
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from mister_jax.data.labels import MAX_SCORE, MIN_SCORE, suspicious_labels
from mister_jax.data.schema import MODALITIES, SPLITS, UNLABELED, DialogueFeatures
from mister_jax.data.splits import overlap_note, random_splits
from mister_jax.errors import InputError

REQUIRED = ("utterance", "dialogue", "position", "label", "class_names")
OPTIONAL = ("split", "speaker", "score", "ratings", "speech_present", "text_present")
_TWO_DIMENSIONAL = (*MODALITIES, "ratings")
NEEDED = (
    f"needed: {', '.join(REQUIRED)}, and {' or '.join(MODALITIES)}; optional: {', '.join(OPTIONAL)}"
)

# Larger features are rejected as implausible. In float32, squares overflow from about 1.8e19 on.
_MAX_FEATURE = 1e15

# Allowed values of NumPy's `dtype.kind` for each array, and their description.
_ID = ("USiu", "text or integers")
METADATA_KINDS = "USbiuf"
_METADATA = (METADATA_KINDS, "text, numbers or booleans")
_KINDS = {
    **dict.fromkeys(("utterance", "dialogue"), _ID),
    **dict.fromkeys(("class_names", "split"), ("US", "text")),
    **dict.fromkeys(("speech", "text", "score"), ("f", "floats")),
    "ratings": ("biuf", "numbers"),
    **dict.fromkeys(("speech_present", "text_present"), ("biu", "booleans")),
    "position": ("iuf", "numbers"),
    "label": ("iu", "integers"),
}


class FeatureTable:
    """Arrays with one row per utterance. `read_npz` describes the arrays.

    Error messages contain the file, the name of the array and, if possible, the first invalid row.

    Args:
        path: File that the arrays come from.
        arrays: Arrays by name.
    """

    def __init__(self, path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
        self.path = path
        self.arrays = arrays
        self.utterance = self.array("utterance")
        if len(self.utterance) == 0:
            self.fail("utterance", "no rows; at least one utterance is needed")
        _, first_rows, inverse = np.unique(self.utterance, return_index=True, return_inverse=True)
        is_first = first_rows[inverse] == np.arange(len(self.utterance))
        self.check("utterance", is_first, "repeated; utterance ids must be unique", self.utterance)

    def splits(
        self,
        *,
        group_by: str = "",
        seed: int = 0,
        notes: Sequence[str] = (),
        utterance_metadata: np.ndarray | None = None,
    ) -> dict[str, DialogueFeatures]:
        """Checks all arrays, and returns the nonempty splits.

        Args:
            group_by: Name of an array, by default `speaker`. A random split puts all dialogues with
                the same value in this array into one split.
            seed: Seed of the random split, which is drawn if the table has no array `split`.
            notes: Notes for the user that are stored in the metadata.
            utterance_metadata: JSON objects, [N] str; see `DialogueFeatures`.

        Raises:
            InputError: An array or a row cannot be used.
        """
        class_names = self.class_names()
        position = self.array("position")
        self.check("position", np.isfinite(position), "not finite", position)
        label = self.array("label")
        allowed = f"allowed: -1 (unlabeled) and 0 to {len(class_names) - 1}"
        self.check("label", (label >= UNLABELED) & (label < len(class_names)), allowed, label)
        score = self.array("score") if "score" in self.arrays else None
        if score is not None:
            score = score.astype(np.float32)
            valid = np.isnan(score) | ((score >= MIN_SCORE) & (score <= MAX_SCORE))
            allowed = f"allowed: {MIN_SCORE:g} to {MAX_SCORE:g}, or NaN for no score"
            self.check("score", valid, allowed, score)
        ratings = self._ratings(class_names) if "ratings" in self.arrays else None
        speech, speech_present = self.modality("speech")
        text, text_present = self.modality("text")

        # Dialogues are numbered in the order of their first rows, so sorting by number keeps this
        # order.
        ids, first_rows, inverse = np.unique(
            self.array("dialogue"), return_index=True, return_inverse=True
        )
        by_first_row = np.argsort(first_rows)
        ids, dialogue = ids[by_first_row], np.argsort(by_first_row)[inverse]
        split, split_notes = self._split_rows(ids, dialogue, group_by, seed)
        order = np.lexsort((position, dialogue))
        self.check_dialogues(order, ids[dialogue], position, split)

        metadata = {
            "source": self.path.name,
            "sha256": _sha256(self.path),
            "notes": [*notes, *split_notes],
        }
        splits = {}
        for name in SPLITS:
            rows = order[split[order] == name]
            if len(rows) == 0:
                continue
            members, lengths = np.unique(dialogue[rows], return_counts=True)
            splits[name] = DialogueFeatures(
                name=self.path.stem,
                split=name,
                class_names=class_names,
                dialogue_ids=tuple(ids[members].tolist()),
                lengths=lengths,
                utterance_ids=self.utterance[rows],
                speech=speech[rows],
                text=text[rows],
                speech_present=speech_present[rows],
                text_present=text_present[rows],
                label=label[rows].astype(np.int32),
                score=None if score is None else score[rows],
                ratings=None if ratings is None else ratings[rows],
                metadata=dict(metadata),
                utterance_metadata=None if utterance_metadata is None else utterance_metadata[rows],
            )
        return splits

    def _ratings(self, class_names: Sequence[str]) -> np.ndarray:
        """Returns the number of raters per class, [N, C] float32."""
        ratings = self.array("ratings").astype(np.float32)
        if ratings.shape[1] != len(class_names):
            self.fail(
                "ratings",
                f"{ratings.shape[1]} columns; allowed: {len(class_names)}, as in class_names",
            )
        valid = np.all(np.isfinite(ratings) & (ratings >= 0), axis=1)
        self.check("ratings", valid, "allowed: numbers of raters, 0 or more", ratings)
        return ratings

    def is_metadata(self, name: str) -> bool:
        """Returns whether an array can be kept as metadata."""
        try:
            self.array(name, _METADATA)
        except InputError:
            return False
        return True

    def metadata(self, columns: Mapping[str, str]) -> np.ndarray | None:
        """Returns arrays as JSON objects of texts, [N] str, or None if there are no columns.

        Args:
            columns: Name of the array for each name in the JSON objects.
        """
        if not columns:
            return None
        texts = {key: self.array(name, _METADATA).tolist() for key, name in columns.items()}
        rows = zip(*texts.values(), strict=True)
        return np.array([json.dumps(dict(zip(texts, row, strict=True))) for row in rows])

    def fail(self, name: str, message: str) -> NoReturn:
        """Raises a one-line InputError about the array `name`."""
        # Ids and names from the file may contain line breaks.
        raise InputError(f"{self.path}: {name}: {' '.join(message.splitlines())}")

    def check(self, name: str, is_valid: np.ndarray, message: str, values: np.ndarray) -> None:
        """Raises an InputError about the first row for which `is_valid` [N] is false."""
        for row in np.flatnonzero(~is_valid):
            self.fail(
                name, f"row {row} (utterance {self.utterance[row]}): {values[row]!s}: {message}"
            )

    def array(self, name: str, kind: tuple[str, str] | None = None) -> np.ndarray:
        """Checks and returns an array. Ids and text become `str`. `kind` overrides `_KINDS`."""
        array = self.arrays[name]
        letters, meaning = kind or _KINDS[name]
        ndim = 2 if name in _TWO_DIMENSIONAL and kind is None else 1
        if array.ndim != ndim:
            self.fail(name, f"{array.ndim} dimensions; allowed: {ndim}")
        if name not in ("utterance", "class_names") and len(array) != len(self.utterance):
            self.fail(name, f"{len(array)} rows; allowed: {len(self.utterance)}, as in utterance")
        if array.dtype.kind not in letters:
            self.fail(name, f"type {array.dtype}; allowed: {meaning}")
        if "U" not in letters:
            return array
        try:
            strings = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
            is_nan = np.isnan(array) if array.dtype.kind == "f" else np.zeros(len(array), bool)
            strings = np.where(is_nan, "", strings.astype(str))
            "".join(strings.tolist()).encode()
        except (UnicodeError, ValueError):
            self.fail(name, "not text; allowed: UTF-8")
        return strings

    def modality(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns a modality's features [N, D], zero if absent, and its presence flags [N] bool.

        If the file lacks the modality, D is 1 and all flags are false.
        """
        if name not in self.arrays:
            rows = len(self.utterance)
            return np.zeros((rows, 1), np.float32), np.zeros(rows, bool)
        features = self.array(name)
        if features.shape[1] == 0:
            self.fail(name, "no columns; at least one feature is needed")
        flag = f"{name}_present"
        present = np.ones(len(features), bool)
        if flag in self.arrays:
            values = self.array(flag)
            self.check(flag, (values == 0) | (values == 1), "allowed: false and true", values)
            present = values.astype(bool)
        if features.dtype != np.float16:
            with np.errstate(over="ignore"):
                features = features.astype(np.float32)
        features = np.where(present[:, None], features, features.dtype.type(0))
        limit = min(_MAX_FEATURE, float(np.finfo(features.dtype).max))
        plausible = np.abs(features) <= limit  # False for NaN.
        self.check(
            name,
            plausible.all(axis=1),
            f"allowed: finite {features.dtype} of at most {limit:g}, or {flag} false",
            # The message shows the first invalid value of the row.
            features[np.arange(len(features)), np.argmin(plausible, axis=1)],
        )
        return features, present

    def class_names(self) -> tuple[str, ...]:
        """Checks and returns the class names."""
        names = self.array("class_names").tolist()
        if not names:
            self.fail("class_names", "empty; at least one class is needed")
        for name in names:
            # TFDS stores the names in a text file, one per line.
            if [name.strip()] != name.splitlines():
                self.fail("class_names", f"{name!r}; allowed: one line without surrounding spaces")
            if names.count(name) > 1:
                self.fail("class_names", f"{name!r} repeated; class names must be unique")
        counts = collections.Counter(dict.fromkeys(names, 0))
        label = self.array("label")
        counts.update(names[index] for index in label[(label >= 0) & (label < len(names))])
        for name, problem, fix in suspicious_labels(counts):
            # For names that look like a missing label, such as "none", `fix` is empty. Such names
            # are allowed because `class_names` lists the classes explicitly.
            if fix:
                self.fail("class_names", f"{name!r} {problem}; allowed: one class {fix!r} for both")
        return tuple(names)

    def _split_rows(
        self, ids: np.ndarray, dialogue: np.ndarray, group_by: str, seed: int
    ) -> tuple[np.ndarray, list[str]]:
        """Returns each utterance's split [N] and notes for the user.

        `ids` [M] contains the ids of the dialogues. `dialogue` [N] contains the index in `ids` of
        each utterance's dialogue.
        """
        group_name = group_by or "speaker"
        groups: dict[str, set[str]] = {name: set() for name in ids.tolist()}
        if group_name in self.arrays:
            for index, group in zip(dialogue, self.array(group_name, _ID).tolist(), strict=True):
                groups[str(ids[index])].add(group)
        if "split" not in self.arrays:
            labels: dict[str, list[int | None]] = {name: [] for name in ids.tolist()}
            for index, label in zip(dialogue, self.array("label").tolist(), strict=True):
                labels[ids[index].item()].append(None if label == UNLABELED else label)
            by_dialogue, note = random_splits(
                labels,
                groups,
                name=group_name,
                source=str(self.path),
                explicit=bool(group_by),
                seed=seed,
            )
            return np.array([by_dialogue[name] for name in ids.tolist()])[dialogue], [note]
        split = self.array("split")
        self.check("split", np.isin(split, SPLITS), f"allowed: {', '.join(SPLITS)}", split)
        by_dialogue = dict(zip(ids[dialogue].tolist(), split.tolist(), strict=True))
        note = overlap_note(groups, by_dialogue, group_name)
        return split, [note] if note else []

    def check_dialogues(
        self, order: np.ndarray, dialogue: np.ndarray, position: np.ndarray, split: np.ndarray
    ) -> None:
        """Raises InputError if a dialogue has two splits or two utterances with equal positions.

        `order` [N] sorts the rows by dialogue and position. The other arrays [N] are not sorted.
        """
        before, after = order[:-1], order[1:]
        same_dialogue = dialogue[before] == dialogue[after]
        is_valid = np.ones(len(order), bool)
        is_valid[after] = ~(same_dialogue & (position[before] == position[after]))
        self.check(
            "position", is_valid, "repeated in its dialogue; positions must differ", position
        )
        is_valid[after] = ~(same_dialogue & (split[before] != split[after]))
        self.check("split", is_valid, "another row of its dialogue has another split", split)


def _sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, or of all files in a folder."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digests = [_sha256(file) for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
