"""Tiny datasets of recordings and texts that an encoder learns in seconds."""

import json

import numpy as np

from mister_jax.data.audio import encode_wav
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus

EMOTION_WORDS = {"joy": ("glad", "happy"), "anger": ("angry", "mad")}
NEUTRAL_WORDS = ("i", "am", "so", "very", "today", "you", "are", "we")
PITCH_HERTZ = {"joy": 2000, "anger": 300}


def write_manifest(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare_manifest(path, data_dir):
    """Prepares the dataset `manifest/NAME` from a manifest file NAME.jsonl."""
    prepare_corpus(PrepareOptions("manifest", path, data_dir, decoding=DecodingOptions(0)))


def write_spoken(folder):
    """Writes the dataset `manifest/spoken`: four turns per dialogue; the words show the emotion.

    Every third dialogue has no text in the third turn and no label in the fourth turn.
    """
    encode_wav(folder / "noise.wav", np.arange(800, dtype=np.int16))
    random = np.random.default_rng(0)
    rows = []
    for split, count in {"train": 36, "validation": 6, "test": 6}.items():
        for dialogue in range(count):
            for turn in range(4):
                row = {"dialogue": f"{split}{dialogue}", "utterance": turn, "order": turn}
                row |= {"split": split, "audio": "noise.wav", "audio_start": 0}
                label = random.choice(list(EMOTION_WORDS))
                words = [
                    random.choice(EMOTION_WORDS[label]),
                    *random.choice(NEUTRAL_WORDS, 1 + turn),
                ]
                if dialogue % 3 or turn != 2:
                    row["text"] = " ".join(random.permutation(words))
                if dialogue % 3 or turn != 3:
                    row["label"] = str(label)
                rows.append(row)
    prepare_manifest(write_manifest(folder / "spoken.jsonl", rows), folder / "data")


def write_heard(folder):
    """Writes the dataset `manifest/heard`: three turns per dialogue; the pitch shows the emotion.

    Every third dialogue has a silent second turn and no recording of the third turn.
    """
    random = np.random.default_rng(0)
    rows = []
    for split, count in {"train": 24, "validation": 6, "test": 6}.items():
        for dialogue in range(count):
            for turn in range(3):
                label = random.choice(list(EMOTION_WORDS))
                seconds = random.uniform(0.2, 0.7)
                time = np.arange(int(16_000 * seconds)) / 16_000
                tone = 8000 * np.sin(2 * np.pi * PITCH_HERTZ[label] * time)
                samples = tone + random.normal(0, 500, time.size)
                if dialogue % 3 == 0 and turn == 1:
                    samples[:] = 0
                name = f"{split}{dialogue}_{turn}.wav"
                encode_wav(folder / name, samples.astype(np.int16))
                row = {"dialogue": f"{split}{dialogue}", "utterance": turn, "order": turn}
                row |= {"split": split, "text": " ".join(random.choice(NEUTRAL_WORDS, 2))}
                row |= {"label": str(label)}
                if dialogue % 3 or turn != 2:
                    row["audio"] = name
                rows.append(row)
    prepare_manifest(write_manifest(folder / "heard.jsonl", rows), folder / "data")
