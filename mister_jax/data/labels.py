"""Range of sentiment scores, names of emotions, and a check for misspelled class names."""

import collections
import shlex
from collections.abc import Iterable, Mapping

MIN_SCORE, MAX_SCORE = -3.0, 3.0
"""Range of a sentiment score, as in CMU-MOSI and CMU-MOSEI."""

_PLACEHOLDERS = ("nan", "none", "null", "n/a", "na", "<na>", "unknown", "")
"""Names that programs write for a missing label."""

EMOTION_SYNONYMS = {
    "anger": ("ang", "angry"),
    "disgust": ("dis", "disgusted"),
    "excitement": ("exc", "excited"),
    "fear": ("fea", "fearful"),
    "joy": ("hap", "happy", "happiness"),
    "neutral": ("neu",),
    "sadness": ("sad",),
    "surprise": ("sur", "surprised"),
}
"""Maps the standard name of each emotion to the other names that published models use."""

_EMOTION_NAMES = {other: name for name, others in EMOTION_SYNONYMS.items() for other in others}


def emotion_name(label: str) -> str:
    """Maps a label to its key in `EMOTION_SYNONYMS`. Unknown labels are returned unchanged.

    The comparison ignores case and spaces around the label.
    """
    normalized = label.strip().casefold()
    if normalized in EMOTION_SYNONYMS:
        return normalized
    return _EMOTION_NAMES.get(normalized, label)


def suspicious_labels(counts: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Finds class names that look like misspellings of other names, or like missing values.

    The comparison ignores case, spaces, hyphens and underscores. The most frequent spelling of a
    name is taken as correct, and a lower-case spelling wins a tie.

    Returns:
        A tuple for each suspicious name: the name, the problem, and the correct name, which is
        empty if the name looks like a missing value.
    """
    spellings = collections.defaultdict(list)
    for name in sorted(counts, key=lambda name: (-counts[name], name != name.lower(), name)):
        normalized = "".join(name.casefold().split()).replace("-", "").replace("_", "")
        spellings[normalized].append(name)
    suspicious = []
    for normalized, names in spellings.items():
        if normalized in _PLACEHOLDERS:
            suspicious += [(name, "reads like a missing label", "") for name in names]
        else:
            problem = f"is {names[0]!r} spelled differently"
            suspicious += [(name, problem, names[0]) for name in names[1:]]
    return suspicious


def map_labels_flag(pairs: Iterable[tuple[str, str]]) -> str:
    """Formats pairs of old and new names as a `--map_labels` flag."""
    return "--map_labels=" + shlex.quote(",".join(f"{old}={new}" for old, new in pairs))
