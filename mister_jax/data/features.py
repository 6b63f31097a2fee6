"""The feature store: dialogues of utterance vectors as a TFDS dataset.

`read_npz` checks a NumPy archive, `write` stores splits as a TFDS dataset, and `load` brings a
split back into memory. Batches are made in `pipeline`.
"""

import collections
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
from etils import epath

from mister_jax.data.labels import MAX_SCORE, MIN_SCORE, suspicious_labels
from mister_jax.data.lazy import tfds
from mister_jax.data.schema import MODALITIES, SPLITS, UNLABELED, DialogueFeatures
from mister_jax.data.splits import overlap_note, random_splits
from mister_jax.data.storage import VERSION, atomic_dataset, open_builder, silence_tfds
from mister_jax.errors import InputError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

__all__ = ["DialogueFeatures", "load_features", "read_npz", "split_names", "write_features"]

_REQUIRED = ("utterance", "dialogue", "position", "label", "class_names")
_OPTIONAL = ("split", "speaker", "score", "speech_present", "text_present")
_NEEDED = (
    f"needed: {', '.join(_REQUIRED)}, and {' or '.join(MODALITIES)}; "
    f"optional: {', '.join(_OPTIONAL)}"
)

# Features of any unit are smaller. Larger ones are broken, and their squares overflow in float32.
_MAX_FEATURE = 1e15

# What an array may hold, by the letters of NumPy's `dtype.kind`.
_NUMBER = ("iuf", "numbers")
_INTEGER = ("iu", "integers")
_FLOAT = ("f", "floats")
_TEXT = ("US", "text")
_ID = ("USiu", "text or integers")
_BOOLEAN = ("biu", "booleans")


def read_npz(
    path: epath.PathLike, *, group_by: str = "", seed: int = 0
) -> dict[str, DialogueFeatures]:
    """Reads and checks the utterance features of a NumPy archive.

    The archive holds one row per utterance, in any order, under these names:

    - `speech` [N, Ds], `text` [N, Dt]: Floats; at least one of them. float16 is kept, other types
      become float32.
    - `label` [N]: Integers, -1 for an unlabeled utterance, else an index into `class_names`.
    - `class_names` [C]: Text.
    - `utterance` [N], `dialogue` [N]: Ids, text or integers; utterance ids are unique.
    - `position` [N]: Numbers that order the utterances of a dialogue.
    - `split` [N], optional: `train`, `validation` or `test`, the same for a whole dialogue. If it
      is left out, dialogues are split at random.
    - `speaker` [N], optional: Text or integers. Random splits keep speakers apart; no model reads
      them.
    - `score` [N], optional: Floats from -3 to 3, NaN where there is none.
    - `speech_present`, `text_present` [N], optional: False where an utterance lacks the modality;
      its features are then ignored and become zero. All true when left out.

    Other arrays are ignored.

    Args:
        path: The npz file.
        group_by: Name of the array whose values random splits keep apart; by default `speaker` if
            the file contains it.
        seed: Seed of the random split.

    Returns:
        The splits that have utterances. Dialogues keep the order in which they first appear,
        utterances are ordered by position. The metadata says where the features come from; its
        `notes` are for the user.

    Raises:
        InputError: The file or one of its rows cannot be used.
    """
    archive = _Archive(pathlib.Path(path), further=(group_by,) if group_by else ())
    class_names = archive.class_names()
    position = archive.column("position", _NUMBER)
    archive.check("position", np.isfinite(position), "not finite", position)
    label = archive.column("label", _INTEGER)
    allowed = f"allowed: -1 (unlabeled) and 0 to {len(class_names) - 1}"
    archive.check("label", (label >= UNLABELED) & (label < len(class_names)), allowed, label)
    score = archive.column("score", _FLOAT) if "score" in archive.arrays else None
    if score is not None:
        score = score.astype(np.float32)
        valid = np.isnan(score) | ((score >= MIN_SCORE) & (score <= MAX_SCORE))
        allowed = f"allowed: {MIN_SCORE:g} to {MAX_SCORE:g}, or NaN for no score"
        archive.check("score", valid, allowed, score)
    speech, speech_present = archive.modality("speech")
    text, text_present = archive.modality("text")

    # Dialogues are numbered as they first appear, so sorting by number keeps that order.
    ids, first, inverse = np.unique(
        archive.text("dialogue", _ID), return_index=True, return_inverse=True
    )
    appearance = np.argsort(first)
    ids, dialogue = ids[appearance], np.argsort(appearance)[inverse]
    split, notes = archive.splits(ids, dialogue, group_by, seed)
    order = np.lexsort((position, dialogue))
    archive.check_dialogues(order, ids[dialogue], position, split)

    metadata = {"source": archive.path.name, "sha256": archive.sha256(), "notes": notes}
    splits = {}
    for name in SPLITS:
        rows = order[split[order] == name]
        if len(rows) == 0:
            continue
        members, lengths = np.unique(dialogue[rows], return_counts=True)
        splits[name] = DialogueFeatures(
            name=archive.path.stem,
            split=name,
            class_names=class_names,
            dialogue_ids=tuple(ids[members].tolist()),
            lengths=lengths,
            utterance_ids=archive.utterance[rows],
            speech=speech[rows],
            text=text[rows],
            speech_present=speech_present[rows],
            text_present=text_present[rows],
            label=label[rows].astype(np.int32),
            score=None if score is None else score[rows],
            metadata=dict(metadata),
        )
    return splits


