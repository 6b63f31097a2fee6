"""Reads a manifest: a JSON Lines or CSV file with one utterance a row.

    {"dialogue": "call 7", "utterance": 1, "order": 1, "audio": "call7/1.wav", "text": "Hello?"}
    {"dialogue": "call 7", "utterance": 2, "order": 2, "text": "You again!", "label": "anger"}

Fields; what is left out, null or empty is absent:

- `dialogue`, `utterance`: ids, text or whole numbers. Utterance ids differ within a dialogue.
- `order`: a number; utterances of a dialogue are read in its order. Or
- `start`, `end`: seconds from the beginning of the dialogue; `start` orders where there is no
  `order`.
- `audio`: a sound or video file, relative to the manifest's folder; `audio_start`, `audio_end`:
  seconds into that file where the utterance begins and ends.
- `text`: the transcript. A row needs `audio` or `text`.
- `label`: an emotion; rows without are context. `score`: a sentiment from -3 to 3.
- `split`: `train`, `validation` or `test`, the same for a whole dialogue. Where no row has one, the
  dialogues are shared out at random.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from mister_jax.data.corpus import Corpus, Dialogue, Recording, Utterance, read_text
from mister_jax.data.schema import SPLITS
from mister_jax.errors import InputError

FIELDS = (
    "dialogue",
    "utterance",
    "order",
    "start",
    "end",
    "audio",
    "audio_start",
    "audio_end",
    "text",
    "label",
    "score",
    "split",
)
FORMATS = (".jsonl", ".csv")

# Numbers are stored as float32, in which larger ones are infinite.
_LARGEST = float(np.finfo(np.float32).max)

SHARES = (0.8, 0.1, 0.1)
"""Shares of the dialogues in training, validation and test, where the manifest names no splits."""


def read(
    source: str | pathlib.Path,
    *,
    labels: Sequence[str] = (),
    seed: int = 0,
    shares: Sequence[float] = SHARES,
) -> Corpus:
    """Reads and checks a manifest.

    Args:
        source: the file, `.jsonl` or `.csv`, UTF-8.
        labels: class names in their order; the sorted names in the file when left out.
        seed: of the random split.
        shares: of the random split.

    Returns:
        The corpus. An utterance's id is `DIALOGUE/UTTERANCE`; dialogues keep the order in which
        they first appear.

    Raises:
        InputError: the file or a row cannot be used; the message names file, row and field.
    """
    path = pathlib.Path(source).expanduser()
    if not path.is_file():
        lack = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {lack}; needed: a manifest, {' or '.join(FORMATS)}")
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: {path.suffix or 'no suffix'}; allowed: {', '.join(FORMATS)}")
    for name in labels:
        if not name or [name.strip()] != name.splitlines() or labels.count(name) > 1:
            raise InputError(f"labels: {name!r}; allowed: different names of one line each")
    rows = list(_jsonl(path) if path.suffix == ".jsonl" else _csv(path))
    if not rows:
        raise InputError(f"{path}: no rows; at least one utterance is needed")
    utterances = [row.utterance() for row in rows]
    given = sorted({utterance.label for utterance in utterances if utterance.label is not None})
    for row, utterance in zip(rows, utterances, strict=True):
        if labels and utterance.label is not None and utterance.label not in labels:
            row.fail("label", f"{utterance.label!r}; allowed: {', '.join(labels)}")
    dialogues, splits = _dialogues(rows, utterances)
    assigned = splits or _random_splits(list(dialogues), seed, shares)
    scored = any(utterance.score is not None for utterance in utterances)
    return Corpus(
        path.stem,
        tuple(labels or given),
        {
            split: tuple(
                dialogue for name, dialogue in dialogues.items() if assigned[name] == split
            )
            for split in SPLITS
        },
        scored=scored,
        notes=() if splits else (f"dialogues shared out at random, seed {seed}",),
    )


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row's fields, absent ones left out, and the checks that name file, row and field."""

    path: pathlib.Path
    line: int
    fields: dict[str, Any]

    def fail(self, field: str, message: str) -> NoReturn:
        # Values from the file may hold line breaks.
        line = " ".join(f"row at line {self.line}: {field}: {message}".split())
        raise InputError(f"{self.path}: {line}")

    def text(self, field: str) -> str | None:
        """Text; None where absent."""
        value = self.fields.get(field)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fail(field, f"{value!r}; allowed: text")
        if "\0" in value or not _encodes(value):
            self.fail(field, f"{value!r}; allowed: text without null or broken characters")
        return value.strip() or None

    def line_of_text(self, field: str) -> str | None:
        value = self.text(field)
        if value is not None and len(value.splitlines()) != 1:
            self.fail(field, f"{value!r}; allowed: one line")
        return value

    def id(self, field: str) -> str:
        value = self.fields.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        name = self.line_of_text(field)
        if name is None:
            self.fail(field, "missing; needed: an id, text or a whole number")
        return name

    def number(
        self, field: str, *, least: float = -_LARGEST, most: float = _LARGEST
    ) -> float | None:
        """A number in a range; None where absent."""
        value = self.fields.get(field)
        if value is None:
            return None
        if isinstance(value, str):
            if not value.strip():
                return None
            try:
                value = float(value)
            except ValueError:
                self.fail(field, f"{value!r}; allowed: a number")
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(field, f"{value!r}; allowed: a number")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not least <= value <= most:  # Nor NaN.
            self.fail(field, f"{value!r}; allowed: a finite number, {least:g} to {most:g}")
        return value

    def interval(self, first: str, last: str) -> tuple[float | None, float | None]:
        start, end = self.number(first, least=0), self.number(last, least=0)
        if end is not None and end <= (start or 0):
            self.fail(last, f"{end:g}; allowed: more than {first}")
        return start, end

    def utterance(self) -> Utterance:
        for field in self.fields:
            if field not in FIELDS:
                self.fail(repr(field), f"unknown; allowed: {', '.join(FIELDS)}")
        dialogue, name = self.id("dialogue"), self.id("utterance")
        text, audio = self.text("text"), self.line_of_text("audio")
        if text is None and audio is None:
            self.fail("audio", "missing, and text too; a row needs one of them")
        audio_start, audio_end = self.interval("audio_start", "audio_end")
        if audio is None and (audio_start is not None or audio_end is not None):
            self.fail("audio", "missing; audio_start and audio_end are places in it")
        start, end = self.interval("start", "end")
        recording = None
        if audio is not None:
            recording = Recording(str(self.path.parent / audio), audio_start, audio_end)
        return Utterance(
            id=f"{dialogue}/{name}",
            text=text or "",
            recording=recording,
            label=self.line_of_text("label"),
            score=self.number("score", least=-3, most=3),
            start=start,
            end=end,
        )

    def place(self) -> float:
        """What orders the row in its dialogue."""
        order = self.number("order")
        if order is None:
            order = self.number("start")
        if order is None:
            self.fail("order", "missing, and start too; one of them orders the dialogue")
        return order

    def split(self) -> str | None:
        split = self.line_of_text("split")
        if split is not None and split not in SPLITS:
            self.fail("split", f"{split!r}; allowed: {', '.join(SPLITS)}")
        return split


