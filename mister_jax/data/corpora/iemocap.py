"""Reads IEMOCAP: two-person dialogues by ten actors, labeled with six or four emotions.

See doi 10.1007/s10579-008-9076-6.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from mister_jax.data.builder import CorpusConfig, DialogueBuilder
from mister_jax.data.corpus import (
    Corpus,
    DecodeRequest,
    Dialogue,
    Utterance,
    check_sizes,
    existing_directory,
    read_text,
)
from mister_jax.data.schema import SPLITS
from mister_jax.errors import InputError

_FOUR = {"hap": "happy", "sad": "sad", "neu": "neutral", "ang": "angry"}
CLASSES: Mapping[str, Mapping[str, str]] = {
    "six": {**_FOUR, "exc": "excited", "fru": "frustrated"},
    "four": {**_FOUR, "exc": "happy"},
}
"""Maps labels to six or four class names. Utterances with other labels are unlabeled."""

# The labels after the six classes mean no consensus, other, surprise, fear and disgust.
_LABELS = (*CLASSES["six"], "xxx", "oth", "sur", "fea", "dis")

VALIDATION = ("session1", "cosmic12")

_COSMIC12 = """
    Ses01M_impro01 Ses01M_script03_1 Ses02F_impro02 Ses02F_impro07 Ses02M_script01_2 Ses03F_impro01
    Ses03M_impro02 Ses03M_impro08a Ses03M_script02_2 Ses03M_script03_2 Ses04F_impro07
    Ses04F_script02_1
"""
COSMIC12 = frozenset(_COSMIC12.split())
"""Validation dialogues of COSMIC (arXiv 2010.02795). Their speakers also occur in training."""

RELEASED = (151, 10_039)
"""Number of dialogues and annotated utterances in all sessions."""

LAYOUT = (
    "IEMOCAP_full_release, with Session1 to Session5, each with dialog/EmoEvaluation, "
    "dialog/transcriptions and sentences/wav"
)

_TURN = re.compile(r"\[\s*([\d.]+)\s*-\s*([\d.]+)\s*\]\t(\S+)\t(\S+)\t\[.*\]\s*")
_LINE = re.compile(r"(Ses\S+)\s+\[[^\]]*\]\s*:(.*)")


# Line with an evaluator's categories and an optional comment in parentheses. Lines in which actors
# rate themselves (C-F1, C-M1) are not read.
_RATING = re.compile(r"C-E\d+:([^(]*)(\(.*)?")
_CATEGORIES = {
    "neutral": "neu",
    "neutral state": "neu",
    "happiness": "hap",
    "sadness": "sad",
    "anger": "ang",
    "frustration": "fru",
    "excited": "exc",
    "surprise": "sur",
    "fear": "fea",
    "disgust": "dis",
    "other": "oth",
}
"""Maps the evaluators' categories to labels."""


class Turn(NamedTuple):
    """Annotated turn of a dialogue, with times in seconds and the evaluators' labels."""

    id: str
    label: str
    start: float
    end: float
    ratings: tuple[tuple[str, ...], ...] = ()


def read_iemocap(
    source: str | pathlib.Path,
    *,
    classes: str = "six",
    validation: str = "session1",
    partial: bool = False,
) -> Corpus:
    """Reads the annotations of IEMOCAP and locates its recordings.

    Args:
        source: Folder that contains `Session1` to `Session5`.
        classes: "six", or "four" with excited merged into happy. Utterances with other emotions are
            unlabeled.
        validation: "session1", whose speakers are not in training, or "cosmic12" (see `COSMIC12`).
            Session 5 is always the test split.
        partial: Whether to allow a corpus whose size differs from the release.

    Raises:
        InputError: A file is missing or a line cannot be used.
    """
    if classes not in CLASSES:
        raise InputError(f"classes {classes!r}; allowed: {', '.join(CLASSES)}")
    if validation not in VALIDATION:
        raise InputError(f"validation {validation!r}; allowed: {', '.join(VALIDATION)}")
    root = existing_directory(source, needed=LAYOUT)
    if not (root / "Session1").is_dir() and (root / "IEMOCAP_full_release").is_dir():
        root = root / "IEMOCAP_full_release"
    splits: dict[str, list[Dialogue]] = {split: [] for split in SPLITS}
    notes: list[str] = []
    for session in range(1, 6):
        folder = root / f"Session{session}"
        annotation = folder / "dialog" / "EmoEvaluation"
        if not annotation.is_dir():
            if partial:
                notes.append(f"no folder {annotation.relative_to(root)}")
                continue
            raise InputError(f"{annotation}: no such folder; needed: {LAYOUT}")
        # Archives from macOS contain files with the same names and the prefix `._`.
        paths = sorted(path for path in annotation.glob("*.txt") if path.name[:2] != "._")
        for path in paths:
            dialogue = _read_dialogue(path, folder, CLASSES[classes], notes)
            in_validation = session == 1 if validation == "session1" else dialogue.id in COSMIC12
            split = "validation" if in_validation else "train"
            splits["test" if session == 5 else split].append(dialogue)
    class_names = tuple(dict.fromkeys(CLASSES[classes].values()))
    corpus = Corpus("iemocap", class_names, splits, notes=tuple(notes))
    return check_sizes(corpus, {"total": RELEASED}, partial=partial)


