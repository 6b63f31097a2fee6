"""Generates a synthetic speech corpus, for which the Bayes classifier is known.

An utterance's emotion determines the distributions of its speaking style (Gaussian pitch, loudness,
tempo and brightness) and of its words. `voice` renders the style as meaningless syllables, and
sentence templates turn the words into text. All other properties, such as the vowels, the template
and the duration, are independent of the emotion, so the posterior of the emotions can be computed;
see `mister_jax.data.dialogue_process`.
"""

from mister_jax.data.synthetic_speech.writer import (
    DEFAULT_NUM_DIALOGUES,
    MAX_LENGTH,
    MIN_LENGTH,
    SCORES,
    write_speech_corpus,
)

__all__ = ["DEFAULT_NUM_DIALOGUES", "MAX_LENGTH", "MIN_LENGTH", "SCORES", "write_speech_corpus"]
