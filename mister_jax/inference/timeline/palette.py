"""Colors of emotions, distinguishable with color vision deficiency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Color(NamedTuple):
    """A color for a light and for a dark background."""

    light: str
    dark: str


# Paul Tol's "bright" scheme and an orange. On each background, the shade has a contrast of at
# least 3 to 1.
_COLORS = {
    "grey": Color("#808080", "#bbbbbb"),
    "yellow": Color("#a08800", "#e0cf4f"),
    "red": Color("#dd4055", "#f27f8d"),
    "blue": Color("#2f5f9e", "#6a9be0"),
    "green": Color("#228833", "#4fb865"),
    "purple": Color("#aa3377", "#d467a6"),
    "cyan": Color("#1f93bb", "#66ccee"),
    "orange": Color("#c85a00", "#f0a050"),
}
_USUAL = {
    "grey": ("neutral", "calm", "other"),
    "yellow": ("joy", "happiness", "happy", "positive"),
    "red": ("anger", "angry", "negative"),
    "blue": ("sadness", "sad"),
    "green": ("disgust", "disgusted"),
    "purple": ("fear", "fearful", "anxiety"),
    "cyan": ("surprise", "surprised"),
    "orange": ("excited", "excitement", "frustrated", "frustration"),
}


def emotion_colors(classes: Sequence[str]) -> dict[str, Color]:
    """Returns a color for each class; colors repeat only after all are used."""
    colors: dict[str, Color] = {}
    free = dict(_COLORS)
    for color, names in _USUAL.items():
        for name in classes:
            if color in free and name.lower() in names:
                colors[name] = free.pop(color)
    for index, name in enumerate(name for name in classes if name not in colors):
        # Grey suggests the absence of emotion, so it comes last.
        rest = sorted(free, key="grey".__eq__) or list(_COLORS)
        colors[name] = _COLORS[rest[index % len(rest)]]
    return {name: colors[name] for name in classes}
