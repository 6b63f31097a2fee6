"""A synthetic speech corpus: recordings and transcripts whose best possible scores are known.

Emotions follow a Markov chain along each dialogue, as in `mister_jax.data.synthetic`. The emotion
of an utterance determines the distributions of its speaking style (Gaussian pitch, loudness, tempo
and brightness) and of its words. A voice synthesizer turns the style into meaningless syllables,
and sentence templates turn the words into text. Everything else, such as the vowels, the template
and the duration, is independent of the emotion. So the posterior of the emotions given the styles
and the words can be computed, and no model of sound and text can be expected to score better.

`process` draws emotions, styles and sentences, `voice` synthesizes speech, and `writer` writes the
corpus.
"""

from mister_jax.data.synthetic_speech.writer import (
    DEFAULT_NUM_DIALOGUES,
    MAX_LENGTH,
    MIN_LENGTH,
    SCORES,
    write_speech_corpus,
)

__all__ = [
    "DEFAULT_NUM_DIALOGUES",
    "MAX_LENGTH",
    "MIN_LENGTH",
    "SCORES",
    "write_speech_corpus",
]
