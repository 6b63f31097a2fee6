"""Formats predictions as annotations: Praat TextGrid and ELAN EAF.

Every speaker has a tier of texts, named after the speaker, and a tier of emotions, such as "Ann"
and "Ann emotion". Without speakers, the tiers are "text" and "emotion". Intervals of a tier must
not overlap, so overlapping utterances of a speaker go to further tiers, such as "Ann 2".
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import mimetypes
import os
import pathlib
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence

from etils import epath

from mister_jax.inference.timeline.rows import Row, milliseconds, one_line, recording_seconds

_XSI = "http://www.w3.org/2001/XMLSchema-instance"
_SCHEMA = "http://www.mpi.nl/tools/elan/EAFv3.0.xsd"


@dataclasses.dataclass(frozen=True)
class _Tiers:
    """A tier of texts and the tier of their emotions.

    Attributes:
      text_name: Name of the tier of texts.
      emotion_name: Name of the tier of emotions.
      speaker: Speaker, empty if unknown.
      rows: Rows in the order of their start, which do not overlap.
    """

    text_name: str
    emotion_name: str
    speaker: str
    rows: list[Row]


def to_textgrid(rows: Sequence[Row]) -> str:
    """Returns a Praat TextGrid in the long text format."""
    stop = max(round(1000 * recording_seconds(rows)), *(milliseconds(row)[1] for row in rows))
    tiers: list[tuple[str, list[tuple[int, int, str]]]] = []
    for pair in _split_tiers(rows):
        times = [milliseconds(row) for row in pair.rows]
        for name, key in ((pair.text_name, "text"), (pair.emotion_name, "emotion")):
            texts = [one_line(row.get(key)) for row in pair.rows]
            tiers.append((name, list(_fill_gaps(times, texts, stop))))
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {stop / 1000}",
        "tiers? <exists>",
        f"size = {len(tiers)}",
        "item []:",
    ]
    for number, (name, intervals) in enumerate(tiers, start=1):
        lines += [
            f"    item [{number}]:",
            '        class = "IntervalTier"',
            f'        name = "{_quoted(name)}"',
            "        xmin = 0",
            f"        xmax = {stop / 1000}",
            f"        intervals: size = {len(intervals)}",
        ]
        for index, (start, end, text) in enumerate(intervals, start=1):
            lines += [
                f"        intervals [{index}]:",
                f"            xmin = {start / 1000}",
                f"            xmax = {end / 1000}",
                f'            text = "{_quoted(text)}"',
            ]
    return "\n".join(lines) + "\n"


def to_eaf(path: epath.PathLike, rows: Sequence[Row]) -> str:
    """Returns an ELAN document that links the recording.

    An emotion belongs to the annotation with its text, so ELAN moves and deletes both together.

    Args:
      path: File that will contain the document; ELAN finds the recording relative to it.
      rows: Rows of one recording.
    """
    ET.register_namespace("xsi", _XSI)
    document = ET.Element(
        "ANNOTATION_DOCUMENT",
        {
            "AUTHOR": "mister_jax",
            "DATE": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "FORMAT": "3.0",
            "VERSION": "3.0",
            f"{{{_XSI}}}noNamespaceSchemaLocation": _SCHEMA,
        },
    )
    header = ET.SubElement(document, "HEADER", MEDIA_FILE="", TIME_UNITS="milliseconds")
    if rows[0].get("recording"):
        header.append(_media_descriptor(path, rows[0]["recording"]))
    time_order = ET.SubElement(document, "TIME_ORDER")
    numbers = itertools.count(1)
    for pair in _split_tiers(rows):
        common = {"PARTICIPANT": pair.speaker} if pair.speaker else {}
        texts = ET.SubElement(
            document, "TIER", common, TIER_ID=pair.text_name, LINGUISTIC_TYPE_REF="utterance"
        )
        emotions = ET.SubElement(
            document,
            "TIER",
            common,
            TIER_ID=pair.emotion_name,
            LINGUISTIC_TYPE_REF="emotion",
            PARENT_REF=pair.text_name,
        )
        for row in pair.rows:
            slots = []
            for time in milliseconds(row):
                slots.append(f"ts{len(time_order) + 1}")
                ET.SubElement(time_order, "TIME_SLOT", TIME_SLOT_ID=slots[-1], TIME_VALUE=str(time))
            text_id, emotion_id = f"a{next(numbers)}", f"a{next(numbers)}"
            _annotate(
                texts,
                "ALIGNABLE_ANNOTATION",
                row.get("text"),
                ANNOTATION_ID=text_id,
                TIME_SLOT_REF1=slots[0],
                TIME_SLOT_REF2=slots[1],
            )
            _annotate(
                emotions,
                "REF_ANNOTATION",
                row["emotion"],
                ANNOTATION_ID=emotion_id,
                ANNOTATION_REF=text_id,
            )
    ET.SubElement(
        document,
        "LINGUISTIC_TYPE",
        LINGUISTIC_TYPE_ID="utterance",
        TIME_ALIGNABLE="true",
        GRAPHIC_REFERENCES="false",
    )
    ET.SubElement(
        document,
        "LINGUISTIC_TYPE",
        LINGUISTIC_TYPE_ID="emotion",
        TIME_ALIGNABLE="false",
        GRAPHIC_REFERENCES="false",
        CONSTRAINTS="Symbolic_Association",
    )
    ET.SubElement(
        document,
        "CONSTRAINT",
        STEREOTYPE="Symbolic_Association",
        DESCRIPTION="1-1 association with a parent annotation",
    )
    ET.indent(document)
    text = ET.tostring(document, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _split_tiers(rows: Sequence[Row]) -> list[_Tiers]:
    """Splits sorted rows into tiers: one per speaker, more if their utterances overlap."""
    by_speaker: dict[str, list[list[Row]]] = {}
    for row in rows:
        lanes = by_speaker.setdefault(one_line(row.get("speaker")), [])
        start, _ = milliseconds(row)
        lane = next((it for it in lanes if milliseconds(it[-1])[1] <= start), None)
        if lane is None:
            lanes.append([row])
        else:
            lane.append(row)
    tiers: list[_Tiers] = []
    names: set[str] = set()
    for speaker, lanes in by_speaker.items():
        for lane in lanes:
            # A speaker may have the name of another tier, such as "Ann 2".
            for number in itertools.count(1):
                suffix = f" {number}" if number > 1 else ""
                pair = (speaker or "text") + suffix, f"{speaker} emotion{suffix}".strip()
                if names.isdisjoint(pair):
                    break
            names.update(pair)
            tiers.append(_Tiers(*pair, speaker, lane))
    return tiers


def _fill_gaps(
    times: Sequence[tuple[int, int]], texts: Sequence[str], stop: int
) -> Iterator[tuple[int, int, str]]:
    """Yields the intervals of a tier, with empty intervals between them, as Praat requires."""
    position = 0
    for (start, end), text in zip(times, texts, strict=True):
        if start > position:
            yield position, start, ""
        yield start, end, text
        position = end
    if position < stop:
        yield position, stop, ""


def _quoted(text: str) -> str:
    return text.replace('"', '""')


def _annotate(tier: ET.Element, kind: str, value: object, **attributes: str) -> None:
    annotation = ET.SubElement(ET.SubElement(tier, "ANNOTATION"), kind, attributes)
    ET.SubElement(annotation, "ANNOTATION_VALUE").text = one_line(value)


def _media_descriptor(path: epath.PathLike, recording: str) -> ET.Element:
    absolute = pathlib.Path(recording).absolute()
    relative = os.path.relpath(absolute, pathlib.Path(os.fspath(path)).absolute().parent)
    relative = pathlib.PurePath(relative).as_posix()
    suffix = absolute.suffix.lower()
    mime_type = "audio/x-wav" if suffix == ".wav" else mimetypes.guess_type(absolute.name)[0]
    return ET.Element(
        "MEDIA_DESCRIPTOR",
        MEDIA_URL=one_line(absolute.as_uri()),
        RELATIVE_MEDIA_URL=one_line(relative if relative.startswith("../") else f"./{relative}"),
        MIME_TYPE=mime_type or "unknown",
    )