def write_features(
    splits: Mapping[str, DialogueFeatures],
    name: str,
    data_dir: epath.PathLike | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> "DatasetBuilder":
    """Stores splits as the TFDS dataset `name`, whole or not at all.

    Args:
        splits: features by split; widths, stored types, class names and the presence of scores
            are the same in all.
        name: a TFDS name: lower-case letters, digits and underscores, a letter first.
        data_dir: the directory that holds datasets; that of TFDS when None.
        metadata: JSON values about the dataset as a whole. `load` adds those of the split.
        overwrite: replace a dataset of this name.

    Returns:
        The TFDS builder of the stored dataset.

    Raises:
        InputError: the name is not legal, the dataset exists, the directory cannot be written.
        ValueError: the splits do not fit each other.
    """
    if "/" in name:
        raise InputError(f"dataset name {name!r}; allowed: lower-case letters, digits and _")
    spec = _feature_spec(splits)
    told = {
        **(metadata or {}),
        "splits": {split: features.metadata for split, features in splits.items()},
    }
    with atomic_dataset(name, data_dir, overwrite=overwrite) as (place, _):
        with silence_tfds():
            builder = tfds.dataset_builders.store_as_tfds_dataset(
                name=name,
                version=VERSION,
                features=spec,
                split_datasets={split: _examples(splits[split]) for split in splits},
                data_dir=place,
                description="Dialogues of utterances as speech and text features.",
                disable_shuffling=True,
            )
        tfds.core.MetadataDict(told).save_metadata(builder.data_dir)
    return open_builder(name, data_dir)


def split_names(name: str, data_dir: epath.PathLike | None = None) -> tuple[str, ...]:
    """The splits of a dataset that hold anything.

    Raises:
        InputError: there is no such dataset.
    """
    splits = open_builder(name, data_dir).info.splits
    return tuple(split for split, info in splits.items() if info.num_examples > 0)


def load_features(
    name: str, split: str, data_dir: epath.PathLike | None = None
) -> DialogueFeatures:
    """Reads one split of a dataset of features into memory.

    Args:
        name: dataset name.
        split: one of the splits of the dataset.
        data_dir: the directory that holds datasets; that of TFDS when None.

    Returns:
        The split, in stored order, with the metadata of the dataset and of the split.

    Raises:
        InputError: there is no such dataset or split, or it does not hold features.
    """
    builder = open_builder(name, data_dir)
    spec = dict(builder.info.features.items())
    fields: Mapping[str, Any] = getattr(spec.get("utterances"), "feature", {})
    if "speech" not in fields or "text" not in fields:
        raise InputError(
            f"{builder.data_dir}: not a dataset of features; it holds {', '.join(spec)}"
        )
    filled = [key for key, info in builder.info.splits.items() if info.num_examples > 0]
    if split not in filled:
        raise InputError(f"{builder.data_dir}: no split {split!r}; allowed: {', '.join(filled)}")

    with silence_tfds():
        # One file at a time, or the dialogues of a dataset of several files would interleave.
        reading = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        dialogues = list(tfds.as_numpy(builder.as_dataset(split=split, read_config=reading)))
    utterances = [dialogue["utterances"] for dialogue in dialogues]

    def gather(field: str) -> np.ndarray:
        return np.concatenate([values[field] for values in utterances])

    metadata = dict(builder.info.metadata or {})
    of_split = metadata.pop("splits", {}).get(split, {})
    return DialogueFeatures(
        name=name,
        split=split,
        class_names=tuple(fields["label"].names),
        dialogue_ids=tuple(dialogue["dialogue"].decode() for dialogue in dialogues),
        lengths=np.array([len(values["label"]) for values in utterances]),
        utterance_ids=np.array([utterance.decode() for utterance in gather("utterance")]),
        speech=gather("speech"),
        text=gather("text"),
        speech_present=gather("speech_present"),
        text_present=gather("text_present"),
        label=gather("label").astype(np.int32),
        score=gather("score") if "score" in fields else None,
        metadata={**metadata, **of_split},
        utterance_metadata=(
            np.array([text.decode() for text in gather("metadata")])
            if "metadata" in fields
            else None
        ),
    )


class _Archive:
    """The arrays of an npz file, and the checks that name file, array and row when they fail."""

    def __init__(self, path: pathlib.Path, further: Sequence[str] = ()) -> None:
        self.path = path
        self._further = further
        self.arrays = self._read()
        self.utterance = self._strings("utterance", self._array("utterance", 1, _ID))
        if len(self.utterance) == 0:
            self.fail("utterance", "no rows; at least one utterance is needed")
        _, first, inverse = np.unique(self.utterance, return_index=True, return_inverse=True)
        is_first = first[inverse] == np.arange(len(self.utterance))
        self.check("utterance", is_first, "repeated; utterance ids are unique", self.utterance)

    def _read(self) -> dict[str, np.ndarray]:
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file")
        try:
            # Opened here: NumPy leaves a damaged archive open.
            with self.path.open("rb") as file:
                return self._load(file)
        except PermissionError as error:
            raise InputError(f"{self.path}: no permission to read it") from error

    def _load(self, file: BinaryIO) -> dict[str, np.ndarray]:
        # zipfile, zlib and NumPy raise a dozen kinds of errors for a damaged file.
        try:
            archive = np.load(file, allow_pickle=False)
        except Exception as error:
            raise InputError(
                f"{self.path}: not an npz file, or damaged; needed: an npz file with the arrays "
                f"{', '.join(_REQUIRED)}, and {' or '.join(MODALITIES)}"
            ) from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{self.path}: a single array; needed: an npz file. {_NEEDED}")
        with archive:
            missing = [name for name in (*_REQUIRED, *self._further) if name not in archive.files]
            if not any(name in archive.files for name in MODALITIES):
                missing.append(" or ".join(MODALITIES))
            if missing:
                raise InputError(f"{self.path}: no array {', '.join(missing)}; {_NEEDED}")
            arrays = {}
            for name in (*_REQUIRED, *MODALITIES, *_OPTIONAL, *self._further):
                try:
                    if name in archive.files:
                        arrays[name] = archive[name]
                except Exception as error:
                    raise InputError(
                        f"{self.path}: {name}: damaged, or an array of Python objects; "
                        "allowed: arrays of numbers, booleans or text"
                    ) from error
        return arrays

    def fail(self, name: str, message: str) -> NoReturn:
        # Ids and names from the file may hold line breaks.
        raise InputError(f"{self.path}: {name}: {' '.join(message.splitlines())}")

    def check(self, name: str, good: np.ndarray, message: str, values: np.ndarray) -> None:
        """Fails with the first row where `good` [N] is false."""
        for row in np.flatnonzero(~good):
            self.fail(
                name, f"row {row} (utterance {self.utterance[row]}): {values[row]!s}: {message}"
            )

    def column(self, name: str, kind: tuple[str, str]) -> np.ndarray:
        """The array [N] called `name`."""
        return self._array(name, 1, kind, rows=len(self.utterance))

    def text(self, name: str, kind: tuple[str, str]) -> np.ndarray:
        """The array [N] called `name`, as text."""
        return self._strings(name, self.column(name, kind))

    def modality(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns features [N, D], zero where absent, and presence [N].

        A modality that the file lacks is one zero, absent everywhere.
        """
        if name not in self.arrays:
            rows = len(self.utterance)
            return np.zeros((rows, 1), np.float32), np.zeros(rows, bool)
        features = self._array(name, 2, _FLOAT, rows=len(self.utterance))
        if features.shape[1] == 0:
            self.fail(name, "no columns; at least one feature is needed")
        flag = f"{name}_present"
        present = np.ones(len(features), bool)
        if flag in self.arrays:
            values = self.column(flag, _BOOLEAN)
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
            # The first bad value of a row, to be shown.
            features[np.arange(len(features)), np.argmin(plausible, axis=1)],
        )
        return features, present

    def class_names(self) -> tuple[str, ...]:
        names = self._strings("class_names", self._array("class_names", 1, _TEXT)).tolist()
        if not names:
            self.fail("class_names", "empty; at least one class is needed")
        for name in names:
            # TFDS keeps the names in a text file, one a line.
            if [name.strip()] != name.splitlines():
                self.fail("class_names", f"{name!r}; allowed: one line, no space around")
            if names.count(name) > 1:
                self.fail("class_names", f"{name!r} repeated; class names are unique")
        counts = collections.Counter(dict.fromkeys(names, 0))
        counts.update(names[label] for label in self._labels(len(names)))
        for name, problem, fix in suspicious_labels(counts):
            if fix:  # A class may be called "none"; the file says that it is one.
                self.fail("class_names", f"{name!r} {problem}; allowed: one class {fix!r} for both")
        return tuple(names)

    def _labels(self, num_classes: int) -> list[int]:
        """Returns the labels that name a class."""
        label = self.column("label", _INTEGER)
        return label[(label >= 0) & (label < num_classes)].tolist()

    def splits(
        self, ids: np.ndarray, dialogue: np.ndarray, group_by: str, seed: int
    ) -> tuple[np.ndarray, list[str]]:
        """Returns the split of each utterance [N], and notes for the user.

        Args:
            ids: Dialogue ids [M].
            dialogue: Index of each utterance's dialogue [N].
            group_by: Array whose values random splits keep apart; `speaker` if empty.
            seed: Seed of the random split.
        """
        group_name = group_by or "speaker"
        groups: dict[str, set[str]] = {name: set() for name in ids.tolist()}
        if group_name in self.arrays:
            for index, group in zip(dialogue, self.text(group_name, _ID).tolist(), strict=True):
                groups[str(ids[index])].add(group)
        if "split" not in self.arrays:
            lengths = dict(zip(ids.tolist(), np.bincount(dialogue).tolist(), strict=True))
            by_dialogue, note = random_splits(
                lengths,
                groups,
                name=group_name,
                source=str(self.path),
                explicit=bool(group_by),
                seed=seed,
            )
            return np.array([by_dialogue[name] for name in ids.tolist()])[dialogue], [note]
        split = self.text("split", _TEXT)
        self.check("split", np.isin(split, SPLITS), f"allowed: {', '.join(SPLITS)}", split)
        by_dialogue = dict(zip(ids[dialogue].tolist(), split.tolist(), strict=True))
        note = overlap_note(groups, by_dialogue, group_name)
        return split, [note] if note else []

    def check_dialogues(
        self, order: np.ndarray, dialogue: np.ndarray, position: np.ndarray, split: np.ndarray
    ) -> None:
        """Fails if a dialogue, contiguous and sorted in `order`, has two splits or two of a place.

        Args:
            order: [N] rows by dialogue and position.
            dialogue: [N] ids.
            position: [N].
            split: [N].
        """
        before, after = order[:-1], order[1:]
        follows = dialogue[before] == dialogue[after]
        good = np.ones(len(order), bool)
        good[after] = ~(follows & (position[before] == position[after]))
        self.check("position", good, "repeated in its dialogue; positions differ", position)
        good[after] = ~(follows & (split[before] != split[after]))
        self.check("split", good, "part of its dialogue is elsewhere; one split each", split)

    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _array(
        self, name: str, ndim: int, kind: tuple[str, str], rows: int | None = None
    ) -> np.ndarray:
        array = self.arrays[name]
        letters, meaning = kind
        if array.ndim != ndim:
            self.fail(name, f"{array.ndim} dimensions; allowed: {ndim}")
        if rows is not None and len(array) != rows:
            self.fail(name, f"{len(array)} rows; allowed: {rows}, as in utterance")
        if array.dtype.kind not in letters:
            self.fail(name, f"type {array.dtype}; allowed: {meaning}")
        return array

    def _strings(self, name: str, array: np.ndarray) -> np.ndarray:
        try:
            strings = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
            strings = strings.astype(str)
            "".join(strings.tolist()).encode()
        except (UnicodeError, ValueError):
            self.fail(name, "bytes that are not text; allowed: UTF-8")
        return strings


def _feature_spec(splits: Mapping[str, DialogueFeatures]) -> Any:
    """The TFDS features that all the splits share."""
    shared = {
        (
            split.class_names,
            split.speech_dim,
            split.text_dim,
            split.speech.dtype,
            split.text.dtype,
            split.score is not None,
            split.utterance_metadata is not None,
        )
        for split in splits.values()
    }
    if len(shared) != 1:
        raise ValueError(f"splits must share classes, widths, types and scores, got {shared}")
    unknown = set(splits) - set(SPLITS)
    if unknown:
        raise ValueError(f"splits {sorted(unknown)}, allowed: {SPLITS}")
    ((class_names, speech_dim, text_dim, speech_dtype, text_dtype, has_score, has_more),) = shared
    # Stored as bytes: half the size for float16, and many times faster to write than float lists.
    utterance = {
        "utterance": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=class_names),
        "speech": tfds.features.Tensor(shape=(speech_dim,), dtype=speech_dtype, encoding="bytes"),
        "text": tfds.features.Tensor(shape=(text_dim,), dtype=text_dtype, encoding="bytes"),
        "speech_present": np.bool_,
        "text_present": np.bool_,
    }
    if has_score:
        utterance["score"] = np.float32
    if has_more:
        utterance["metadata"] = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {"dialogue": tfds.features.Text(), "utterances": tfds.features.Sequence(utterance)}
    )


def _examples(features: DialogueFeatures) -> Iterator[tuple[int, dict[str, Any]]]:
    """Keys and dialogues as TFDS wants them."""
    columns = {
        "utterance": features.utterance_ids,
        "label": features.label,
        "speech": features.speech,
        "text": features.text,
        "speech_present": features.speech_present,
        "text_present": features.text_present,
    }
    if features.score is not None:
        columns["score"] = features.score
    if features.utterance_metadata is not None:
        columns["metadata"] = features.utterance_metadata
    offsets = features.offsets
    for index, dialogue in enumerate(features.dialogue_ids):
        rows = slice(offsets[index], offsets[index + 1])
        yield (
            index,
            {
                "dialogue": dialogue,
                "utterances": {field: values[rows] for field, values in columns.items()},
            },
        )
