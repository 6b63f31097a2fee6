"""Reads one of EmoBox's 32 speech corpora with EmoBox's partitions (arXiv 2406.07162).

EmoBox publishes only metadata. Each corpus has a folder that contains a label map and one folder
per fold:

    urdu/label_map.json
    urdu/fold_1/urdu_train_fold_1.jsonl, urdu_test_fold_1.jsonl, and the same two files as .json
    track2/SAVEE_selected_balenced.jsonl: cross-corpus test sets

Each line of a .jsonl file describes an utterance:

    {"key": "urdu-SM20_F8_N012", "wav": "downloads/urdu/Neutral/SM20_F8_N012.wav", "emo": "N", ...}

The recordings must be downloaded from the original corpora. Most folds have no validation set. For
such a fold, about a fifth of the training utterances is drawn for validation. If all speakers are
known and there are at least three, all utterances of some speakers are drawn. Otherwise, random
utterances are drawn, or random dialogues in a conversational corpus.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from mister_jax.data.builder import DialogueBuilder
from mister_jax.data.corpora.iemocap import read_turns
from mister_jax.data.corpora.manifest.fields import Fields
from mister_jax.data.corpora.recording_finder import find_recordings
from mister_jax.data.corpora.text_files import read_any_text
from mister_jax.data.corpus import Corpus, DecodeRequest, Dialogue, Utterance, existing_directory
from mister_jax.data.splits import overlap_note
from mister_jax.errors import InputError

LAYOUT = "a corpus's folder in EmoBox/data, such as urdu, with fold_1/urdu_train_fold_1.jsonl"

VALIDATION_FRACTION = 0.2
"""Fraction of the training utterances that is held out for validation, as in EmoBox's code."""

SPEAKERS: Mapping[str, str] = {
    "ased": r"-(\d+)\.\w+$",
    "asvpesd": r"/\d+-\d+-\d+-\d+-\d+-(\d+)-[^/]*$",
    "cafe": r"/(\d\d)-[^/]*$",
    "casia": r"/([^/]+)/[^/]+/[^/]+$",
    "cremad": r"/(\d{4})_[^/]*$",
    "emodb": r"/(\d\d)[^/]*$",
    "emovdb": r"/([a-z]+)_[A-Za-z]+/[^/]*$",
    "emovo": r"-([fm]\d)-[^/]*$",
    "enterface": r"/s_?(\d+)_[^/]*$",
    "esd": r"/(\d{4})_[^/]*$",
    "iemocap": r"/(Ses\d\d)[FM]_[^/]*_([FM])\d+\.\w+$",
    "jlcorpus": r"/((?:fe)?male\d)_[^/]*$",
    "mead": r"/([MW]\d{3})/",
    "oreau": r"/(\d\d)[a-z]\d\d[^/]*$",
    "polish": r"/([fm]\d)\.[^/]*$",
    "ravdess": r"-(\d\d)\.\w+$",
    "savee": r"/([A-Z]{2})_[^/]*$",
    "shemo": r"/([FM]\d\d)[^/]*$",
    "subesco": r"/([FM]_\d\d)_[^/]*$",
    "tess": r"/([OY]AF)_[^/]*$",
    "turevdb": r"/(\d{4})_[^/]*$",
    "urdu": r"/(S[FM]\d+)_[^/]*$",
}
"""Regular expressions that match the speaker in a recording's path, by corpus.

The concatenated capture groups of a match identify the speaker. Utterances with the same first
capture group are drawn for validation together. In IEMOCAP, this group is the session, because the
two speakers in a session talk to each other.
"""

DIALOGUES: Mapping[str, str] = {
    "iemocap": r"(?P<dialogue>Ses\w+)_(?P<turn>[FM])(?P<order>\d+)",
    "m3ed": r"(?P<dialogue>[a-z]\w*)_(?P<order>\d+)",
    "meld": r"(?P<dialogue>dia\d+)_utt(?P<order>\d+)-\w+",
}
"""Regular expressions for utterance keys without the prefix `CORPUS-`, by conversational corpus."""

_PARTITION = re.compile(r"(?P<name>\w+?)_(?P<part>[a-z]+\d?)_fold_?(?P<fold>\d+)\.jsonl?")
_FOLD = re.compile(r"fold_?\d+")
_LABEL_MAPS = ("label_map.json", "label_dict.json")
_PARTS = {"train": "train", "validation": "valid", "test": "test"}

