"""Reads a folder of recordings with transcripts, such as ELAN or Praat annotations.

Each recording with a transcript becomes a dialogue, and each utterance in the transcript becomes a
manifest row. Labels come from a tier, a column, or the end of the text, as in "Hello! [happy]".
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mister_jax.data.audio_source import RECORDING_SUFFIXES
from mister_jax.data.corpora.manifest.reader import Row, corpus_from_rows
from mister_jax.data.corpus import Corpus, existing_directory
from mister_jax.data.transcripts.reader import SUFFIXES, TranscriptFinder, read_transcript
from mister_jax.data.transcripts.segments import Segment
from mister_jax.data.transcripts.utterances import UtteranceRules, make_utterances
from mister_jax.errors import InputError

_LABEL_SUFFIX = re.compile(r"\s*[\[({<](?P<label>[^\[\](){}<>]+)[\])}>]\s*$")
_MAX_LISTED = 5  # maximum number of files that a note lists


@dataclasses.dataclass(frozen=True)
class TranscriptOptions:
    """Options for reading the transcripts of a folder.

    Attributes:
      tier: Name of the tier that contains the utterances, or several comma-separated names; see
        `read_transcript`.
      label_tier: Name of the tier that contains the emotions.
      label_column: Name of the table column that contains the emotions.
      label_suffix: Whether the text ends with the emotion in brackets.
      channel: Channel of the recordings to read, or "split" to read each utterance from the channel
        that the transcript states, or from "mix" if the transcript states none.
      rules: Rules that turn segments into utterances.
    """

    tier: str | None = None
    label_tier: str | None = None
    label_column: str | None = None
    label_suffix: bool = False
    channel: str = "mix"
    rules: UtteranceRules = dataclasses.field(default_factory=UtteranceRules)


def read_transcripts(
    source: str | pathlib.Path, options: TranscriptOptions, **manifest_options: Any
) -> Corpus:
    """Reads the recordings and transcripts of a folder and its subfolders.

    Recordings without a transcript and transcripts without a recording are left out and listed in
    the notes.

    Args:
      source: Folder of the recordings, with transcripts next to them; see `find_transcript`.
      options: Options for reading the transcripts.
      **manifest_options: Options of `corpus_from_rows`, such as `labels`.

    Raises:
      InputError: There is no recording with a transcript, two recordings match the same transcript,
        or a transcript cannot be read.
    """
    folder = existing_directory(source, needed="a folder of recordings with transcripts")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    recordings = [path for path in files if path.suffix.lower() in RECORDING_SUFFIXES]
    if not recordings:
        raise InputError(
            f"{folder}: no recordings; needed: files such as call.wav with a transcript call.srt"
        )
    finder = TranscriptFinder()
    pairs = [(path, finder.find(path)) for path in recordings]
    used: dict[pathlib.Path, pathlib.Path] = {}
    for recording, transcript in pairs:
        if (
            transcript is not None
            and (other := used.setdefault(transcript, recording)) != recording
        ):
            raise InputError(
                f"{transcript}: matches both {other.name} and {recording.name}; needed: one "
                f"transcript for each recording, such as {recording.name}{transcript.suffix}"
            )
    if not used:
        raise InputError(
            f"{folder}: {len(recordings)} recordings without a transcript; needed: files of the "
            "same name such as call.srt, call.TextGrid or call.eaf"
        )
    rows: list[Row] = []
    notes: list[str] = []
    names = _dialogue_names(folder, used.values())
    for transcript, recording in used.items():
        rows += _rows(names[recording], folder, recording, transcript, options, notes)
    without_transcript = [path for path, transcript in pairs if transcript is None]
    stems = {recording.with_suffix("") for recording in recordings}
    without_recording = [
        path
        for path in files
        if path.suffix.lower() in SUFFIXES and path not in used and not _is_beside(path, stems)
    ]
    for what, paths in (
        ("recordings without transcript", without_transcript),
        ("transcripts without recording", without_recording),
    ):
        if paths:
            listed = ", ".join(str(path.relative_to(folder)) for path in paths[:_MAX_LISTED])
            more = ", ..." if len(paths) > _MAX_LISTED else ""
            notes.append(f"{len(paths)} {what} are left out: {listed}{more}")
    corpus = corpus_from_rows(rows, folder, **manifest_options)
    return dataclasses.replace(corpus, notes=(*notes, *corpus.notes))


def _is_beside(transcript: pathlib.Path, stems: set[pathlib.Path]) -> bool:
    """Returns whether a file is named like a transcript of one of the recordings."""
    parts = transcript.name.split(".")
    names = (".".join(parts[:count]) for count in range(1, len(parts)))
    return any(
        transcript.with_name(name) in stems or transcript.with_name(name).with_suffix("") in stems
        for name in names
    )


def _dialogue_names(
    folder: pathlib.Path, recordings: Iterable[pathlib.Path]
) -> dict[pathlib.Path, str]:
    """Returns a unique id for each recording: the path without its extension, if possible."""
    paths = {recording: recording.relative_to(folder) for recording in recordings}
    # File names may have surrounding white space, which ids must not have.
    stems = {recording: str(path.with_suffix("")).strip() for recording, path in paths.items()}
    counts = collections.Counter(stems.values())
    names: dict[str, pathlib.Path] = {}
    for recording, path in paths.items():
        name = stems[recording] if counts[stems[recording]] == 1 else str(path).strip()
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        names[next(it for it in itertools.chain([name], numbered) if it not in names)] = recording
    return {recording: name for name, recording in names.items()}


def _rows(
    name: str,
    folder: pathlib.Path,
    recording: pathlib.Path,
    transcript: pathlib.Path,
    options: TranscriptOptions,
    notes: list[str],
) -> Iterator[Row]:
    """Yields the utterances of a recording as rows of a manifest, and appends to `notes`."""
    contents = read_transcript(
        transcript,
        tier=options.tier,
        label_tier=options.label_tier,
        label_column=options.label_column,
        recording=recording.stem,
        # Several label options are meant for a folder with several formats. A transcript then
        # ignores the options that its format does not support.
        strict=sum(map(bool, (options.label_tier, options.label_column, options.label_suffix))) < 2,
    )
    notes += (f"{transcript.relative_to(folder)}: {note}" for note in contents.notes)
    segments: Sequence[Segment] = contents.segments
    if options.label_suffix:
        segments = [_split_label(segment) for segment in segments]
    for number, segment in enumerate(make_utterances(segments, options.rules), start=1):
        channel: Any = options.channel
        if channel == "split":
            channel = "mix" if segment.channel is None else segment.channel
        values = {
            "dialogue": name,
            "utterance": number,
            "order": number,
            "start": segment.start,
            "end": segment.end,
            "audio": recording.name,
            "audio_start": segment.start,
            "audio_end": segment.end,
            "audio_channel": channel,
            "text": segment.text or None,
            "label": segment.label,
            "speaker": segment.speaker,
        }
        yield Row(
            f"{transcript}: utterance at {segment.start:.2f} s",
            recording.parent,
            {field: value for field, value in values.items() if value is not None},
        )


def _split_label(segment: Segment) -> Segment:
    """Moves the label from the end of a segment's text to the `label` field."""
    match = _LABEL_SUFFIX.search(segment.text)
    if match is None:
        return segment
    label = match["label"].strip()
    return dataclasses.replace(segment, text=segment.text[: match.start()], label=label, words=())
