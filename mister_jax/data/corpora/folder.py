"""Reads a folder of recordings whose paths contain the emotion, as in many acted corpora.

A pattern describes the paths: `{speaker}_{emotion}_{sentence}.wav` matches `EB0_anger_12.wav`.

- `{emotion}` is required. `{speaker}`, `{dialogue}`, `{utterance}`, `{order}`, `{text}` and
  `{split}` have the same meaning as in a manifest. Other names become metadata.
- `{emotion:1}` matches one character. `{_}` and `*` match text that is ignored. `*` also matches
  empty text.
- `{emotion}/{speaker}_*.wav` reads the emotion from the name of the recording's folder. A pattern
  describes only the end of a path, so the path may begin with other folders.
- A pattern that ends in `.*` or has no extension matches recordings of all formats.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from mister_jax.data.audio_source import RECORDING_SUFFIXES
from mister_jax.data.corpora.manifest.fields import FIELDS
from mister_jax.data.corpora.manifest.reader import Row, corpus_from_rows
from mister_jax.data.corpora.recording_finder import list_recordings
from mister_jax.data.corpus import Corpus, existing_directory
from mister_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Preset:
    """Path pattern of a corpus.

    Attributes:
        pattern: Pattern of the recordings' paths.
        emotions: Map from codes in the paths to class names; empty if the paths contain the class
            names.
    """

    pattern: str
    emotions: Mapping[str, str] = dataclasses.field(default_factory=dict)


PRESETS: Mapping[str, Preset] = {
    "nemo": Preset("{speaker}_{emotion}_{sentence}.wav"),
    "emodb": Preset(
        "{speaker:2}{sentence:3}{emotion:1}{version:1}.wav",
        {
            "W": "anger",
            "L": "boredom",
            "E": "disgust",
            "A": "fear",
            "F": "happiness",
            "T": "sadness",
            "N": "neutral",
        },
    ),
    "ravdess": Preset(
        "{modality:2}-{channel:2}-{emotion:2}-{intensity:2}-{sentence:2}-{repetition:2}-"
        "{speaker:2}.*",
        {
            "01": "neutral",
            "02": "calm",
            "03": "happy",
            "04": "sad",
            "05": "angry",
            "06": "fearful",
            "07": "disgust",
            "08": "surprised",
        },
    ),
    "cremad": Preset(
        "{speaker:4}_{sentence:3}_{emotion:3}_{intensity}.*",
        {
            "ANG": "anger",
            "DIS": "disgust",
            "FEA": "fear",
            "HAP": "happy",
            "NEU": "neutral",
            "SAD": "sad",
        },
    ),
}
"""Patterns of released corpora: nEMO, EmoDB, RAVDESS and CREMA-D."""

_FIELDS = ("emotion", "speaker", "dialogue", "utterance", "order", "text", "split")
_RESERVED = tuple(name for name in (*FIELDS, "label") if name not in _FIELDS)
_SPLIT_NAMES = {
    "training": "train",
    "trn": "train",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "eval": "test",
    "tst": "test",
}

_TOKEN = re.compile(r"\{(?P<name>[^{}:]*)(?::(?P<width>[^{}]*))?\}|(?P<star>\*)|(?P<brace>[{}])")

# An error is raised if more than 1 in `_UNMATCHED_LIMIT` recordings fail to match the pattern.
_UNMATCHED_LIMIT = 10
_MAX_LISTED = 5  # maximum number of files that a note lists


class PathPattern:
    """Pattern that reads fields from the paths of recordings.

    Args:
        pattern: Pattern as described in the module docstring.

    Raises:
        InputError: The pattern is invalid, or would match every path in several ways.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        suffix = pathlib.PurePosixPath(pattern).suffix
        self._any_suffix = suffix.lower() not in RECORDING_SUFFIXES
        pattern = pattern.removesuffix(".*")
        self.num_components = pattern.count("/") + 1
        self.names: list[str] = []
        # A path is matched twice, with the shortest and with the longest possible fields. If the
        # two matches give different fields, the pattern is ambiguous.
        shortest, longest = "", ""
        position, after_open_field = 0, False
        for token in _TOKEN.finditer(pattern):
            literal = pattern[position : token.start()]
            after_open_field = after_open_field and not literal
            position = token.end()
            if token["brace"]:
                self._fail(f"{token['brace']!r} without its pair", "names in braces")
            width = self._width(token)
            if width is None and after_open_field:
                self._fail(
                    f"ambiguous at {token[0]!r}, which follows a field of any length",
                    "a character between the two fields, or a length such as {emotion:1}",
                )
            after_open_field = width is None
            group = "(?:" if token["star"] else self._group(token["name"])
            text = re.escape(literal) + group + "[^/]"
            times = "*" if token["star"] else "+"
            shortest += text + (f"{times}?)" if width is None else f"{{{width}}})")
            longest += text + (f"{times})" if width is None else f"{{{width}}})")
        if "emotion" not in self.names:
            self._fail("no {emotion}", "{emotion}, as in {speaker}_{emotion}_{sentence}.wav")
        end = re.escape(pattern[position:])
        self._shortest, self._longest = re.compile(shortest + end), re.compile(longest + end)

    def fields(self, path: pathlib.PurePosixPath) -> dict[str, str] | None:
        """Returns the fields of a path, or None if the path does not match the pattern.

        Raises:
            InputError: The path matches the pattern in several ways.
        """
        stem = path.with_suffix("") if self._any_suffix else path
        end = "/".join(stem.parts[-self.num_components :])
        shortest = self._shortest.fullmatch(end)
        longest = self._longest.fullmatch(end)
        if shortest is None or longest is None:
            return None
        if shortest.groupdict() != longest.groupdict():
            readings = " or ".join(
                ", ".join(f"{name}={value}" for name, value in match.groupdict().items())
                for match in (shortest, longest)
            )
            raise InputError(
                f"{path}: --pattern={self.pattern} is ambiguous ({readings}); needed: lengths such "
                "as {emotion:3}, or other characters between the fields"
            )
        return shortest.groupdict()

    def _group(self, name: str) -> str:
        """Returns the opening of the regular expression group that matches a field."""
        if name == "_":
            return "(?:"
        if not name.isidentifier():
            self._fail(f"field {name!r}", "names of letters, digits and _")
        if name in _RESERVED:
            self._fail(f"field {name!r}", f"{', '.join(_FIELDS)}, or a new name")
        if name in self.names:
            self._fail(f"field {name!r} is repeated", "each name once")
        self.names.append(name)
        return f"(?P<{name}>"

    def _width(self, token: re.Match[str]) -> int | None:
        width = token["width"]
        if width is None:
            return None
        if not re.fullmatch("[1-9][0-9]{0,2}", width):
            self._fail(f"length {width!r}", "a number of characters, such as {emotion:1}")
        return int(width)

    def _fail(self, problem: str, needed: str) -> None:
        raise InputError(f"--pattern={self.pattern}: {problem}; needed: {needed}")


