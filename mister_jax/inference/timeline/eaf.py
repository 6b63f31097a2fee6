"""Formats predictions as an ELAN document."""

from __future__ import annotations

import copy
import datetime
import heapq
import mimetypes
import os
import pathlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence

from etils import epath

from mister_jax.data.transcripts.annotations import Annotation, eaf_unit
from mister_jax.inference.timeline.rows import Row, one_line, shown_emotion, storable
from mister_jax.inference.timeline.tiers import (
    Interval,
    interval_tiers,
    row_intervals,
    split_tiers,
    unique_name,
)

_XSI = "http://www.w3.org/2001/XMLSchema-instance"
_SCHEMA = "http://www.mpi.nl/tools/elan/EAFv3.0.xsd"
# Tags that the schema requires before the time slots, tiers, linguistic types and constraints.
_BEFORE_TIMES = ("LICENSE", "HEADER")
_BEFORE_TIERS = (*_BEFORE_TIMES, "TIME_ORDER", "TIER")
_BEFORE_TYPES = (*_BEFORE_TIERS, "LINGUISTIC_TYPE")
_BEFORE_CONSTRAINTS = (*_BEFORE_TYPES, "LOCALE", "LANGUAGE", "CONSTRAINT")


def to_eaf(path: epath.PathLike, rows: Sequence[Row], given: Annotation | None = None) -> str:
    """Returns an ELAN document, with a link to the recording if the rows name one.

    Each emotion is a child of the annotation with the text, so ELAN moves and deletes the two
    together. If the transcript is itself an annotation file, emotions are not children but have
    times, because an utterance may cover several intervals of the file, or a part of an interval.

    Args:
      path: File that will contain the document. Relative links are relative to its folder.
      rows: Rows of one recording, sorted by start time.
      given: Annotation to which the emotion tiers are added. An EAF document keeps its
        content; from a TextGrid, only the interval tiers are copied.
    """
    ET.register_namespace("xsi", _XSI)
    if given is None or given.document is None:
        document = _Document(_new_root())
    else:
        document = _Document(copy.deepcopy(given.document))
        _move_links(document.root, given.path, path)
    if rows[0].get("recording"):
        document.link(path, rows[0]["recording"])
    if given is None:
        _add_texts_and_emotions(document, rows)
    else:
        if given.document is None:
            copied = document.add_type("annotation")
            for _, name, intervals in interval_tiers(given.tiers):
                tier = document.add_tier(name, copied)
                document.annotate(tier, [it for it in intervals if one_line(it[2])])
        emotion = document.add_type("emotion")
        for pair in split_tiers(rows, document.tier_names()):
            tier = document.add_tier(pair.emotion_name, emotion, pair.speaker)
            document.annotate(tier, row_intervals(pair.rows, "emotion"))
    return document.to_text()


def _add_texts_and_emotions(document: _Document, rows: Sequence[Row]) -> None:
    """Adds tiers of texts, whose children are tiers of emotions."""
    utterance = document.add_type("utterance")
    emotion = document.add_type("emotion", "Symbolic_Association")
    for pair in split_tiers(rows):
        texts = document.add_tier(pair.text_name, utterance, pair.speaker)
        emotions = document.add_tier(
            pair.emotion_name, emotion, pair.speaker, PARENT_REF=pair.text_name
        )
        parents = document.annotate(texts, row_intervals(pair.rows, "text"))
        document.refer(
            emotions,
            [(it, shown_emotion(row)) for it, row in zip(parents, pair.rows, strict=True)],
        )


