"""Writes predictions to tables, subtitles, annotation files and web pages."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mister_jax.data.audio_source import MIX, Channel
from mister_jax.data.transcripts.annotations import Annotation
from mister_jax.data.transcripts.reader import read_annotation
from mister_jax.errors import InputError
from mister_jax.inference.timeline.eaf import to_eaf
from mister_jax.inference.timeline.rows import check_timeline_rows
from mister_jax.inference.timeline.subtitles import to_srt, to_vtt
from mister_jax.inference.timeline.textgrid import to_textgrid
from mister_jax.io import flatten, write_text

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TimelineOptions:
    """Options of timelines; see `write_predictions`."""

    embed_audio: bool
    transcript: str | os.PathLike[str] | None
    channels: Channel


def write_predictions(
    path: epath.PathLike,
    rows: Sequence[Row],
    *,
    embed_audio: bool = False,
    transcript: str | os.PathLike[str] | None = None,
    channels: Channel = MIX,
) -> None:
    """Atomically writes predictions in the format that the path's extension selects.

    In a CSV file, each nested value has a separate column, such as `probabilities.anger`, and list
    items are joined with semicolons. The formats of `TIMELINE_FORMATS` show when the emotions
    occur, and require the rows of a single recording; see `EmotionRecognizer.predict_recording`.

    Args:
      path: File to write; its folder is created if missing.
      rows: Prediction rows, one per utterance.
      embed_audio: Whether a web page contains the audio instead of a link to the recording.
      transcript: Transcript of the recording. If both the transcript and the output are EAF or
        TextGrid files, the emotion tiers are added to the transcript's tiers. Otherwise, the
        transcript is ignored.
      channels: Channels that were predicted; see `find_utterances`. A web page shows and embeds the
        audio of these channels; with "split", the mix of all channels.

    Raises:
      InputError: The path is invalid (see `check_predictions_path`). Or the format is one of
        `TIMELINE_FORMATS`, and the rows are not the utterances of a single recording, with "start"
        and "end".
    """
    check_predictions_path(path)
    extension = _extension(path)
    if extension in ROW_FORMATS:
        text = ROW_FORMATS[extension](rows)
    else:
        options = TimelineOptions(embed_audio, transcript, channels)
        text = TIMELINE_FORMATS[extension](path, check_timeline_rows(path, rows), options)
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def check_predictions_path(path: epath.PathLike) -> None:
    """Checks that predictions can be written to a path, whose folder need not exist yet.

    For a path in a bucket, only the extension is checked.

    Raises:
      InputError: The extension is not one of `FORMATS`, the path is a folder, or its parent folder
        cannot be written to or created.
    """
    path = epath.Path(path)
    if _extension(path) not in FORMATS:
        raise InputError(
            f"{path}: output with extension {path.suffix or '(none)'}; allowed: "
            f"{', '.join(FORMATS)}"
        )
    if "://" in os.fspath(path):  # in a bucket
        return
    absolute = path.absolute()
    if absolute.is_dir():
        raise InputError(f"{path}: is a folder; needed: a file")
    folder = next(it for it in absolute.parents if it.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot write to {folder} ({error.strerror})") from None


def _extension(path: epath.PathLike) -> str:
    """Returns the extension; ".TextGrid" for all spellings that differ only in case."""
    suffix = epath.Path(path).suffix
    return ".TextGrid" if suffix.lower() == ".textgrid" else suffix


def _to_html(path: epath.PathLike, rows: Sequence[Row], options: TimelineOptions) -> str:
    # Most formats do not need the audio decoder, so import it only for a page.
    from mister_jax.inference.timeline.page import timeline_html

    return timeline_html(path, rows, embed_audio=options.embed_audio, channels=options.channels)


def _to_textgrid(_: epath.PathLike, rows: Sequence[Row], options: TimelineOptions) -> str:
    return to_textgrid(rows, _annotation(options))


def _to_eaf(path: epath.PathLike, rows: Sequence[Row], options: TimelineOptions) -> str:
    return to_eaf(path, rows, _annotation(options))


def _annotation(options: TimelineOptions) -> Annotation | None:
    return None if options.transcript is None else read_annotation(options.transcript)


def _to_json_lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _to_csv(rows: Sequence[Row]) -> str:
    flat_rows = [
        {
            name: "; ".join(value) if isinstance(value, list) else value
            for name, value in flatten(row).items()
        }
        for row in rows
    ]
    columns = dict.fromkeys(column for row in flat_rows for column in row)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat_rows)
    return file.getvalue()


ROW_FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {".jsonl": _to_json_lines, ".csv": _to_csv}
"""Maps the extensions of tables to formatters, which accept any rows."""

TIMELINE_FORMATS: dict[str, Callable[[epath.PathLike, Sequence[Row], TimelineOptions], str]] = {
    ".srt": lambda _, rows, __: to_srt(rows),
    ".vtt": lambda _, rows, __: to_vtt(rows),
    ".TextGrid": _to_textgrid,
    ".eaf": _to_eaf,
    ".html": _to_html,
}
"""Maps the extensions of timelines to formatters, which accept the sorted rows of one recording."""

FORMATS = (*ROW_FORMATS, *TIMELINE_FORMATS)
"""Extensions that `write_predictions` accepts."""