def _read_dialogue(
    path: pathlib.Path, session: pathlib.Path, classes: Mapping[str, str], notes: list[str]
) -> Dialogue:
    name = path.stem
    transcript = session / "dialog" / "transcriptions" / path.name
    if not transcript.is_file():
        raise InputError(f"{transcript}: no such file; each dialogue needs its transcript")
    texts: dict[str, str] = {}
    for number, line in enumerate(read_text(transcript).splitlines(), start=1):
        match = _LINE.fullmatch(line.strip())
        if match is None or not _is_turn(match[1]):
            continue
        text = match[2].strip()
        if texts.setdefault(match[1], text) != text:
            raise InputError(
                f"{transcript}: line {number}: turn {match[1]} is repeated with another text; "
                "needed: one text per turn"
            )
    turns = {
        turn.id: Utterance(
            id=turn.id,
            text=texts.get(turn.id, ""),
            recording=DecodeRequest(str(session / "sentences" / "wav" / name / f"{turn.id}.wav")),
            label=classes.get(turn.label),
            ratings=_ratings(turn, classes),
            start=turn.start,
            end=turn.end,
        )
        for turn in read_turns(path)
    }
    no_transcript = [turn for turn in turns if turn not in texts]
    if no_transcript:
        notes.append(f"{name}: no transcript for {', '.join(no_transcript)}")
    ordered = sorted(turns.values(), key=lambda turn: (turn.start, turn.end))
    return Dialogue(name, tuple(ordered))


def _ratings(turn: Turn, classes: Mapping[str, str]) -> dict[str, float]:
    """Returns the number of evaluators who chose each class.

    If an evaluator chose several labels, each label gets an equal fraction of the vote. Labels that
    are not in `classes` are ignored.
    """
    ratings: dict[str, float] = {}
    for labels in turn.ratings:
        for label in labels:
            if label in classes:
                name = classes[label]
                ratings[name] = ratings.get(name, 0) + 1 / len(labels)
    return ratings


def _evaluator_labels(line: str, location: str) -> tuple[str, ...]:
    """Returns an evaluator's labels from a line such as "C-E2: Anger; Frustration; ()".

    The result is empty if the evaluator chose no label.
    """
    match = _RATING.fullmatch(line)
    names = [name.strip() for name in match[1].split(";") if name.strip()] if match else []
    if match is None or any(name.lower() not in _CATEGORIES for name in names):
        raise InputError(
            f"{location}: {line[:60]!r}; needed: an evaluator and emotions, each followed by a "
            f"semicolon; allowed emotions: {', '.join(_CATEGORIES)}"
        )
    return tuple(dict.fromkeys(_CATEGORIES[name.lower()] for name in names))


def read_turns(path: pathlib.Path) -> list[Turn]:
    """Reads the turns of a dialogue from its file in `EmoEvaluation`, in the order of the file.

    Raises:
        InputError: A line cannot be used, or there are no turns.
    """
    turns: dict[str, Turn] = {}
    current: Turn | None = None
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        location = f"{path}: line {number}"
        if not line.startswith("["):
            # The lines after a turn contain its evaluators' labels.
            if current is not None and line.startswith("C-E"):
                labels = _evaluator_labels(line.strip(), location)
                current = current._replace(ratings=(*current.ratings, labels))
                turns[current.id] = current
            continue
        current = None
        match = _TURN.fullmatch(line)
        if match is None:
            raise InputError(
                f"{location}: {line[:60]!r}; needed: [start - end], id, label, "
                "[v, a, d], separated by tabs"
            )
        start, end, turn, label = match.groups()
        if not _is_turn(turn):
            continue
        if turn.rpartition("_")[0] != path.stem:
            raise InputError(
                f"{location}: turn {turn} belongs to another dialogue; needed: {path.stem}_..."
            )
        if label not in _LABELS:
            raise InputError(f"{location}: label {label!r}; allowed: {', '.join(_LABELS)}")
        if turn in turns:
            raise InputError(f"{location}: turn {turn} is repeated; needed: unique ids")
        start_seconds, end_seconds = _seconds(start, location), _seconds(end, location)
        if end_seconds < start_seconds:
            raise InputError(f"{location}: [{start} - {end}]; needed: end >= start")
        current = turns[turn] = Turn(turn, label, start_seconds, end_seconds)
    if not turns:
        raise InputError(f"{path}: no turns; the file may be truncated")
    return list(turns.values())


def _is_turn(name: str) -> bool:
    # An id consists of dialogue, speaker and number, such as Ses03M_impro05a_F003. XX in the number
    # marks nonverbal sounds, which are not turns.
    return "XX" not in name.rpartition("_")[2]


def _seconds(value: str, location: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise InputError(f"{location}: time {value!r}; allowed: seconds") from error


class Iemocap(DialogueBuilder):
    """TFDS builder for IEMOCAP."""

    read = staticmethod(read_iemocap)
    BUILDER_CONFIGS: ClassVar = [
        CorpusConfig(
            name=f"{classes}_{validation}",
            description=f"{classes} classes, validation {validation}.",
            options={"classes": classes, "validation": validation},
        )
        for classes in CLASSES
        for validation in VALIDATION
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""
    IEMOCAP needs a license: request it at https://sail.usc.edu/iemocap. The manual directory is
    {LAYOUT}.
    """
    DESCRIPTION = "Scripted and improvised dialogues of actors, with an emotion for most turns."
    CITATION = """
    @article{busso2008iemocap,
      title={{IEMOCAP}: interactive emotional dyadic motion capture database},
      author={Busso, Carlos and Bulut, Murtaza and Lee, Chi-Chun and Kazemzadeh, Abe and
              Mower, Emily and Kim, Samuel and Chang, Jeannette N. and Lee, Sungbok and
              Narayanan, Shrikanth S.},
      journal={Language Resources and Evaluation},
      year={2008}
    }
    """
    LICENSE = "By agreement with the University of Southern California; no redistribution."
    HOMEPAGE = "https://sail.usc.edu/iemocap"