class _Document:
    """An ELAN document to which tiers are added.

    Args:
      root: Root of the document, which is changed.
    """

    def __init__(self, root: ET.Element) -> None:
        self.root = root
        self._unit = eaf_unit(root)
        self._new_slots: list[ET.Element] = []
        # Ids must be unique in the entire document.
        ids = (value for element in root.iter() for value in element.attrib.values())
        numbers = (match for it in ids if (match := re.fullmatch(r"(?:a|ts)(\d{1,15})", it)))
        self._last_id = max((int(match[1]) for match in numbers), default=0)

    def tier_names(self) -> list[str]:
        return [tier.get("TIER_ID", "") for tier in self.root.iterfind("TIER")]

    def add_type(self, name: str, constraint: str | None = None) -> str:
        """Adds a linguistic type and returns its name, which is unique."""
        types = self.root.iterfind("LINGUISTIC_TYPE")
        name = unique_name(name, {it.get("LINGUISTIC_TYPE_ID", "") for it in types})
        attributes = {
            "LINGUISTIC_TYPE_ID": name,
            "TIME_ALIGNABLE": "false" if constraint else "true",
            "GRAPHIC_REFERENCES": "false",
        }
        if constraint:
            attributes["CONSTRAINTS"] = constraint
            description = "1-1 association with a parent annotation"
            self._insert(
                ET.Element("CONSTRAINT", STEREOTYPE=constraint, DESCRIPTION=description),
                _BEFORE_CONSTRAINTS,
            )
        self._insert(ET.Element("LINGUISTIC_TYPE", attributes), _BEFORE_TYPES)
        return name

    def add_tier(
        self, name: str, linguistic_type: str, speaker: str = "", **attributes: str
    ) -> ET.Element:
        """Adds an empty tier."""
        tier = ET.Element("TIER", {"PARTICIPANT": speaker} if speaker else {})
        tier.attrib |= {"TIER_ID": storable(name), "LINGUISTIC_TYPE_REF": linguistic_type}
        tier.attrib |= attributes
        self._insert(tier, _BEFORE_TIERS)
        return tier

    def annotate(self, tier: ET.Element, intervals: Iterable[Interval]) -> list[str]:
        """Adds intervals in seconds to a tier, and returns the ids of the annotations."""
        ids = []
        last = 0
        for start, end, text in intervals:
            first = max(last, round(start / self._unit))
            last = max(first + 1, round(end / self._unit))
            ids.append(self._new_id("a"))
            slots = (self._new_slot(first), self._new_slot(last))
            references = dict(zip(("TIME_SLOT_REF1", "TIME_SLOT_REF2"), slots, strict=True))
            _annotate(tier, "ALIGNABLE_ANNOTATION", text, ANNOTATION_ID=ids[-1], **references)
        return ids

    def refer(self, tier: ET.Element, values: Iterable[tuple[str, object]]) -> None:
        """Adds annotations, each given as a pair of the parent annotation's id and the value."""
        for parent, value in values:
            ids = {"ANNOTATION_ID": self._new_id("a"), "ANNOTATION_REF": parent}
            _annotate(tier, "REF_ANNOTATION", one_line(value), **ids)

    def link(self, path: epath.PathLike, recording: str) -> None:
        """Adds a link to a recording, unless the document has a link to a file with this name."""
        header = self._child("HEADER", ("LICENSE",), MEDIA_FILE="", TIME_UNITS="milliseconds")
        descriptors = header.findall("MEDIA_DESCRIPTOR")
        new = _media_descriptor(path, recording)
        # Existing links may be percent-encoded; `new` has the name with and without encoding.
        if _linked_names([new]).isdisjoint(_linked_names(descriptors)):
            header.insert(len(descriptors), new)

    def to_text(self) -> str:
        """Returns the document as XML."""
        order = self._child("TIME_ORDER", _BEFORE_TIMES)
        # ELAN expects slots in order of time. A slot without a time stays after its predecessor.
        last = -1.0
        given = []
        for slot in order:
            last = max(last, float(slot.get("TIME_VALUE", last)))
            given.append((last, slot))
        new = [(float(slot.attrib["TIME_VALUE"]), slot) for slot in self._new_slots]
        new.sort(key=lambda it: it[0])
        order[:] = [slot for _, slot in heapq.merge(given, new, key=lambda it: it[0])]
        for item in self.root.iterfind("HEADER/PROPERTY[@NAME='lastUsedAnnotationId']"):
            item.text = str(self._last_id)
        ET.indent(self.root)
        text = ET.tostring(self.root, encoding="unicode")
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'

    def _insert(self, element: ET.Element, before: Sequence[str]) -> None:
        """Inserts an element after all elements with one of the given tags."""
        positions = (index for index, it in enumerate(self.root, start=1) if it.tag in before)
        self.root.insert(max(positions, default=0), element)

    def _child(self, tag: str, before: Sequence[str], **attributes: str) -> ET.Element:
        child = self.root.find(tag)
        if child is None:
            child = ET.Element(tag, attributes)
            self._insert(child, before)
        return child

    def _new_id(self, prefix: str) -> str:
        self._last_id += 1
        return f"{prefix}{self._last_id}"

    def _new_slot(self, value: int) -> str:
        id_ = self._new_id("ts")
        self._new_slots.append(ET.Element("TIME_SLOT", TIME_SLOT_ID=id_, TIME_VALUE=str(value)))
        return id_


def _new_root() -> ET.Element:
    return ET.Element(
        "ANNOTATION_DOCUMENT",
        {
            "AUTHOR": "mister_jax",
            "DATE": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "FORMAT": "3.0",
            "VERSION": "3.0",
            f"{{{_XSI}}}noNamespaceSchemaLocation": _SCHEMA,
        },
    )


def _annotate(tier: ET.Element, kind: str, value: str, **attributes: str) -> None:
    annotation = ET.SubElement(ET.SubElement(tier, "ANNOTATION"), kind, attributes)
    ET.SubElement(annotation, "ANNOTATION_VALUE").text = storable(value)


def _move_links(root: ET.Element, old: epath.PathLike, new: epath.PathLike) -> None:
    """Rewrites links relative to the old file as links relative to the new file."""
    folder = _absolute(old).parent
    for element in root.iterfind("HEADER/*"):
        for key in ("RELATIVE_MEDIA_URL", "RELATIVE_LINK_URL"):
            link = element.get(key)
            if link and not re.match(r"\w+:", link):
                element.set(key, _relative_link(new, folder / link))


def _relative_link(path: epath.PathLike, target: pathlib.Path) -> str:
    relative = pathlib.PurePath(os.path.relpath(target, _absolute(path).parent)).as_posix()
    return one_line(relative if relative.startswith("../") else f"./{relative}")


def _absolute(path: epath.PathLike) -> pathlib.Path:
    return pathlib.Path(os.fspath(path)).absolute()


def _linked_names(descriptors: Iterable[ET.Element]) -> set[str]:
    links = (it.get(key, "") for it in descriptors for key in ("MEDIA_URL", "RELATIVE_MEDIA_URL"))
    return {link.rpartition("/")[2] for link in links} - {""}


def _media_descriptor(path: epath.PathLike, recording: str) -> ET.Element:
    absolute = pathlib.Path(recording).absolute()
    suffix = absolute.suffix.lower()
    mime_type = "audio/x-wav" if suffix == ".wav" else mimetypes.guess_type(absolute.name)[0]
    return ET.Element(
        "MEDIA_DESCRIPTOR",
        MEDIA_URL=one_line(absolute.as_uri()),
        RELATIVE_MEDIA_URL=_relative_link(path, absolute),
        MIME_TYPE=mime_type or "unknown",
    )
