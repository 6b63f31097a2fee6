"""A recognizer with two encoders, and the dialogues it reads."""

import numpy as np
import pytest

import mister_jax
from mister_jax import extraction
from mister_jax.data.audio import encode_wav
from mister_jax.data.dialogues import DialogueDataset
from tests.helpers.tiny_datasets import NEUTRAL_WORDS, prepare_manifest, write_manifest
from tests.helpers.training import ALL_LAYERS, write_untrained_workdir


@pytest.fixture(scope="package")
def calls_dir(tmp_path_factory, bert_folder):
    """A folder with the dataset `manifest/calls` and its features `both`."""
    root = tmp_path_factory.mktemp("calls")
    random = np.random.default_rng(0)
    rows = []
    for dialogue, (split, length) in enumerate(
        (("train", 2), ("validation", 1), ("test", 3), ("test", 1), ("test", 5))
    ):
        for turn in range(length):
            row = {"dialogue": dialogue, "utterance": turn, "order": turn, "split": split}
            row["label"] = ("calm", "angry")[turn % 2]
            if turn == 0:
                row["room"] = f"r{dialogue}"
            if turn != 2:
                row["audio"] = f"{dialogue}_{turn}.wav"
                samples = 3000 * random.normal(size=3200 + 800 * turn)
                encode_wav(root / row["audio"], samples.astype(np.int16))
            if turn != 1:
                row["text"] = " ".join(random.choice(NEUTRAL_WORDS, 1 + turn))
            rows.append(row)
    data_dir = root / "data"
    prepare_manifest(write_manifest(root / "calls.jsonl", rows), data_dir)
    encoders = {
        "text_alone": extraction.PretrainedText(str(bert_folder), max_tokens=20),
        "speech_alone": extraction.ProsodyEncoder(),
    }
    for name, encoder in encoders.items():
        extraction.extract_features(encoder, "manifest/calls", name, data_dir, quiet=True)
    extraction.merge_features("speech_alone", "text_alone", "both", data_dir)
    return data_dir


@pytest.fixture(scope="package")
def workdir(calls_dir, tmp_path_factory):
    """A work directory of an untrained MiSTER-E on the features `both`."""
    folder = tmp_path_factory.mktemp("workdir") / "run"
    return write_untrained_workdir(folder, calls_dir, "both", **ALL_LAYERS)


@pytest.fixture(scope="package")
def recognizer(workdir):
    return mister_jax.load(workdir)


@pytest.fixture(scope="package")
def dialogues(calls_dir):
    """The test dialogues as inputs of `predict_dialogues`."""
    return [
        [
            ({"text": turn.text} if turn.text_present else {})
            | ({"audio": turn.audio} if turn.speech_present else {})
            for turn in dialogue.utterances
        ]
        for dialogue in DialogueDataset("manifest/calls", calls_dir).dialogues("test")
    ]
