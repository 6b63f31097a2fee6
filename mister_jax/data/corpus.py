"""A corpus before its recordings are read: dialogues, utterances, labels and file names.

Each corpus has a reader that makes a `Corpus` from the files that its authors released. `builder`
writes a `Corpus` as a TFDS dataset. Nothing here needs TensorFlow.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from mister_jax.data.audio import existing_path
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
    """Utterances in the order in which they were spoken."""

    id: str
    utterances: tuple[Utterance, ...]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The content of a corpus as its reader returns it.

    Attributes:
        name: Name of the corpus.
        class_names: Emotions; labels are among them.
        splits: Dialogues by split, in the order of `SPLITS`.
        scored: Whether utterances have a `score`.
        notes: Notes for the user on how the corpus was read, a line each.

    Raises:
        InputError: An id is repeated, a dialogue is empty, a label is not a class, or the corpus
            has no utterances.
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
        """Returns the numbers of dialogues and utterances of each split."""
        return {
            split: (len(dialogues), sum(len(dialogue.utterances) for dialogue in dialogues))
            for split, dialogues in self.splits.items()
        }

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Returns the number of labeled utterances of each class, by split."""
        counts = {split: dict.fromkeys(self.class_names, 0) for split in self.splits}
        for split, utterance in self.utterances():
            if utterance.label is not None:
                counts[split][utterance.label] += 1
        return counts

    def train_text_overlap(self) -> dict[str, int]:
        """Returns how many utterances of each other split have a text that occurs in training."""
        training_texts = {
            utterance.text for split, utterance in self.utterances() if split == "train"
        }
        counts = {split: 0 for split in self.splits if split != "train"}
        for split, utterance in self.utterances():
            if split != "train" and utterance.text and utterance.text in training_texts:
                counts[split] += 1
        return counts


def first_repeated(names: Iterator[str]) -> str | None:
    """Returns the first name that occurs twice, or None."""
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


Sizes = Mapping[str, tuple[int, int]]
"""Numbers of dialogues and utterances of parts of a corpus."""


def check_sizes(corpus: Corpus, found: Sizes, released: Sizes, *, partial: bool) -> Corpus:
    """Refuses a corpus that is incomplete.

    Args:
        corpus: The corpus as read.
        found: Sizes of its parts.
        released: Sizes of the parts of the released corpus.
        partial: Allow other sizes, and add a note.

    Raises:
        InputError: Sizes differ and `partial` is off.
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
    """Returns the folder of a corpus.

    Raises:
        InputError: The folder does not exist; `needed` says what it should hold.
    """
    path = pathlib.Path(existing_path(pathlib.Path(path).expanduser()))
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
    """Returns the text of a file.

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


def count_names(names: Sequence[str]) -> str:
    """Returns names with their counts for a note, such as `a 3, b 1`."""
    return ", ".join(f"{name} {count}" for name, count in collections.Counter(names).items())
