"""Reads a manifest: a JSON Lines or CSV file with one utterance per row.

    {"dialogue": "call 7", "utterance": 1, "order": 1, "audio": "call7/1.wav", "text": "Hello?"}
    {"dialogue": "call 7", "utterance": 2, "order": 2, "text": "You again!", "label": "anger"}

A row has these fields. A field that is missing, null or empty counts as absent.

- `dialogue`, `utterance`: Ids, which are text or whole numbers. Within a dialogue, each utterance
  id must be unique.
- `order`: A number that orders the utterances in a dialogue.
- `start`, `end`: Seconds from the beginning of the dialogue. Without `order`, `start` orders the
  utterances.
- `audio`: Path of an audio or video file, relative to the manifest's folder. White space around the
  path is ignored, unless it is part of an existing file's name.
- `audio_start`, `audio_end`: Start and end of the utterance in seconds from the beginning of
  `audio`. Without these fields, the utterance is the whole recording, or the segment from `start`
  to `end` if several rows have the same recording.
- `audio_channel`: `mix` (default), `left`, `right`, or a channel index, counted from 0.
- `text`: The transcript. A row needs `audio` or `text`.
- `label`: The emotion. Rows without a label serve as context for other rows.
- `score`: The sentiment, from -3 to 3.
- `ratings`: Number of raters who chose each emotion, as a JSON object such as
  `{"happy": 2, "sad": 1}`. If `label` is absent, the label is the emotion that more than half of
  the raters chose, if any.
- `split`: `train`, `validation` or `test`, equal for all rows in a dialogue. If no row has a split,
  dialogues are split at random.
- `speaker`: The speaker. By default, a random split puts each speaker into one split if possible.
  No model reads this field.

Extra columns, which no model reads, are kept as metadata and copied to the predictions.
"""

import collections
import csv
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mister_jax.data.corpora.manifest.fields import (
    FIELDS,
    Fields,
    Interval,
    audio_intervals,
    check_extra_column,
)
from mister_jax.data.corpus import Corpus, DecodeRequest, Dialogue, Utterance, read_text
from mister_jax.data.labels import MAX_SCORE, MIN_SCORE, map_labels_flag, suspicious_labels
from mister_jax.data.schema import SPLITS
from mister_jax.data.splits import DEFAULT_FRACTIONS, overlap_note, random_splits
from mister_jax.errors import InputError

_FORMATS = (".jsonl", ".csv", ".tsv")

DEFAULT_GROUP = "speaker"
"""Column by which random splits group dialogues by default, if the column is present."""

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_manifest(
    source: str | pathlib.Path,
    *,
    labels: Sequence[str] = (),
    label_map: Mapping[str, str] | None = None,
    check_labels: bool = True,
    group_by: str = "",
    seed: int = 0,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
) -> Corpus:
    """Reads and checks a manifest.

    Args:
        source: Path of a UTF-8 `.jsonl`, `.csv` or `.tsv` file. The separator in a CSV file may be
            a comma, a semicolon, a tab or a vertical bar.
        labels: Ordered class names; by default, the sorted names in the file.
        label_map: Map from names in the file to class names. An empty class name makes a row
            unlabeled. To allow a name that looks like a mistake, map the name to itself.
        check_labels: Whether to reject labels that look like mistakes.
        group_by: Name of a column: `speaker` or an extra column. Random splits put dialogues with
            equal values in this column into one split. The default is `speaker`, if the manifest
            has that column.
        seed: Seed of the random split.
        fractions: Fractions of dialogues for training, validation and test.

    Returns:
        The corpus. Utterance ids are `DIALOGUE/UTTERANCE`; dialogues are in the order of their
        first rows.

    Raises:
        InputError: The file, a row or an option is invalid. For an invalid field, the message names
            the file, the row and the field.
    """
    path = pathlib.Path(source).expanduser()
    if not path.is_file():
        reason = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {reason}; needed: a manifest, {' or '.join(_FORMATS)}")
    if path.suffix not in _FORMATS:
        raise InputError(f"{path}: {path.suffix or 'no suffix'}; allowed: {', '.join(_FORMATS)}")
    rows = list(_jsonl(path) if path.suffix == ".jsonl" else _csv(path))
    if not rows:
        raise InputError(f"{path}: no rows; at least one utterance is needed")
    return corpus_from_rows(
        rows,
        path,
        labels=labels,
        label_map=label_map,
        check_labels=check_labels,
        group_by=group_by,
        seed=seed,
        fractions=fractions,
    )


