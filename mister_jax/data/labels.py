"""Checks of labels: the range of scores, and class names that look like mistakes."""

import collections
import shlex
from collections.abc import Iterable, Mapping

MIN_SCORE, MAX_SCORE = -3.0, 3.0
"""Range of a sentiment score, as in CMU-MOSI and CMU-MOSEI."""

_PLACEHOLDERS = ("nan", "none", "null", "n/a", "na", "<na>", "unknown", "")
"""Names that programs write for a missing label."""


def suspicious_labels(counts: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Returns class names that look like spellings of another name or of a missing value.

    Returns:
        For each suspicious name: the name, the problem, and the correct name, which is empty for an
        unlabeled utterance. Spellings are compared without case, spaces, hyphens and underscores.
        The most frequent spelling is correct; among equally frequent ones, the lower-case one.
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
    """Returns the flag `--map_labels` for pairs of old and new names."""
    return "--map_labels=" + shlex.quote(",".join(f"{old}={new}" for old, new in pairs))
