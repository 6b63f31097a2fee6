"""Colors of emotions that people with color vision deficiency can distinguish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Color(NamedTuple):
    """Two shades of a color: one for a light background and one for a dark background."""

    light: str
    dark: str


# The hues of Paul Tol's "bright" scheme and an orange. The shades remain distinguishable with
# protanopia, deuteranopia and tritanopia: the CIE 1976 color difference of any two is at least 20.
# The contrast with the background is at least 3 to 1.
_COLORS = {
    "gray": Color("#919191", "#cccccc"),
    "yellow": Color("#d17d03", "#fdd932"),
    "red": Color("#ff1e4c", "#d56e82"),
    "blue": Color("#322f94", "#8687f2"),
    "green": Color("#039a58", "#4f9b48"),
    "purple": Color("#9b488e", "#f249ab"),
    "cyan": Color("#1c68e2", "#69d1ff"),
    "orange": Color("#972a01", "#e4a940"),
}
_USUAL = {
    "gray": ("neutral", "calm", "other"),
    "yellow": ("joy", "happiness", "happy", "positive"),
    "red": ("anger", "angry", "negative"),
    "blue": ("sadness", "sad"),
    "green": ("disgust", "disgusted"),
    "purple": ("fear", "fearful", "anxiety"),
    "cyan": ("surprise", "surprised"),
    "orange": ("excited", "excitement", "frustrated", "frustration"),
}


def emotion_colors(classes: Sequence[str]) -> dict[str, Color]:
    """Returns a color for each class; colors repeat only after all colors are used."""
    colors: dict[str, Color] = {}
    free = dict(_COLORS)
    for color, names in _USUAL.items():
        for name in classes:
            if color in free and name.lower() in names:
                colors[name] = free.pop(color)
    for index, name in enumerate(name for name in classes if name not in colors):
        # Gray suggests the absence of emotion, so use gray last.
        rest = sorted(free, key="gray".__eq__) or list(_COLORS)
        colors[name] = _COLORS[rest[index % len(rest)]]
    return {name: colors[name] for name in classes}
