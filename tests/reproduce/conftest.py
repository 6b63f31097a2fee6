"""Tiny encoders with the architectures of the preset `small`, and a runner of commands."""

import pytest

from tests.data.conftest import write_mp4, write_wav  # noqa: F401, fixtures of the tests
from tests.helpers.commands import run_command
from tests.helpers.tiny_encoders import WAVLM_CONFIG, make_word_tokenizer, save_encoder

ROBERTA_CONFIG = {
    "model_type": "roberta",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
}


class CommandRunner:
    """Runner for `run_stages` that runs `mister-jax` commands and keeps their results.

    Attributes:
      stop_file: See `run_command`; applies only to the next command.
      results: Result of each command.
    """

    def __init__(self):
        self.stop_file = ""
        self.results = []

    def __call__(self, arguments):
        result = run_command(arguments, stop_file=self.stop_file)
        self.stop_file = ""
        self.results.append(result)
        return result.status


@pytest.fixture(scope="session")
def command_runner():
    return CommandRunner()


@pytest.fixture(scope="session")
def small_encoders(tmp_path_factory):
    """Encoders with the architectures of preset `small`, and options for short training runs."""
    folder = tmp_path_factory.mktemp("encoders")
    tokenizer = make_word_tokenizer(bert=True)
    roberta, wavlm = folder / "roberta", folder / "wavlm"
    save_encoder(roberta, {**ROBERTA_CONFIG, "vocab_size": len(tokenizer)}, tokenizer)
    save_encoder(wavlm, WAVLM_CONFIG)
    short = ("train.epochs=1", "data.num_buckets=1")
    small_head = ("head.feature_dim=4",)
    model = {"context_dim": 8, "fusion_dim": 8, "attention_dim": 6}
    model |= {"gru_layers": 0, "fusion_layers": 0}
    return {
        "text_encoder": str(roberta),
        "speech_encoder": str(wavlm),
        "text_options": (*short, *small_head, "encoder.options.max_tokens=12"),
        "speech_options": (*short, *small_head, "train.accumulation=1"),
        "fusion_options": (*short, *(f"model.{name}={value}" for name, value in model.items())),
    }
