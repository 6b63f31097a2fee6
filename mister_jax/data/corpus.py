"""A corpus before its recordings are read: which dialogues, utterances, labels and files there are.

Each corpus has a reader that makes a `Corpus` from what its authors released; `builder` writes a
`Corpus` as a TFDS dataset. Nothing here needs TensorFlow, and no field tells who speaks.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from mister_jax.data.schema import SPLITS
from mister_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Recording:
    """Where an utterance's sound is.

    Attributes:
        path: A file of any format that FFmpeg reads; it need not exist.
        start: Seconds into the file where the utterance begins; the beginning of the file if None.
        end: Seconds into the file where it ends; the end of the file if None.
        channel: Channel that is read: "mix", "left", "right", or an index from 0.
    """

    path: str
    start: float | None = None
    end: float | None = None
    channel: str | int = "mix"


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One turn of a dialogue.

    Attributes:
        id: Id, unique in the corpus.
        text: Transcript; empty where there is none.
        recording: Sound; None where there is none.
        label: Class name, or None for context only.
        score: Sentiment in [-3, 3], in corpora with scores.
        start: Seconds from the beginning of the dialogue where it begins, None where unknown.
        end: Seconds from the beginning of the dialogue where it ends, None where unknown.
        metadata: Further columns of a manifest, by name. They travel to the output, and no model
            reads them.
    """

    id: str
    text: str = ""
    recording: Recording | None = None
    label: str | None = None
    score: float | None = None
    start: float | None = None
    end: float | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Utterances in the order in which they were said."""

    id: str
    utterances: tuple[Utterance, ...]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a reader found.

    Attributes:
        name: of the corpus.
        class_names: emotions; the labels count into them.
        splits: dialogues by split, in the order of `SPLITS`.
        scored: utterances have a `score`.
        notes: what a user should know of the reading, a line each.

    Raises:
        InputError: an id is repeated, a dialogue is empty, a label is no class, or there is no
            utterance at all.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[Dialogue, ...]]
    scored: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [split for split in self.splits if split not in SPLITS]
        if unknown:
            raise InputError(f"{self.name}: split {unknown[0]!r}; allowed: {', '.join(SPLITS)}")
        repeated = first_repeated(dialogue.id for _, dialogue in self.dialogues())
        if repeated is not None:
            raise InputError(f"{self.name}: dialogue {repeated!r} repeated; ids are unique")
        repeated = first_repeated(utterance.id for _, utterance in self.utterances())
        if repeated is not None:
            raise InputError(f"{self.name}: utterance {repeated!r} repeated; ids are unique")
        if not any(self.splits.values()):
            raise InputError(f"{self.name}: no dialogues; at least one is needed")
        for _, dialogue in self.dialogues():
            if not dialogue.utterances:
                raise InputError(f"{self.name}: dialogue {dialogue.id!r} has no utterances")
        for _, utterance in self.utterances():
            if utterance.label is not None and utterance.label not in self.class_names:
                raise InputError(
                    f"{self.name}: utterance {utterance.id!r}: label {utterance.label!r}; "
                    f"allowed: {', '.join(self.class_names)}"
                )

    def dialogues(self) -> Iterator[tuple[str, Dialogue]]:
        """Splits and dialogues."""
        for split, dialogues in self.splits.items():
            for dialogue in dialogues:
                yield split, dialogue

    def utterances(self) -> Iterator[tuple[str, Utterance]]:
        """Splits and utterances."""
        for split, dialogue in self.dialogues():
            for utterance in dialogue.utterances:
                yield split, utterance

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Dialogues and utterances of each split."""
        return {
            split: (len(dialogues), sum(len(dialogue.utterances) for dialogue in dialogues))
            for split, dialogues in self.splits.items()
        }

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Labelled utterances of each class, by split."""
        counts = {split: dict.fromkeys(self.class_names, 0) for split in self.splits}
        for split, utterance in self.utterances():
            if utterance.label is not None:
                counts[split][utterance.label] += 1
        return counts

    def texts_of_training(self) -> dict[str, int]:
        """Utterances of the other splits whose text occurs verbatim in training, too."""
        known = {utterance.text for split, utterance in self.utterances() if split == "train"}
        counts = {split: 0 for split in self.splits if split != "train"}
        for split, utterance in self.utterances():
            if split != "train" and utterance.text and utterance.text in known:
                counts[split] += 1
        return counts


def first_repeated(names: Iterator[str]) -> str | None:
    """The first name that occurs twice, or None."""
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


Sizes = Mapping[str, tuple[int, int]]
"""Dialogues and utterances of parts of a corpus."""


def check_sizes(corpus: Corpus, found: Sizes, released: Sizes, *, partial: bool) -> Corpus:
    """Refuses a corpus that was read in part.

    Args:
        corpus: what was read.
        found: its sizes.
        released: the sizes of the released corpus.
        partial: allow other sizes, and say so in the notes.

    Raises:
        InputError: sizes differ and `partial` is off.
    """
    differences = [
        "{} {} dialogues, {} utterances in place of {}, {}".format(
            part, *found.get(part, (0, 0)), *sizes
        )
        for part, sizes in released.items()
        if found.get(part, (0, 0)) != sizes
    ]
    if not differences:
        return corpus
    message = f"not the whole corpus: {'; '.join(differences)}"
    if not partial:
        raise InputError(f"{corpus.name}: {message}; --partial allows it")
    return dataclasses.replace(corpus, notes=(*corpus.notes, message))


def existing_directory(path: str | pathlib.Path, *, needed: str) -> pathlib.Path:
    """The folder of a corpus.

    Raises:
        InputError: there is none; `needed` says what it should hold.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; needed: {needed}")
    return path


def find(root: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    """Returns the first of `names` in a folder or one folder below it, None if there is none.

    Folders that archive programs add, such as `__MACOSX`, are not searched.
    """
    folders = sorted(
        child
        for child in root.iterdir()
        if child.is_dir() and child.name != "__MACOSX" and not child.name.startswith(".")
    )
    for name in names:
        for folder in (root, *folders):
            if (folder / name).exists():
                return folder / name
    return None


def read_text(path: pathlib.Path) -> str:
    """A file's text.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: not UTF-8; allowed: UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def count_names(names: Sequence[str]) -> str:
    """`a 3, b 1`: for notes."""
    return ", ".join(f"{name} {count}" for name, count in collections.Counter(names).items())