def corpus_from_rows(
    rows: Sequence["Row"],
    source: pathlib.Path,
    *,
    labels: Sequence[str] = (),
    label_map: Mapping[str, str] | None = None,
    check_labels: bool = True,
    group_by: str = "",
    seed: int = 0,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
) -> Corpus:
    """Makes a corpus from the rows of a manifest; see `read_manifest`.

    Args:
        rows: Rows of the manifest, at least one.
        source: Path of the manifest, or of the folder that the rows describe. The name without its
            extension becomes the name of the corpus.
        labels: Ordered class names.
        label_map: Map from names in the rows to class names.
        check_labels: Whether to reject labels that look like mistakes.
        group_by: Column by which random splits group dialogues.
        seed: Seed of the random split.
        fractions: Fractions of dialogues for training, validation and test.

    Raises:
        InputError: A row or a label is invalid.
    """
    for name in labels:
        if not name or [name.strip()] != name.splitlines() or labels.count(name) > 1:
            raise InputError(f"labels: {name!r}; allowed: unique one-line names")
    intervals = audio_intervals(rows)
    notes = []
    cut = [
        row.audio_path()
        for row, interval in zip(rows, intervals, strict=True)
        if interval != row.audio_interval()
    ]
    if cut:
        notes.append(
            f"start and end select {len(cut)} utterances in {len(set(cut))} recordings, because "
            "several rows have the same recording"
        )
    label_map = label_map or {}
    utterances = [
        row.utterance(interval, label_map) for row, interval in zip(rows, intervals, strict=True)
    ]
    if check_labels:
        _check_labels(rows, utterances, labels, label_map)
    columns = dict.fromkeys(name for turn in utterances for name in turn.metadata)
    if columns:
        notes.append(f"columns kept as metadata, which no model reads: {', '.join(columns)}")
    dialogues, splits = _dialogues(rows, utterances)
    groups = _groups(rows, utterances, group_by)
    if splits:
        note = overlap_note(groups, splits, group_by or DEFAULT_GROUP)
        notes += [note] if note else []
    elif sum(fraction > 0 for fraction in fractions) == 1:
        (index,) = np.flatnonzero(fractions)
        splits = dict.fromkeys(dialogues, SPLITS[index])
    else:
        splits, note = random_splits(
            {
                name: [turn.label for turn in dialogue.utterances]
                for name, dialogue in dialogues.items()
            },
            groups,
            name=group_by or DEFAULT_GROUP,
            source=str(source),
            explicit=bool(group_by),
            seed=seed,
            fractions=fractions,
        )
        notes.append(note)
    names = {turn.label for turn in utterances if turn.label is not None}
    names.update(*(turn.ratings for turn in utterances))
    return Corpus(
        source.stem,
        tuple(labels or sorted(names)),
        {
            split: [dialogue for name, dialogue in dialogues.items() if splits[name] == split]
            for split in SPLITS
        },
        scored=any(utterance.score is not None for utterance in utterances),
        notes=tuple(notes),
    )


