"""Assembles the web page of a recording from `page.html`, `page.css` and `page.js`."""

from __future__ import annotations

import base64
import hashlib
import os
import pathlib
import string
import urllib.parse
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from absl import logging
from etils import epath

import mister_jax
from mister_jax.data.audio_source import MIX, AudioError, Channel, check_channel
from mister_jax.inference.timeline.palette import emotion_colors
from mister_jax.inference.timeline.rows import Row, one_line
from mister_jax.inference.timeline.waveform import Mp3Encoder, Waveform, waveform_peaks
from mister_jax.io import embedded_json

_FOLDER = epath.resource_path("mister_jax") / "inference" / "timeline"


def timeline_html(
    path: epath.PathLike,
    rows: Sequence[Row],
    *,
    embed_audio: bool = False,
    channels: Channel = MIX,
) -> str:
    """Returns a page that plays a recording, shows its emotions and needs no network access.

    Args:
      path: File that will contain the page. The link to the recording is relative to this file.
      rows: Rows of one recording, sorted by start time.
      embed_audio: Whether the page contains the audio as MP3 in base64, 19 MB per hour.
      channels: Channel to show and embed; "split" shows the mix.

    Raises:
      AudioError: The audio to embed cannot be read.
    """
    recording = rows[0].get("recording") or ""
    encoder = Mp3Encoder() if embed_audio else None
    channel = MIX if channels == "split" else check_channel(channels)
    try:
        waveform = waveform_peaks(recording, channel, mp3=encoder)
    except AudioError as error:
        if embed_audio:
            raise
        logging.warning("%s: the page has no waveform: %s", path, error)
        waveform = Waveform(np.zeros(0, np.int8), np.zeros(0, np.int8), 1.0)
    data = timeline_data(rows, waveform)
    if channels == "split":
        data["channel"] = "mix of the channels"
    elif channel != MIX:
        data["channel"] = f"channel {channel}" if isinstance(channel, int) else f"{channel} channel"
    if not embed_audio and recording:
        data["source"] = _relative_url(path, recording)
    script = (_FOLDER / "page.js").read_text()
    return string.Template((_FOLDER / "page.html").read_text()).substitute(
        title=escape(data["name"]),
        style=_color_rules(data["classes"]) + (_FOLDER / "page.css").read_text(),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=embedded_json(data),
        audio=base64.b64encode(encoder.finish()).decode() if encoder else "",
        version=escape(mister_jax.__version__),
    )


def timeline_data(rows: Sequence[Row], waveform: Waveform) -> dict[str, Any]:
    """Returns the page's data, with the values of all utterances in one list per field.

    Probabilities and gate weights are integers in thousandths, to keep the page small. Emotions,
    votes and speakers are indices, and -1 stands for a missing value.
    """
    classes = list(
        dict.fromkeys(name for row in rows for name in (*row["probabilities"], row["emotion"]))
    )
    experts = list(rows[0].get("experts") or {})
    # Experts that never vote are disabled in the model, or every utterance lacks their modality.
    experts = [name for name in experts if any(row["experts"].get(name) for row in rows)]
    speakers = sorted({one_line(row.get("speaker")) for row in rows} - {""})
    index = {name: number for number, name in enumerate(classes)}
    gates = [
        [round(1000 * (row.get("gate") or {}).get(name, 0.0)) for row in rows] for name in experts
    ]
    last_end = max(row["end"] for row in rows)
    has_uncertain = any("uncertain" in row for row in rows)
    return {
        "name": one_line(pathlib.PurePath(rows[0].get("recording") or "recording").name),
        "duration": max(last_end, len(waveform.low) * waveform.bin_seconds),
        "classes": classes,
        "experts": experts,
        "speakers": speakers,
        "start": [row["start"] for row in rows],
        "end": [row["end"] for row in rows],
        "speaker": [
            speakers.index(name) if (name := one_line(row.get("speaker"))) else -1 for row in rows
        ],
        "text": [one_line(row.get("text")) for row in rows],
        "emotion": [index[row["emotion"]] for row in rows],
        "uncertain": [bool(row.get("uncertain")) for row in rows] if has_uncertain else None,
        "probabilities": [
            round(1000 * row["probabilities"].get(name, 0.0)) for row in rows for name in classes
        ],
        "votes": [[index.get(row["experts"].get(name), -1) for row in rows] for name in experts],
        "gate": gates if any(map(any, gates)) else None,
        "label": [one_line(row.get("label")) for row in rows],
        "notes": [[one_line(note) for note in row.get("notes") or ()] for row in rows],
        "binSeconds": waveform.bin_seconds,
        "peaks": waveform.to_base64(),
    }


def _relative_url(path: epath.PathLike, recording: str) -> str:
    absolute = pathlib.Path(recording).absolute()
    folder = pathlib.Path(os.fspath(path)).absolute().parent
    relative = pathlib.PurePath(os.path.relpath(absolute, folder)).as_posix()
    return "./" + urllib.parse.quote(relative, errors="surrogateescape")


def _color_rules(classes: Sequence[str]) -> str:
    """Returns CSS variables `--emotion-N` with the color of each class."""
    colors = emotion_colors(classes)

    def variables(shade: str) -> str:
        return "".join(
            f"--emotion-{number}: {getattr(colors[name], shade)};"
            for number, name in enumerate(classes)
        )

    return (
        f":root {{{variables('light')}}}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{{variables('dark')}}} }}\n"
    )
