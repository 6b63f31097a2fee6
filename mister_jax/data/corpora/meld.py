"""Reads MELD: dialogues from a television series, with seven emotions (arXiv 1810.02508).

The release contains three CSV files, and one video clip for each row in these files.
"""

import csv
import io
import pathlib
import re
import threading
import urllib.request
from typing import Any, ClassVar

from etils import epath

from mister_jax.data.builder import CorpusConfig, DialogueBuilder
from mister_jax.data.corpus import (
    Corpus,
    DecodeRequest,
    Dialogue,
    Utterance,
    check_sizes,
    existing_directory,
    find,
    read_text,
)
from mister_jax.data.lazy import tfds
from mister_jax.data.storage import atomic_directory
from mister_jax.errors import InputError

# MELD publishes no checksums of these files, and the branch may change. Therefore, `read_meld`
# checks the published numbers of dialogues and utterances.
_URL = "https://raw.githubusercontent.com/declare-lab/MELD/master/data/MELD"

_TIMEOUT_SECONDS = 10.0

# Folders in which TFDS stores unfinished downloads.
_UNFINISHED = "*/*.tmp.*"

CLASS_NAMES = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")

RELEASED = {"train": (1038, 9989), "validation": (114, 1109), "test": (280, 2610)}
"""Number of dialogues and utterances in each split."""

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
_CLIP = re.compile(r"dia\d+_utt\d+\.mp4")

# Repairs cp1252 text that was decoded as Latin-1: maps the control characters U+0080 to U+009F to
# the characters that cp1252 encodes with the same bytes, except for five undefined bytes.
_WINDOWS = {
    code: character
    for code in range(0x80, 0xA0)
    if (character := bytes([code]).decode("cp1252", errors="ignore"))
}


def read_meld(
    source: str | pathlib.Path,
    *,
    clips: bool = True,
    corrected_test_clips: bool = False,
    partial: bool = False,
) -> Corpus:
    """Reads the annotations of MELD and locates its clips.

    Args:
        source: Folder that contains the CSV files and clip folders, directly or one level deeper.
        clips: Whether to use the clips. Without clips, all speech is missing.
        corrected_test_clips: Whether to replace test clips with their corrected versions,
            `final_videos_testdia*`, where these exist.
        partial: Whether to allow a corpus whose size differs from the release.

    Raises:
        InputError: A file is missing or a row cannot be used.
    """
    root = existing_directory(source, needed=LAYOUT)
    splits, notes = {}, []
    for split, name in CSV_FILES.items():
        path = find(root, name)
        if path is None:
            raise InputError(f"{root}: no {name}; needed: {LAYOUT}")
        folder = find(root, CLIP_FOLDERS[split]) if clips else None
        if clips and folder is None:
            raise InputError(
                f"{root}: no folder {CLIP_FOLDERS[split]}; needed: {LAYOUT}; "
                "--config=text needs no clips"
            )
        splits[split], used = _read_split(path, split, folder, corrected_test_clips)
        clip_names = {clip.name for clip in folder.iterdir()} if folder else set()
        unused = sorted(filter(_CLIP.fullmatch, clip_names - used))
        if unused:
            notes.append(
                f"{split}: {len(unused)} clips without a row are ignored, for example {unused[0]}"
            )
    corpus = Corpus("meld", CLASS_NAMES, splits, notes=tuple(notes))
    return check_sizes(corpus, RELEASED, partial=partial)