# Maps class names in older versions of EmoBox's label maps to names in the current version.
_RENAMED = {
    "Anger": "Angry",
    "Angray": "Angry",
    "Disgusted": "Disgust",
    "Joy": "Happy",
    "Sadness": "Sad",
    "Superise": "Surprise",
    "Superised": "Surprise",
    "Surprised": "Surprise",
}
# Labels of utterances whose annotators disagreed or chose none of the classes.
_NO_EMOTION = ("No-agreement", "Other", "UnKnown", "Unknown")

_NUM_DRAWS = 256  # number of random draws; only the best draw is used
_MIN_GROUPS = 3  # With only two speakers, validation would take half of the training utterances.


@dataclasses.dataclass(frozen=True)
class _Item:
    """Utterance in the metadata."""

    key: str
    wav: str
    start: float | None
    end: float | None
    seconds: float | None
    label: str | None
    speaker: str | None
    group: str | None
    """Utterances with the same group are drawn for validation together."""
    dialogue: str
    order: tuple[int, str]


def read_emobox(
    source: str | pathlib.Path,
    *,
    audio_root: str | pathlib.Path | None = None,
    fold: int | None = None,
    seed: int = 0,
    label_map: Mapping[str, str] | None = None,
) -> Corpus:
    """Reads a fold of an EmoBox corpus, or one of EmoBox's cross-corpus test sets.

    Args:
        source: Folder of the corpus, such as `EmoBox/data/urdu`, or a single metadata file, such as
            a cross-corpus test set in `EmoBox/data/track2`. The utterances in a single file become
            the test split.
        audio_root: Folder of the recordings; by default `EmoBox/downloads`. The folder's layout and
            the file extensions may differ from the metadata; see `find_recordings`.
        fold: Number of the fold; by default, the first fold.
        seed: Seed for drawing the validation utterances.
        label_map: Map from EmoBox's class names to new names. If the new name is empty, the
            utterances of the class become unlabeled.

    Raises:
        InputError: A file is missing or invalid, the fold does not exist, a label is not in
            EmoBox's label map, or `label_map` contains an unknown class.
    """
    path = pathlib.Path(source).expanduser()
    notes: list[str] = []
    if path.is_file():
        name = path.parent.name if _PARTITION.fullmatch(path.name) else path.stem.lower()
        if _FOLD.fullmatch(name):
            name = path.parents[1].name
        partition, files, metadata = "", {"test": path}, {"emobox": name}
        base = path.parent if _FOLD.fullmatch(path.parent.name) is None else path.parents[1]
    else:
        base = existing_directory(path, needed=LAYOUT)
        name = base.resolve().name
        folds = _find_folds(base)
        number = min(folds) if fold is None else fold
        if number not in folds:
            allowed = ", ".join(map(str, sorted(folds)))
            raise InputError(f"--fold={number}: {base} has no such fold; allowed: {allowed}")
        files = _choose_files(base, folds[number])
        partition, metadata = f" fold {number}", {"emobox": name, "fold": str(number)}
        notes.append(f"fold {number} of {len(folds)} of EmoBox's {name}")
        other_tests = sorted(set(folds[number]) - {*_PARTS.values(), "test1"})
        if other_tests:
            notes.append(f"other parts are not used: {', '.join(other_tests)}")
    if fold is not None and not partition:
        raise InputError(f"--fold={fold}: {path} is a file; allowed: the folder of a corpus")
    reader = _MetadataReader(name, base, label_map or {})
    items = {split: reader.read(file) for split, file in files.items()}
    notes += reader.notes()
    _check_disjoint(files, items)
    if "validation" not in items and "train" in items:
        items["train"], items["validation"], note = _draw_validation(items["train"], seed)
        notes.append(note)
    # The metadata's paths begin with `downloads`.
    root = base.resolve().parents[1]
    folder = existing_directory(
        root / "downloads" if audio_root is None else audio_root,
        needed="the folder of the recordings; --audio_root=DIR sets it",
    )
    root = root if audio_root is None else folder
    wavs = dict.fromkeys(item.wav for split_items in items.values() for item in split_items)
    recordings = find_recordings(folder, wavs)
    changed = [wav for wav, file in recordings.items() if file.suffix != pathlib.Path(wav).suffix]
    if changed:
        notes.append(
            f"{len(changed)} recordings have another extension than in the metadata, for example "
            f"{recordings[changed[0]].name} for {pathlib.Path(changed[0]).name}"
        )
    times: dict[str, tuple[float, float]] = {}
    if name == "iemocap":
        times = _iemocap_times(recordings)
        notes.append(
            "EmoBox omits turns that have none of the classes; --corpus=iemocap reads all turns"
            if len(times) == len(wavs)
            else "WARNING: the turns of a dialogue are sorted by their numbers, which is not the "
            "spoken order, because dialog/EmoEvaluation is not beside the recordings"
        )
        times = times if len(times) == len(wavs) else {}
    splits = {
        split: _dialogues(split, items.get(split, ()), root, recordings, times, metadata)
        for split in ("train", "validation", "test")
    }
    notes += _speaker_notes(items)
    labels = {item.label for split_items in items.values() for item in split_items}
    class_names = sorted(label for label in labels if label is not None)
    if not class_names:
        raise InputError(f"{path}: no utterance has an emotion; needed: labels")
    return Corpus(f"emobox/{name}{partition}", tuple(class_names), splits, notes=tuple(notes))


