"""Reads MELD as released: three CSV files, and a video clip for each of their rows."""

import csv
import io
import pathlib
import re

from mister_jax.data.corpus import (
    Corpus,
    Dialogue,
    Recording,
    Utterance,
    check_sizes,
    existing_directory,
    find,
    read_text,
)
from mister_jax.errors import InputError

CLASS_NAMES = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")

RELEASED = {"train": (1038, 9989), "validation": (114, 1109), "test": (280, 2610)}
"""Numbers of dialogues and utterances of each split."""

CSV_FILES = {
    "train": "train_sent_emo.csv",
    "validation": "dev_sent_emo.csv",
    "test": "test_sent_emo.csv",
}
CLIP_FOLDERS = {
    "train": "train_splits",
    "validation": "dev_splits_complete",
    "test": "output_repeated_splits_test",
}
LAYOUT = f"MELD.Raw, with {', '.join(CSV_FILES.values())} and {', '.join(CLIP_FOLDERS.values())}"

_COLUMNS = ("Utterance", "Emotion", "Dialogue_ID", "Utterance_ID", "StartTime", "EndTime")
_TIME = re.compile(r"(\d+):(\d\d):(\d\d)[,.](\d{1,3})")
_CLIP = re.compile(r"(?:final_videos_test)?dia\d+_utt\d+\.mp4")


def _windows_punctuation() -> dict[int, str]:
    """Returns the characters for which U+0080 to U+009F stand as bytes of cp1252."""
    table = {}
    for code in range(0x80, 0xA0):
        try:
            table[code] = bytes([code]).decode("cp1252")
        except UnicodeDecodeError:  # Five bytes have no character.
            continue
    return table


_WINDOWS = _windows_punctuation()


def read(
    source: str | pathlib.Path,
    *,
    clips: bool = True,
    corrected_test_clips: bool = False,
    partial: bool = False,
) -> Corpus:
    """Reads the annotation and locates the clips.

    Args:
        source: Folder that holds the CSV files and the folders of clips, at most one level down.
        clips: Use the clips; without them all speech is missing.
        corrected_test_clips: Prefer the corrected cut of a test clip, `final_videos_testdia*`, if
            it exists.
        partial: Allow a corpus of another size than the released one.

    Raises:
        InputError: A file is missing or a row cannot be used.
    """
    root = existing_directory(source, needed=LAYOUT)
    splits, notes = {}, []
    for split, name in CSV_FILES.items():
        path = find(root, [name])
        if path is None:
            raise InputError(f"{root}: no {name}; needed: {LAYOUT}")
        folder = find(root, [CLIP_FOLDERS[split]]) if clips else None
        if clips and folder is None:
            raise InputError(
                f"{root}: no folder {CLIP_FOLDERS[split]}; needed: {LAYOUT}; "
                "--config=text needs no clips"
            )
        dialogues, used = _read_split(path, split, folder, corrected_test_clips)
        splits[split] = dialogues
        if folder is not None:
            clip_names = {clip.name for clip in folder.iterdir() if _CLIP.fullmatch(clip.name)}
            left = sorted(clip for clip in clip_names - used if not clip.startswith("final_"))
            if left:
                notes.append(f"{split}: {len(left)} clips without a row left out, as {left[0]}")
    corpus = Corpus("meld", CLASS_NAMES, splits, notes=tuple(notes))
    return check_sizes(corpus, corpus.sizes(), RELEASED, partial=partial)


def _read_split(
    path: pathlib.Path, split: str, folder: pathlib.Path | None, corrected: bool
) -> tuple[tuple[Dialogue, ...], set[str]]:
    """Returns the dialogues of a CSV file, and the names of the clips that they use."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    dialogues: dict[int, dict[int, Utterance]] = {}
    used = set()
    try:
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise InputError(
                f"{path}: no column {', '.join(missing)}; needed: {', '.join(_COLUMNS)}"
            )
        for row in reader:
            place = f"{path}: line {reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{place}: {len(row)} fields; needed: one for each column")
            dialogue = _number(row["Dialogue_ID"], f"{place}: Dialogue_ID")
            number = _number(row["Utterance_ID"], f"{place}: Utterance_ID")
            label = row["Emotion"].strip().lower()
            if label not in CLASS_NAMES:
                raise InputError(
                    f"{place}: Emotion {row['Emotion']!r}; allowed: {', '.join(CLASS_NAMES)}"
                )
            turns = dialogues.setdefault(dialogue, {})
            if number in turns:
                raise InputError(f"{place}: dialogue {dialogue}, utterance {number} repeated")
            clip = None
            if folder is not None:
                clip = folder / f"dia{dialogue}_utt{number}.mp4"
                replacement = clip.with_name(f"final_videos_test{clip.name}")
                if corrected and split == "test" and replacement.exists():
                    clip = replacement
                used.add(clip.name)
            turns[number] = Utterance(
                id=f"{split}_dia{dialogue}_utt{number}",
                text=row["Utterance"].translate(_WINDOWS).strip(),
                recording=None if clip is None else Recording(str(clip)),
                label=label,
                start=_seconds(row["StartTime"], f"{place}: StartTime"),
                end=_seconds(row["EndTime"], f"{place}: EndTime"),
            )
    except csv.Error as error:
        place = f"{path}: line {max(1, reader.line_num)}"  # It is 0 if the first line never ends.
        raise InputError(f"{place}: not CSV ({error}); needed: fields in closed quotes") from error
    return tuple(
        Dialogue(
            f"{split}_dia{dialogue}",
            tuple(dialogues[dialogue][number] for number in sorted(dialogues[dialogue])),
        )
        for dialogue in sorted(dialogues)
    ), used


def _number(value: str, place: str) -> int:
    if not re.fullmatch(r"\s*\d+\s*", value):
        raise InputError(f"{place}: {value!r}; allowed: whole numbers")
    return int(value)


def _seconds(value: str, place: str) -> float:
    match = _TIME.fullmatch(value.strip())
    if match is None:
        raise InputError(f"{place}: {value!r}; allowed: hours:minutes:seconds,milliseconds")
    hours, minutes, seconds, fraction = match.groups()
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction}")
