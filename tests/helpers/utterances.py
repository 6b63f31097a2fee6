"""Utterances that the extraction tests encode."""

import numpy as np

SPEECH, TEXT = "manifest/heard", "manifest/spoken"
SECONDS = 0.8
"""Window of the tiny Whisper."""


def make_clips():
    random = np.random.default_rng(0)
    lengths = (9000, 400, 12_800, 3000, 1700, 8000, 5000, 12_000, 640, 7777)
    return [random.normal(0, 3000, length).astype(np.int16) for length in lengths]


def make_texts():
    return ["i am so happy", "you", "we are very mad today", "so so so so so", "glad i am"] * 3