def read_folder(
    source: str | pathlib.Path,
    pattern: str,
    *,
    label_map: Mapping[str, str] | None = None,
    **manifest_options: Any,
) -> Corpus:
    """Reads the recordings of a folder and its subfolders.

    Each recording is a dialogue of one utterance, unless the pattern contains `{dialogue}`.
    Recordings that do not match the pattern are left out and listed in the notes.

    Args:
        source: Folder of the recordings.
        pattern: Pattern of the recordings' paths, or the name of a preset in `PRESETS`.
        label_map: Map from emotions in the paths, or from a preset's class names, to new class
            names.
        **manifest_options: Other options of `corpus_from_rows`, such as `labels` and `group_by`.

    Raises:
        InputError: The pattern is invalid or ambiguous, more than one in ten recordings do not
            match the pattern, or a field is invalid.
    """
    preset = PRESETS.get(pattern) or Preset(pattern)
    if preset.pattern == pattern and "{" not in pattern:
        raise InputError(
            f"--pattern={pattern}; allowed: {', '.join(PRESETS)}, or a pattern with {{emotion}}, "
            "such as {speaker}_{emotion}_{sentence}.wav"
        )
    reader = PathPattern(preset.pattern)
    folder = existing_directory(source, needed="a folder of recordings")
    paths = [
        pathlib.PurePosixPath(path.relative_to(folder).as_posix())
        for path in list_recordings(folder)
    ]
    if not paths:
        raise InputError(f"{folder}: no recordings; needed: files such as EB0_anger_12.wav")
    paths.sort(key=_natural_key)
    rows: list[Row] = []
    unmatched = []
    for path in paths:
        fields = reader.fields(path)
        if fields is None:
            # A name that is not UTF-8 cannot be printed.
            unmatched.append(str(path).encode(errors="backslashreplace").decode())
        else:
            rows.append(_row(folder, path, fields, preset, number=len(rows) + 1))
    if _UNMATCHED_LIMIT * len(unmatched) > len(paths):
        raise InputError(
            f"{folder}: {len(unmatched)} of {len(paths)} recordings do not match "
            f"--pattern={preset.pattern}, for example {unmatched[0]}; allowed: one in ten"
        )
    notes = []
    if unmatched:
        more = ", ..." if len(unmatched) > _MAX_LISTED else ""
        notes.append(
            f"{len(unmatched)} recordings do not match the pattern and are left out: "
            f"{', '.join(unmatched[:_MAX_LISTED])}{more}"
        )
    copies = collections.Counter(
        (path.name, (folder / path).stat().st_size) for path in paths
    ).values()
    if num_copies := sum(count - 1 for count in copies):
        notes.append(
            f"WARNING: {num_copies} recordings have the name and size of another recording; an "
            "archive may contain all recordings twice"
        )
    if label_map:
        emotions = {row.line("label") or "" for row in rows}
        unused = sorted(set(label_map) - emotions)
        if unused:
            raise InputError(
                f"--map_labels: no recording has the emotion {', '.join(unused)}; the file names "
                f"have {', '.join(sorted(emotions))}"
            )
    corpus = corpus_from_rows(rows, folder, label_map=label_map, **manifest_options)
    return dataclasses.replace(corpus, notes=(*notes, *corpus.notes))


def _row(
    folder: pathlib.Path,
    path: pathlib.PurePosixPath,
    fields: dict[str, str],
    preset: Preset,
    number: int,
) -> Row:
    """Returns a recording as a row of a manifest."""
    row_fields: dict[str, Any] = {
        "dialogue": str(path.with_suffix("")),
        "utterance": path.stem,
        "order": number,
        "audio": str(path),
        **fields,
    }
    row = Row(f"{folder}: {path}", folder, row_fields)
    emotion = row_fields.pop("emotion")
    if preset.emotions and emotion not in preset.emotions:
        row.fail("emotion", f"{emotion!r}; allowed: {', '.join(preset.emotions)}")
    row_fields["label"] = preset.emotions.get(emotion, emotion)
    if "split" in fields:
        split = fields["split"].lower()
        row_fields["split"] = _SPLIT_NAMES.get(split, split)
    if "text" in fields:
        row_fields["text"] = fields["text"].replace("_", " ")
    return row


def _natural_key(path: pathlib.PurePosixPath) -> list[tuple[bool, int, str]]:
    """Returns a key that sorts `turn_2.wav` before `turn_10.wav`."""
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
