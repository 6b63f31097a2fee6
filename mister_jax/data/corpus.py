"""Corpora before decoding: dialogues, utterances, labels and paths to recordings.

The modules in `corpora` read a `Corpus` from a released corpus or from the user's files, and
`prepare` stores the `Corpus` as a dataset. This module does not need TensorFlow.
"""

import dataclasses
import pathlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mister_jax.data.audio import DecodeRequest
from mister_jax.data.audio_source import existing_path
from mister_jax.data.schema import SPLITS
from mister_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Utterance:
    """Utterance of a dialogue.

    Attributes:
        id: Utterance id, unique in the corpus.
        text: Transcript; empty if missing.
        recording: File and time range of the audio; None if missing. The file need not exist.
        label: Name of the class; None if the utterance is unlabeled context.
        score: Sentiment from -3 to 3; None if the utterance has no score.
        ratings: Number of raters who chose each class, by class name. A rater's vote may be divided
            among several classes. Empty if unknown.
        start, end: Start and end in seconds from the beginning of the dialogue; None if unknown.
        metadata: Extra columns of a manifest by name. No model reads the metadata.
    """

    id: str
    text: str = ""
    recording: DecodeRequest | None = None
    label: str | None = None
    score: float | None = None
    ratings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start: float | None = None
    end: float | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Dialogue with utterances in spoken order."""

    id: str
    utterances: tuple[Utterance, ...]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Dialogues of a corpus by split.

    Attributes:
        name: Name of the corpus.
        class_names: Names of the emotions. Every label must be one of these names.
        splits: Dialogues by split, in the order of `SPLITS`.
        scored: Whether utterances have sentiment scores.
        notes: Lines for the user about how the corpus was read.

    Raises:
        InputError: A split is unknown, an id is not unique, a dialogue is empty, a label or a rated
            class is not in `class_names`, a value has the wrong type, an utterance has a score but
            `scored` is false, or the corpus is empty.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Sequence[Dialogue]]
    scored: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [split for split in self.splits if split not in SPLITS]
        if unknown:
            raise InputError(f"{self.name}: split {unknown[0]!r}; allowed: {', '.join(SPLITS)}")
        for split, dialogues in self.splits.items():
            _check_type(f"{self.name}: split {split!r}", dialogues, Sequence, "a list or tuple")
        if not any(self.splits.values()):
            raise InputError(f"{self.name}: no dialogues; at least one is needed")
        ids = set()
        for _, dialogue in self.dialogues():
            location = f"{self.name}: dialogue {dialogue.id!r}"
            _check_type(f"{location}: id", dialogue.id, str, "str")
            _check_type(f"{location}: utterances", dialogue.utterances, Sequence, "a tuple")
            if not dialogue.utterances:
                raise InputError(f"{location} has no utterances")
            for id_ in (
                f"dialogue {dialogue.id!r}",
                *(f"utterance {utterance.id!r}" for utterance in dialogue.utterances),
            ):
                if id_ in ids:
                    raise InputError(f"{self.name}: {id_} is repeated; needed: unique ids")
                ids.add(id_)
        for _, utterance in self.utterances():
            location = f"{self.name}: utterance {utterance.id!r}"
            _check_type(f"{location}: id", utterance.id, str, "str")
            _check_type(f"{location}: text", utterance.text, str, "str, empty if missing")
            _check_type(
                f"{location}: recording",
                utterance.recording,
                DecodeRequest | None,
                "DecodeRequest, or None if missing",
            )
            if utterance.score is not None and not self.scored:
                raise InputError(f"{location}: score: {utterance.score}; needed: scored=True")
            if utterance.label is not None and utterance.label not in self.class_names:
                raise InputError(
                    f"{location}: label {utterance.label!r}; allowed: {', '.join(self.class_names)}"
                )
            for name in utterance.ratings:
                if name not in self.class_names:
                    raise InputError(
                        f"{location}: ratings of {name!r}; allowed: {', '.join(self.class_names)}"
                    )

    @property
    def rated(self) -> bool:
        """Whether the ratings of any utterance are known."""
        return any(utterance.ratings for _, utterance in self.utterances())

    def dialogues(self) -> Iterator[tuple[str, Dialogue]]:
        """Yields each dialogue with its split."""
        for split, dialogues in self.splits.items():
            for dialogue in dialogues:
                yield split, dialogue

    def utterances(self) -> Iterator[tuple[str, Utterance]]:
        """Yields each utterance with its split."""
        for split, dialogue in self.dialogues():
            for utterance in dialogue.utterances:
                yield split, utterance

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Returns the number of dialogues and utterances of each split."""
        return {
            split: (len(dialogues), sum(len(dialogue.utterances) for dialogue in dialogues))
            for split, dialogues in self.splits.items()
        }


def _check_type(location: str, value: Any, type_: type | types.UnionType, needed: str) -> None:
    if not isinstance(value, type_):
        raise InputError(f"{location}: {type(value).__name__}; needed: {needed}")


def check_sizes(
    corpus: Corpus, released: Mapping[str, tuple[int, int]], *, partial: bool
) -> Corpus:
    """Compares the number of dialogues and utterances with the released corpus.

    Args:
        corpus: Corpus to check.
        released: Released number of dialogues and utterances by split, or under the key "total".
        partial: Whether an incomplete corpus is allowed.

    Returns:
        The corpus, with a note if the numbers differ.

    Raises:
        InputError: The numbers differ and `partial` is false.
    """
    sizes = corpus.sizes()
    num_dialogues, num_utterances = map(sum, zip(*sizes.values(), strict=True))
    sizes["total"] = num_dialogues, num_utterances
    differences = [
        "{} {} dialogues, {} utterances instead of {}, {}".format(
            part, *sizes.get(part, (0, 0)), *released_size
        )
        for part, released_size in released.items()
        if sizes.get(part, (0, 0)) != released_size
    ]
    if not differences:
        return corpus
    message = f"incomplete corpus: {'; '.join(differences)}"
    if not partial:
        raise InputError(f"{corpus.name}: {message}; --partial allows it")
    return dataclasses.replace(corpus, notes=(*corpus.notes, message))


def existing_directory(path: str | pathlib.Path, *, needed: str) -> pathlib.Path:
    """Returns the path of an existing folder.

    Raises:
        InputError: The folder does not exist. The message says what is `needed`.
    """
    path = pathlib.Path(existing_path(pathlib.Path(path).expanduser()))
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; needed: {needed}")
    return path


def find(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """Finds a file or folder in `root` and its direct subfolders; returns None if none exists.

    The search skips hidden subfolders and `__MACOSX`, which archive programs add.
    """
    folders = sorted(
        child
        for child in root.iterdir()
        if child.is_dir() and child.name != "__MACOSX" and not child.name.startswith(".")
    )
    paths = (folder / name for folder in (root, *folders))
    return next((path for path in paths if path.exists()), None)


def read_text(path: pathlib.Path) -> str:
    """Reads a UTF-8 text file.

    Raises:
        InputError: The file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: not UTF-8; allowed: UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
