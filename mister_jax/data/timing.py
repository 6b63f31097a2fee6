"""Plausible speaking rates, and the tolerance for utterances that end after the recording."""

import re

_MAX_LETTERS_PER_SECOND = 40.0  # fast speech reaches about 25

# A Chinese character or a Korean block is a syllable. A Japanese character is one mora or more.
# Fluent Mandarin has 5 to 8 characters per second. Pellegrino et al. (2011, "A cross-language
# perspective on speech information rate") measured 5.2 syllables per second in Mandarin, 6.2 in
# English and 7.8 in Japanese. An English syllable has about three letters, including spaces.
_SYLLABIC = re.compile(
    "[\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)
_LETTERS_PER_SYLLABLE = 3

END_TOLERANCE = 0.5
"""Seconds by which an annotation may exceed the end of its recording without being reported."""

# A recording's length does not match its annotation if the difference exceeds both this number of
# seconds and this fraction of the annotated length.
_MISMATCH_SECONDS, _MISMATCH_FRACTION = 1.0, 0.5


def is_length_mismatch(seconds: float, annotated_seconds: float) -> bool:
    """Returns whether a recording's length differs greatly from its annotated length."""
    tolerance = max(_MISMATCH_SECONDS, _MISMATCH_FRACTION * annotated_seconds)
    return abs(seconds - annotated_seconds) > tolerance


def max_characters_per_second(text: str) -> float:
    """Returns the highest plausible speaking rate of a text, in characters per second.

    The rate is lower for Chinese, Japanese and Korean characters than for letters.
    """
    num_syllabic = len(_SYLLABIC.findall(text))
    num_letters = len(text) + (_LETTERS_PER_SYLLABLE - 1) * num_syllabic
    return _MAX_LETTERS_PER_SECOND * len(text) / max(num_letters, 1)


def is_too_fast(text: str, seconds: float) -> bool:
    """Returns whether a text has too many characters to be spoken in this number of seconds."""
    return len(text) > max_characters_per_second(text) * seconds
