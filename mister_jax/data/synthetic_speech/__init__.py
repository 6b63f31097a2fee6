"""A synthetic speech corpus: recordings and transcripts whose best possible scores are known.

The emotion of an utterance determines the distributions of its speaking style (Gaussian pitch,
loudness, tempo and brightness) and of its words. `voice` turns the style into meaningless
syllables, and sentence templates turn the words into text. Everything else, such as the vowels, the
template and the duration, is independent of the emotion, so the posterior of the emotions can be
computed, see `mister_jax.data.dialogue_process`.
"""

from mister_jax.data.synthetic_speech.writer import (
    DEFAULT_NUM_DIALOGUES,
    MAX_LENGTH,
    MIN_LENGTH,
    SCORES,
    write_speech_corpus,
)

__all__ = ["DEFAULT_NUM_DIALOGUES", "MAX_LENGTH", "MIN_LENGTH", "SCORES", "write_speech_corpus"]
