"""Tiny encoders and the feature datasets of two of them."""

import pytest

from mister_jax import extraction
from tests.helpers.tiny_encoders import WAVLM_CONFIG, save_encoder
from tests.helpers.utterances import SECONDS, SPEECH


@pytest.fixture(scope="module")
def prosody_encoder():
    return extraction.ProsodyEncoder(max_seconds=0.5)


@pytest.fixture(scope="module")
def whisper_encoder(whisper_folder):
    return extraction.load_encoder(str(whisper_folder), max_seconds=SECONDS)


@pytest.fixture(scope="module")
def bert_encoder(bert_folder):
    return extraction.load_encoder(str(bert_folder), max_tokens=12)


@pytest.fixture(scope="module")
def llama_encoder(llama_folder):
    return extraction.load_encoder(str(llama_folder), max_tokens=12)


@pytest.fixture(scope="module")
def wavlm_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_wavlm")
    save_encoder(folder, WAVLM_CONFIG)
    return extraction.load_encoder(str(folder), max_seconds=SECONDS)


@pytest.fixture(scope="module")
def qwen_encoder(qwen_folder):
    return extraction.load_encoder(str(qwen_folder), max_seconds=SECONDS)


@pytest.fixture(scope="module")
def salmonn_encoder(salmonn_options):
    return extraction.load_encoder(**salmonn_options, max_seconds=SECONDS)


@pytest.fixture(scope="module")
def speech_dataset(prosody_encoder, heard_dir):
    """Returns the name of a dataset with prosody features."""
    extraction.extract_features(prosody_encoder, SPEECH, "prosodic", heard_dir, quiet=True)
    return "prosodic"


@pytest.fixture(scope="module")
def text_dataset(bert_encoder, heard_dir):
    """Returns the name of a dataset with text features of the same utterances."""
    extraction.extract_features(bert_encoder, SPEECH, "written", heard_dir, quiet=True)
    return "written"