def dataset_name(source: str | pathlib.Path, fold: int | None) -> str:
    """Returns the default dataset name for a fold or a metadata file."""
    path = pathlib.Path(source).expanduser()
    if path.is_file():
        return path.stem.lower()
    name = path.resolve().name.lower()
    if not path.is_dir():
        return name
    return f"{name}_fold_{min(_find_folds(path)) if fold is None else fold}"


def _find_folds(root: pathlib.Path) -> dict[int, dict[str, list[pathlib.Path]]]:
    """Returns the files of each fold by part, such as "train"."""
    folds: dict[int, dict[str, list[pathlib.Path]]] = {}
    paths = [path for path in root.glob("*/*") if _FOLD.fullmatch(path.parent.name)]
    for path in sorted([*root.glob("*.json*"), *paths]):
        match = _PARTITION.fullmatch(path.name)
        if match is not None and path.is_file():
            parts = folds.setdefault(int(match["fold"]), {})
            parts.setdefault(match["part"], []).append(path)
    if folds:
        return folds
    corpora = sorted(path.parent.name for path in root.glob("*/fold*") if path.is_dir())
    if corpora:
        names = ", ".join(dict.fromkeys(corpora))
        raise InputError(f"{root}: contains several corpora; needed: one of its folders {names}")
    files = sorted(path.name for path in root.glob("*.jsonl") if not path.name.startswith("."))
    if files:
        raise InputError(f"{root}: no folds; needed: {LAYOUT}, or one file: {', '.join(files)}")
    raise InputError(f"{root}: no folds; needed: {LAYOUT}")


def _choose_files(
    root: pathlib.Path, parts: Mapping[str, Sequence[pathlib.Path]]
) -> dict[str, pathlib.Path]:
    """Returns one file per split. All files of a split must contain the same utterances."""
    files = {}
    for split, part in _PARTS.items():
        candidates = sorted(parts.get(part, ()), key=_preference)
        if not candidates:
            if part == "valid":
                continue
            raise InputError(f"{root}: no {part} set of this fold; needed: {LAYOUT}")
        files[split] = candidates[0]
        keys = {key for _, key, _ in _read_entries(candidates[0])}
        for other in candidates[1:]:
            if {key for _, key, _ in _read_entries(other)} != keys:
                raise InputError(
                    f"{candidates[0]} and {other}: different utterances; needed: only one of the "
                    "two files"
                )
    return files


def _preference(path: pathlib.Path) -> tuple[bool, bool, str]:
    """Returns a sort key that prefers the current file names (`fold_1`), then .jsonl files."""
    return re.search(r"fold_\d", path.name) is None, path.suffix != ".jsonl", str(path)