def _read_split(
    path: pathlib.Path, split: str, folder: pathlib.Path | None, corrected: bool
) -> tuple[list[Dialogue], set[str]]:
    """Returns the dialogues in a CSV file and the names of their clips."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    dialogues: dict[int, dict[int, Utterance]] = {}
    used = set()
    try:
        columns = reader.fieldnames or ()
        missing = [column for column in _COLUMNS if column not in columns]
        if missing:
            raise InputError(
                f"{path}: no column {', '.join(missing)}; needed: {', '.join(_COLUMNS)}"
            )
        for row in reader:
            location = f"{path}: line {reader.line_num}"
            # `DictReader` stores extra fields as a list under None, and None for missing fields.
            if None in row or None in row.values():
                num_fields = sum(value is not None for value in row.values())
                num_fields += len(row[None]) - 1 if None in row else 0
                raise InputError(
                    f"{location}: {num_fields} fields; needed: {len(columns)}, one per column"
                )
            dialogue = _number(row["Dialogue_ID"], f"{location}: Dialogue_ID")
            number = _number(row["Utterance_ID"], f"{location}: Utterance_ID")
            label = row["Emotion"].strip().lower()
            if label not in CLASS_NAMES:
                raise InputError(
                    f"{location}: Emotion {row['Emotion']!r}; allowed: {', '.join(CLASS_NAMES)}"
                )
            turns = dialogues.setdefault(dialogue, {})
            if number in turns:
                raise InputError(f"{location}: dialogue {dialogue}, utterance {number} is repeated")
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
                recording=None if clip is None else DecodeRequest(str(clip)),
                label=label,
                start=_seconds(row["StartTime"], f"{location}: StartTime"),
                end=_seconds(row["EndTime"], f"{location}: EndTime"),
            )
    except csv.Error as error:
        # `line_num` is 0 if the header cannot be read.
        location = f"{path}: line {max(1, reader.line_num)}"
        raise InputError(f"{location}: not CSV ({error}); needed: closed quotes") from error
    return [
        Dialogue(f"{split}_dia{dialogue}", tuple(turns[number] for number in sorted(turns)))
        for dialogue, turns in sorted(dialogues.items())
    ], used


def _number(value: str, location: str) -> int:
    if not re.fullmatch(r"\s*\d+\s*", value):
        raise InputError(f"{location}: {value!r}; allowed: whole numbers")
    return int(value)


def _seconds(value: str, location: str) -> float:
    match = _TIME.fullmatch(value.strip())
    if match is None:
        raise InputError(f"{location}: {value!r}; allowed: hours:minutes:seconds,milliseconds")
    hours, minutes, seconds, fraction = match.groups()
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction}")


def download_csv(dl_manager: tfds.download.DownloadManager) -> pathlib.Path:
    """Returns the folder with the CSV files. If there is no such folder, downloads the files.

    Raises:
        InputError: The files cannot be downloaded or written.
    """
    names = tuple(CSV_FILES.values())
    folder = epath.Path(dl_manager.download_dir)
    csv_folder = folder / "meld_csv"
    if csv_folder.exists():
        return pathlib.Path(csv_folder)
    unfinished = set(folder.glob(_UNFINISHED))
    try:
        # Without a network, TFDS would retry for minutes.
        _check_reachable(f"{_URL}/{names[0]}")
        paths = dl_manager.download({name: f"{_URL}/{name}" for name in names})
    # The errors of urllib, `requests`, TFDS and TensorFlow have many types.
    except Exception as error:
        for path in set(folder.glob(_UNFINISHED)) - unfinished:
            path.rmtree()
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"MELD's CSV files cannot be downloaded ({reason}); --source=DIR reads "
            f"{', '.join(names)} from a folder"
        ) from error
    with atomic_directory(csv_folder, folder, overwrite=True) as temporary:
        (temporary / csv_folder.name).mkdir()
        for name, path in paths.items():
            path.copy(temporary / csv_folder.name / name)
    return pathlib.Path(csv_folder)


def _check_reachable(url: str) -> None:
    """Raises an error if the server does not confirm within the timeout that a file exists."""
    errors: list[Exception] = [TimeoutError(f"no answer within {_TIMEOUT_SECONDS:g} s")]

    def request_head() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS).close()
            errors.clear()
        except Exception as error:
            errors[0] = error

    # A DNS lookup has no timeout, so the request runs in a thread.
    thread = threading.Thread(target=request_head, daemon=True)
    thread.start()
    thread.join(_TIMEOUT_SECONDS)
    for error in errors:
        raise error


class Meld(DialogueBuilder):
    """TFDS builder for MELD."""

    read = staticmethod(read_meld)
    BUILDER_CONFIGS: ClassVar = [
        CorpusConfig(name="clips", description="Speech from the released clips, and text."),
        CorpusConfig(
            name="corrected_test_clips",
            description="Like clips, with corrected test clips where they exist.",
            options={"corrected_test_clips": True},
        ),
        CorpusConfig(
            name="text", description="Text only; needs no clips.", options={"clips": False}
        ),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""
    Unpack MELD.Raw.tar.gz from https://affective-meld.github.io and the archives in it. The manual
    directory is {LAYOUT}. The config `text` needs only the CSV files and downloads them.
    """
    DESCRIPTION = "Dialogues of a television series with an emotion for each utterance."
    CITATION = """
    @inproceedings{poria2019meld,
      title={{MELD}: A Multimodal Multi-Party Dataset for Emotion Recognition in Conversations},
      author={Poria, Soujanya and Hazarika, Devamanyu and Majumder, Navonil and Naik, Gautam and
              Cambria, Erik and Mihalcea, Rada},
      booktitle={Proceedings of ACL},
      year={2019}
    }
    """
    LICENSE = "GPL-3.0 (annotation); the scenes belong to their producers."
    HOMEPAGE = "https://affective-meld.github.io"

    @staticmethod
    def download(
        dl_manager: tfds.download.DownloadManager, *, clips: bool = True, **_: Any
    ) -> pathlib.Path | None:
        """Downloads the CSV files if the config needs no clips."""
        return None if clips else download_csv(dl_manager)
