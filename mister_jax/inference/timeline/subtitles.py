"""Formats predictions as subtitles: SubRip (SRT) and WebVTT."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from mister_jax.inference.timeline.palette import emotion_colors
from mister_jax.inference.timeline.rows import Row, milliseconds, one_line, shown_emotion


def to_srt(rows: Sequence[Row]) -> str:
    """Returns SRT subtitles such as "[joy] Ann: We won!", or "[joy?]" if the emotion is uncertain.

    SRT has no escape sequences, so the text is not escaped. Only arrows are replaced, because they
    would look like timing lines.
    """
    cues = []
    for number, row in enumerate(rows, start=1):
        start, end = (_timestamp(time, ",") for time in milliseconds(row))
        speaker = one_line(row.get("speaker"))
        words = [f"[{shown_emotion(row)}]", f"{speaker}:" if speaker else ""]
        line = " ".join(filter(None, [*words, one_line(row.get("text"))]))
        cues.append(f"{number}\n{start} --> {end}\n{line.replace('-->', '→')}\n")
    return "\n".join(cues)


def to_vtt(rows: Sequence[Row]) -> str:
    """Returns WebVTT subtitles with the speaker as the voice and the emotion as a CSS class."""
    emotions = list(dict.fromkeys(one_line(row["emotion"]) for row in rows))
    classes = _class_names(emotions)
    colors = emotion_colors(emotions)
    # Players show cues on a dark background.
    style = "\n".join(
        f"::cue(.{classes[emotion]}) {{ color: {colors[emotion].dark}; }}" for emotion in emotions
    )
    blocks = ["WEBVTT", f"STYLE\n{style}"]
    for number, row in enumerate(rows, start=1):
        start, end = (_timestamp(time, ".") for time in milliseconds(row))
        emotion, speaker = one_line(row["emotion"]), one_line(row.get("speaker"))
        text = _escape(f"[{shown_emotion(row)}] {one_line(row.get('text'))}".rstrip())
        payload = f"<c.{classes[emotion]}>{text}</c>"
        if speaker:
            payload = f"<v {_escape(speaker)}>{payload}</v>"
        blocks.append(f"{number}\n{start} --> {end}\n{payload}")
    return "\n\n".join(blocks) + "\n"


def _timestamp(time: int, separator: str) -> str:
    seconds, fraction = divmod(time, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{separator}{fraction:03}"


def _escape(text: str) -> str:
    return escape(text, quote=False)


def _class_names(emotions: Sequence[str]) -> dict[str, str]:
    """Returns a different CSS identifier for each emotion."""
    names: dict[str, str] = {}
    for index, emotion in enumerate(emotions):
        name = re.sub(r"[^a-z0-9_]+", "-", emotion.lower()).strip("-")
        if not name[:1].isalpha():
            name = f"emotion-{name}".strip("-")
        names[emotion] = f"{name}-{index}" if name in names.values() else name
    return names