def _read_entries(path: pathlib.Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Returns the location, key and fields of each utterance in a metadata file."""
    text, _ = read_any_text(path)
    needed = "needed: EmoBox's metadata, one object per utterance"
    entries: list[tuple[str, Any]]
    try:
        if path.suffix == ".jsonl":
            entries = []
            for number, line in enumerate(text.split("\n"), start=1):
                location = f"{path}: line {number}"
                if line.strip():
                    entries.append((location, json.loads(line)))
        else:
            location = str(path)
            values = json.loads(text)
            if isinstance(values, dict):
                values = [
                    {"key": key, **value} if isinstance(value, dict) else value
                    for key, value in values.items()
                ]
            if not isinstance(values, list):
                values = [values]
            entries = [(f"{path}: utterance {i}", value) for i, value in enumerate(values, 1)]
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise InputError(f"{location}: not JSON ({reason}); {needed}") from error
    invalid = next((place for place, value in entries if not isinstance(value, dict)), None)
    if invalid is not None:
        raise InputError(f"{invalid}: not an object; {needed}")
    if not entries:
        raise InputError(f"{path}: no utterances; {needed}")
    return [
        (place, str(value.get("key") or value.get("wav_filename")), value)
        for place, value in entries
    ]


class _MetadataReader:
    """Reads metadata files of one corpus, and counts the labels that are changed.

    Args:
        name: Name of the corpus in EmoBox.
        folder: Folder of the corpus, which contains the label map.
        class_map: Map from EmoBox's class names to the user's class names.
    """

    def __init__(self, name: str, folder: pathlib.Path, class_map: Mapping[str, str]) -> None:
        self.name = name
        self.class_map = class_map
        self.labels, self.label_file = _read_label_map(folder)
        self.classes: set[str] = set()
        self.respelled: collections.Counter[tuple[str, str]] = collections.Counter()
        self.without_emotion: collections.Counter[str] = collections.Counter()
        self.cp1252: list[pathlib.Path] = []

    def read(self, path: pathlib.Path) -> list[_Item]:
        """Returns the utterances in a file."""
        if not read_any_text(path)[1]:
            self.cp1252.append(path)
        items: dict[str, _Item] = {}
        for location, _, values in _read_entries(path):
            fields = Fields(location, values)
            wav = _first_line(fields, "wav", "audio", "wav_filename")
            key = fields.line("key") or wav
            if key in items:
                fields.fail("key", f"{key!r} is repeated; needed: unique keys")
            start, end = fields.interval("start_time", "end_time")
            seconds = fields.number("length", minimum=0)
            label = self._label(fields)
            match = re.search(SPEAKERS.get(self.name, "(?!)"), f"/{wav}")
            speaker = fields.line("speaker") or fields.line("spk")
            group = speaker
            if speaker is None and match is not None:
                speaker, group = "".join(match.groups()), match[1]
            dialogue, order = self._dialogue(key)
            items[key] = _Item(
                key, wav, start, end, seconds, label, speaker, group, dialogue, order
            )
        return list(items.values())

    def notes(self) -> list[str]:
        """Returns notes for the user on the files that were read.

        Raises:
            InputError: `class_map` contains a class that no utterance has.
        """
        notes = [f"{path}: read as cp1252, because it is not UTF-8" for path in self.cp1252]
        notes += [
            f"label {label!r} read as {name!r}, {count} utterances"
            for (label, name), count in self.respelled.items()
        ]
        notes += [
            f"{count} utterances labeled {name} are unlabeled, because {name} is not an emotion"
            for name, count in self.without_emotion.items()
        ]
        unknown = [name for name in self.class_map if name not in self.classes]
        if unknown:
            raise InputError(
                f"--map_labels: {unknown[0]!r} is not a class; allowed: "
                f"{', '.join(sorted(self.classes))}"
            )
        return notes

    def _label(self, fields: Fields) -> str | None:
        """Returns the class of an utterance, or None if the utterance is unlabeled."""
        label = _first_line(fields, "emo", "label")
        if not self.labels:
            name = label[:1].upper() + label[1:]
        elif label in self.labels:
            name = self.labels[label]
        else:
            names = {
                name for other, name in self.labels.items() if other.casefold() == label.casefold()
            }
            if len(names) != 1:
                fields.fail(
                    "emo", f"{label!r}; allowed: {', '.join(self.labels)} ({self.label_file})"
                )
            (name,) = names
            self.respelled[label, name] += 1
        if name in _NO_EMOTION:
            self.without_emotion[name] += 1
            return None
        self.classes.add(name)
        return self.class_map.get(name, name) or None

    def _dialogue(self, key: str) -> tuple[str, tuple[int, str]]:
        """Returns the dialogue of an utterance, and a sort key for its position in the dialogue.

        If the key names no dialogue, the utterance is a dialogue whose name is the key.
        """
        pattern = DIALOGUES.get(self.name)
        if pattern is None:
            return key, (0, key)
        match = re.fullmatch(pattern, key.removeprefix(f"{self.name}-"))
        if match is None:
            return key, (0, key)
        return match["dialogue"], (int(match["order"]), key)


def _first_line(fields: Fields, *names: str) -> str:
    """Returns the first of several fields that is present."""
    for name in names:
        value = fields.line(name)
        if value is not None:
            return value
    fields.fail(names[0], f"missing; needed: one of {', '.join(names)}")


def _read_label_map(folder: pathlib.Path) -> tuple[dict[str, str], pathlib.Path | None]:
    """Returns EmoBox's map from labels to class names in the current spelling, and the map's path.

    If there is no label map, the map is empty and the path is None.
    """
    for path in (folder / name for name in _LABEL_MAPS):
        if not path.is_file():
            continue
        try:
            values = json.loads(read_any_text(path)[0])
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: not JSON; needed: an object that maps labels to class names"
            ) from error
        if not isinstance(values, dict) or not all(
            isinstance(name, str) and name.strip() for name in values.values()
        ):
            raise InputError(
                f"{path}: not an object of strings; needed: a JSON object that maps labels "
                "to class names"
            )
        labels = {}
        for label, name in values.items():
            spelled = name.strip()[:1].upper() + name.strip()[1:]
            labels[label] = _RENAMED.get(spelled, spelled)
        return labels, path
    return {}, None


def _check_disjoint(
    files: Mapping[str, pathlib.Path], items: Mapping[str, Sequence[_Item]]
) -> None:
    """Raises InputError if an utterance is in two parts of a fold."""
    split_of_key: dict[str, str] = {}
    for split, split_items in items.items():
        for item in split_items:
            other = split_of_key.setdefault(item.key, split)
            if other != split:
                raise InputError(
                    f"{item.key}: in both {files[other]} and {files[split]}; needed: in only one"
                )


def _draw_validation(items: Sequence[_Item], seed: int) -> tuple[list[_Item], list[_Item], str]:
    """Returns the training items, the validation items, and a note about the draw."""
    rng = np.random.default_rng(seed)
    groups = sorted({item.group for item in items if item.group is not None})
    if len(groups) >= _MIN_GROUPS and all(item.group is not None for item in items):
        chosen = _draw_groups(items, groups, rng)
        is_chosen = [item.group in chosen for item in items]
        speakers = {item.speaker for item in items if item.group in chosen}
        how = f"all of {len(speakers)} speaker{'s' * (len(speakers) > 1)}"
    else:
        chosen = _draw_dialogues(items, rng)
        is_chosen = [item.dialogue in chosen for item in items]
        how = "a fifth of each class at random" + (
            ", because there are fewer than three speakers, or some are unknown" if groups else ""
        )
    validation = [item for item, is_in in zip(items, is_chosen, strict=True) if is_in]
    train = [item for item, is_in in zip(items, is_chosen, strict=True) if not is_in]
    note = f"validation: {len(validation)} of {len(items)} training utterances, {how}, seed {seed}"
    if not groups:
        note = (
            f"WARNING: {note}; the speakers are unknown, so the same speakers may be in training "
            "and validation"
        )
    return train, validation, note


def _draw_groups(
    items: Sequence[_Item], groups: Sequence[str], rng: np.random.Generator
) -> set[str]:
    """Draws groups that together contain about `VALIDATION_FRACTION` of every class."""
    labels = sorted({str(item.label) for item in items})
    counts = np.zeros((len(groups), len(labels)))
    for item in items:
        counts[groups.index(item.group or ""), labels.index(str(item.label))] += 1
    shares = counts / counts.sum(0)
    best_distance, best = np.inf, np.arange(1)
    for _ in range(_NUM_DRAWS):
        order = rng.permutation(len(groups))
        # Row i contains the shares of the first i + 1 groups together.
        totals = np.cumsum(shares[order], axis=0)[:-1]
        distances = np.abs(totals - VALIDATION_FRACTION).sum(1)
        count = int(np.argmin(distances))
        if distances[count] < best_distance:
            best_distance, best = distances[count], order[: count + 1]
    return {groups[int(index)] for index in best}


def _draw_dialogues(items: Sequence[_Item], rng: np.random.Generator) -> set[str]:
    """Draws a fraction of the dialogues, stratified by the class of the first utterance."""
    first_labels: dict[str, str] = {}
    for item in items:
        first_labels.setdefault(item.dialogue, str(item.label))
    chosen: set[str] = set()
    for label in sorted(set(first_labels.values())):
        dialogues = [dialogue for dialogue, other in first_labels.items() if other == label]
        order = rng.permutation(len(dialogues))[: round(VALIDATION_FRACTION * len(dialogues))]
        chosen |= {dialogues[int(index)] for index in order}
    return chosen


def _dialogues(
    split: str,
    items: Iterable[_Item],
    root: pathlib.Path,
    recordings: Mapping[str, pathlib.Path],
    times: Mapping[str, tuple[float, float]],
    metadata: Mapping[str, str],
) -> list[Dialogue]:
    """Returns the dialogues of a split, with the utterances in order.

    Args:
        split: Name of the split.
        items: Utterances of the split.
        root: Folder to which the paths of missing recordings are relative.
        recordings: Map from paths in the metadata to existing files.
        times: Map from each utterance's path to its start and end in seconds; empty if unknown.
        metadata: Metadata to store with every utterance.
    """
    turns: dict[str, list[_Item]] = {}
    for item in items:
        turns.setdefault(item.dialogue, []).append(item)
    dialogues = []
    for name, dialogue_items in turns.items():
        single = len(dialogue_items) == 1
        utterances = []
        for item in sorted(dialogue_items, key=lambda item: (times.get(item.wav, ()), item.order)):
            start, end = times.get(item.wav, (None, None))
            if single and item.seconds:
                start, end = 0.0, item.seconds
            source = str(recordings.get(item.wav, root / item.wav))
            utterances.append(
                Utterance(
                    id=item.key,
                    recording=DecodeRequest(source, item.start, item.end),
                    label=item.label,
                    start=start,
                    end=end,
                    metadata={**({"speaker": item.speaker} if item.speaker else {}), **metadata},
                )
            )
        # MELD numbers the dialogues of each split from 0, so dialogue ids must contain the split.
        is_key = single and name == dialogue_items[0].key
        dialogues.append(Dialogue(name if is_key else f"{split}_{name}", tuple(utterances)))
    return dialogues


def _iemocap_times(recordings: Mapping[str, pathlib.Path]) -> dict[str, tuple[float, float]]:
    """Returns the start and end of each IEMOCAP turn whose dialogue has an annotation file."""
    turns: dict[pathlib.Path, dict[str, tuple[float, float]]] = {}
    times = {}
    for wav, recording in recordings.items():
        dialogue = recording.parent
        if dialogue not in turns:
            # In a session, the folders are sentences/wav/DIALOGUE and dialog/EmoEvaluation.
            session = dialogue.parent.parent.parent
            path = session / "dialog" / "EmoEvaluation" / f"{dialogue.name}.txt"
            read = read_turns(path) if path.is_file() else ()
            turns[dialogue] = {turn.id: (turn.start, turn.end) for turn in read}
        if recording.stem in turns[dialogue]:
            times[wav] = turns[dialogue][recording.stem]
    return times


def _speaker_notes(items: Mapping[str, Sequence[_Item]]) -> list[str]:
    """Returns a note if a speaker is in training and in another split."""
    groups, splits = {}, {}
    for split, split_items in items.items():
        for item in split_items:
            splits[item.key] = split
            if item.speaker is not None:
                groups[item.key] = {item.speaker}
    note = overlap_note(groups, splits, "speaker")
    return [note] if note else []


class Emobox(DialogueBuilder):
    """TFDS builder for corpora with the partitions of EmoBox."""

    DESCRIPTION: ClassVar[str] = "Emotional speech, split as in a fold of EmoBox."
    CITATION: ClassVar[str] = """
    @inproceedings{ma2024emobox,
      title={{EmoBox}: Multilingual Multi-corpus Speech Emotion Recognition Toolkit and Benchmark},
      author={Ma, Ziyang and Chen, Mingjie and Zhang, Hezhao and Zheng, Zhisheng and Chen, Wenxi and
              Li, Xiquan and Ye, Jiaxin and Chen, Xie and Hain, Thomas},
      booktitle={Proceedings of Interspeech},
      year={2024}
    }
    """
    LICENSE: ClassVar[str] = "MIT (metadata); the license of the corpus (recordings)."
    HOMEPAGE: ClassVar[str] = "https://github.com/emo-box/EmoBox"