def _dialogues(
    rows: Sequence[_Row], utterances: Sequence[Utterance]
) -> tuple[dict[str, Dialogue], dict[str, str]]:
    """Dialogues by id, and their splits if the rows name any."""
    turns: dict[str, dict[float, Utterance]] = {}
    splits: dict[str, str | None] = {}
    by_order: dict[str, bool] = {}
    first = rows[0]
    seen: dict[str, int] = {}
    for row, utterance in zip(rows, utterances, strict=True):
        if utterance.id in seen:
            row.fail("utterance", f"repeats the row at line {seen[utterance.id]}; ids differ")
        seen[utterance.id] = row.line
        dialogue, place, split = row.id("dialogue"), row.place(), row.split()
        has_order = row.number("order") is not None
        if by_order.setdefault(dialogue, has_order) != has_order:
            row.fail("order", "in some rows of the dialogue; allowed: in all or none")
        if place in turns.setdefault(dialogue, {}):
            field = "order" if has_order else "start"
            row.fail(field, f"{place:g} repeated in its dialogue; places differ")
        turns[dialogue][place] = utterance
        if (split is None) != (first.split() is None):
            row.fail("split", "in some rows; allowed: in all or none")
        if splits.setdefault(dialogue, split) != split:
            row.fail("split", f"{split!r}, {splits[dialogue]!r} before; a dialogue has one")
    dialogues = {
        name: Dialogue(name, tuple(places[place] for place in sorted(places)))
        for name, places in turns.items()
    }
    return dialogues, {name: split for name, split in splits.items() if split is not None}


def _random_splits(names: list[str], seed: int, shares: Sequence[float]) -> dict[str, str]:
    """A split for each dialogue: every split with a share gets one, if there are enough."""
    if len(shares) != len(SPLITS) or min(shares) < 0 or sum(shares) <= 0:
        raise InputError(f"split shares {tuple(shares)}; allowed: three, at least 0, not all 0")
    wanted = np.asarray(shares, float) / sum(shares) * len(names)
    counts = np.floor(wanted).astype(int)
    for index in np.argsort(counts - wanted, kind="stable")[: len(names) - counts.sum()]:
        counts[index] += 1
    for index in np.flatnonzero((counts == 0) & (wanted > 0)):
        if counts.max() > 1:
            counts[counts.argmax()] -= 1
            counts[index] += 1
    order = np.random.default_rng(seed).permutation(len(names))
    assigned = np.repeat(SPLITS, counts)
    return {names[index]: str(split) for index, split in zip(order, assigned, strict=True)}


def _jsonl(path: pathlib.Path) -> Iterator[_Row]:
    # Not splitlines: JSON text may hold the other line separators of Unicode.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}: row at line {number}"
        try:
            pairs = json.loads(line, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", type(error).__name__)
            raise InputError(f"{place}: not JSON ({reason}); needed: one object a line") from error
        if not isinstance(pairs, _Pairs):
            raise InputError(f"{place}: not an object; needed: one object a line")
        fields: dict[str, Any] = {}
        for field, value in pairs:
            if field in fields:
                _Row(path, number, {}).fail(repr(field), "repeated; fields differ")
            fields[field] = value
        yield _Row(path, number, {key: value for key, value in fields.items() if value is not None})


class _Pairs(list):
    """The fields of a JSON object, repeated ones too."""


def _csv(path: pathlib.Path) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        first = _Row(path, 1, {})
        if not header:
            raise InputError(f"{path}: empty; needed: a header and at least one row")
        for name in header:
            if name not in FIELDS:
                first.fail(repr(name), f"unknown column; allowed: {', '.join(FIELDS)}")
            if header.count(name) > 1:
                first.fail(name, "repeated column; columns differ")
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise InputError(
                    f"{path}: row at line {reader.line_num}: {len(values)} fields; "
                    f"needed: {len(header)}, one for each column"
                )
            fields = {name: value for name, value in zip(header, values, strict=True) if value}
            yield _Row(path, reader.line_num, fields)
    except csv.Error as error:
        raise InputError(f"{path}: row at line {reader.line_num}: not CSV ({error})") from error


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
