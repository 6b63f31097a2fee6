"""Checks whether the times of an utterance fit its text and its recording."""

MAX_CHARACTERS_PER_SECOND = 40.0
"""Text that would be spoken faster does not belong to its times; fast speech reaches about 25."""

END_TOLERANCE = 0.5
"""Seconds by which an annotation may exceed the end of its recording without a note."""


def is_too_fast(text: str, seconds: float) -> bool:
    """Returns whether a text has more characters than speech of this length in seconds can."""
    return len(text) > MAX_CHARACTERS_PER_SECOND * seconds