class Row(Fields):
    """A row of a manifest.

    Args:
        location: Location of the row, with which every error message starts.
        folder: Folder to which paths of recordings are relative.
        values: Fields by name, without absent fields.
    """

    def __init__(self, location: str, folder: pathlib.Path, values: Mapping[str, Any]) -> None:
        super().__init__(location, values)
        self.folder = folder

    def audio_path(self) -> str | None:
        """Returns the path in `audio`, or None if the field is absent.

        White space around the path is kept if a file with this exact name exists.
        """
        path = self.line("audio")
        exact = self.values.get("audio")
        if path is not None and path != exact and (self.folder / str(exact)).is_file():
            return str(exact)
        return path

    def metadata(self) -> dict[str, str]:
        """Returns the fields that no model reads: extra columns, and the speaker."""
        metadata = {}
        for name, value in self.values.items():
            if name in FIELDS and name != DEFAULT_GROUP:
                continue
            check_extra_column(self, name, self.values)
            if not isinstance(value, str):
                metadata[name] = json.dumps(value)
            elif self.text(name) is not None:
                metadata[name] = value.strip()
        return metadata

    def utterance(self, interval: Interval, label_map: Mapping[str, str]) -> Utterance:
        """Returns the row's utterance, whose audio is the given interval of the recording."""
        name = f"{self.id('dialogue')}/{self.id('utterance')}"
        text, audio = self.text("text"), self.audio_path()
        if text is None and audio is None:
            self.fail("audio", "missing, and text is also missing; needed: at least one of them")
        start, end = self.interval("start", "end")
        ratings: dict[str, float] = {}
        for rated, count in self.ratings("ratings").items():
            mapped = label_map.get(rated, rated)
            if mapped:
                ratings[mapped] = ratings.get(mapped, 0) + count
        label = self.line("label")
        if label is None and ratings:
            most = max(ratings, key=ratings.__getitem__)
            if 2 * ratings[most] > sum(ratings.values()):
                label = most
        recording = None
        if audio is not None:
            recording = DecodeRequest(str(self.folder / audio), *interval, self.channel())
        return Utterance(
            id=name,
            text=text or "",
            recording=recording,
            label=label if label is None else label_map.get(label, label) or None,
            score=self.number("score", minimum=MIN_SCORE, maximum=MAX_SCORE),
            ratings=ratings,
            start=start,
            end=end,
            metadata=self.metadata(),
        )

    def split(self) -> str | None:
        """Returns the split, or None if the field is absent."""
        split = self.line("split")
        if split is not None and split not in SPLITS:
            self.fail("split", f"{split!r}; allowed: {', '.join(SPLITS)}")
        return split


def _check_labels(
    rows: Sequence[Row],
    utterances: Sequence[Utterance],
    labels: Sequence[str],
    label_map: Mapping[str, str],
) -> None:
    """Raises InputError for the first label that is not allowed or looks like a mistake."""
    counts = collections.Counter(turn.label for turn in utterances if turn.label is not None)
    suspicious = {
        name: (problem, fix)
        for name, problem, fix in suspicious_labels(counts)
        if name not in (*labels, *label_map.values())
    }
    flag = map_labels_flag((name, fix) for name, (_, fix) in suspicious.items())
    for row, label in zip(rows, (turn.label for turn in utterances), strict=True):
        if label in suspicious:
            row.fail(
                "label",
                f"{label!r} {suspicious[label][0]} ({counts[label]} rows); fix: {flag}, or map it "
                "to itself if it is a class",
            )
        if labels and label is not None and label not in labels:
            row.fail("label", f"{label!r}; allowed: {', '.join(labels)}")


def _groups(
    rows: Sequence[Row], utterances: Sequence[Utterance], group_by: str
) -> dict[str, set[str]]:
    """Returns each dialogue's values in the column `group_by`, which is `speaker` by default."""
    groups: dict[str, set[str]] = collections.defaultdict(set)
    for row, utterance in zip(rows, utterances, strict=True):
        value = utterance.metadata.get(group_by or DEFAULT_GROUP)
        if value is not None:
            groups[row.id("dialogue")].add(value)
        elif group_by:
            row.fail(group_by, "missing; needed in every row, because dialogues are grouped by it")
    return dict(groups)


def _dialogues(
    rows: Sequence[Row], utterances: Sequence[Utterance]
) -> tuple[dict[str, Dialogue], dict[str, str]]:
    """Returns the dialogues by id, and the split of each dialogue if the rows have splits."""
    turns: dict[str, dict[float, Utterance]] = {}
    splits: dict[str, str | None] = {}
    ordering_field: dict[str, str] = {}
    rows_by_id: dict[str, Row] = {}
    first = rows[0]
    for row, utterance in zip(rows, utterances, strict=True):
        other = rows_by_id.setdefault(utterance.id, row)
        if other is not row:
            message = f"repeats the {other.location.rpartition(': ')[2]}; needed: unique ids"
            row.fail("utterance", message)
        dialogue, split = row.id("dialogue"), row.split()
        field = "start" if row.number("order") is None else "order"
        position = row.number(field)
        if position is None:
            row.fail("order", "missing, and start is also missing; needed: one of them")
        if ordering_field.setdefault(dialogue, field) != field:
            row.fail("order", "given in some rows of the dialogue; allowed: in all rows or none")
        if turns.setdefault(dialogue, {}).setdefault(position, utterance) is not utterance:
            row.fail(field, f"{position:g} repeated in its dialogue; needed: unique numbers")
        if (split is None) != (first.split() is None):
            row.fail("split", "given in some rows; allowed: in all rows or none")
        if splits.setdefault(dialogue, split) != split:
            row.fail(
                "split",
                f"{split!r}, but {splits[dialogue]!r} in another row; allowed: one split per "
                "dialogue",
            )
    dialogues = {
        name: Dialogue(name, tuple(by_position[position] for position in sorted(by_position)))
        for name, by_position in turns.items()
    }
    return dialogues, {name: split for name, split in splits.items() if split}


def _jsonl(path: pathlib.Path) -> Iterator[Row]:
    # `splitlines` would also split at Unicode line separators, which JSON text may contain.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = f"{path}: row at line {number}"
        try:
            pairs = json.loads(line, object_pairs_hook=_JsonPairs)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", type(error).__name__)
            raise InputError(f"{row}: not JSON ({reason}); needed: one object per line") from error
        if not isinstance(pairs, _JsonPairs):
            raise InputError(f"{row}: not an object; needed: one object per line")
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                Fields(row, {}).fail(repr(name), "repeated; needed: unique fields")
            values[name] = _plain(value)
        yield Row(
            row, path.parent, {key: value for key, value in values.items() if value is not None}
        )


class _JsonPairs(list):
    """Key-value pairs of a JSON object, including repeated keys."""


def _plain(value: Any) -> Any:
    """Returns a JSON value with dicts instead of `_JsonPairs`."""
    if isinstance(value, _JsonPairs):
        return {name: _plain(nested) for name, nested in value}
    return [_plain(nested) for nested in value] if isinstance(value, list) else value


def _csv(path: pathlib.Path) -> Iterator[Row]:
    text = read_text(path)
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        # pandas writes its index as a column without a name.
        header = [name.strip() or "unnamed" for name in next(reader, [])]
        if not header:
            raise InputError(f"{path}: empty; needed: a header and at least one row")
        first = Fields(f"{path}: row at line 1", {})
        for name in header:
            if name not in FIELDS:
                check_extra_column(first, name, header)
            if header.count(name) > 1:
                first.fail(name, "repeated column; needed: unique columns")
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise InputError(
                    f"{path}: row at line {reader.line_num}: {len(values)} fields; "
                    f"needed: {len(header)}, one per column (separated by "
                    f"{_DELIMITERS[delimiter]}, as in the header)"
                )
            fields = {name: value for name, value in zip(header, values, strict=True) if value}
            yield Row(f"{path}: row at line {reader.line_num}", path.parent, fields)
    except csv.Error as error:
        raise InputError(f"{path}: row at line {reader.line_num}: not CSV ({error})") from error


def _delimiter(text: str) -> str:
    """Returns the separator that splits the header into the largest number of known fields."""
    line = text.partition("\n")[0]
    num_fields = {
        delimiter: len({name.strip().strip('"') for name in line.split(delimiter)} & {*FIELDS})
        for delimiter in _DELIMITERS
    }
    return max(num_fields, key=num_fields.__getitem__)  # A comma, the first key, wins a tie.
