"""Tiny encoders of the architectures of the preset `small`, and a runner of commands."""

import json
import os
import subprocess
import sys

import pytest

from tests.data.conftest import write_mp4, write_wav  # noqa: F401, for other fixtures
from tests.helpers.commands import REPOSITORY, CommandResult
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

# This script runs each command in a fork of a process that has imported the libraries. A command
# with a file receives SIGTERM when the file exists.
SERVER = """
import importlib, json, os, pathlib, signal, sys, threading, time
from tests.helpers import commands

for name in commands.SLOW_IMPORTS:
    importlib.import_module(name)
run = commands._run

def run_until(arguments):
    def stop():
        while not list(pathlib.Path(file).parent.glob(pathlib.Path(file).name)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if file:
        threading.Thread(target=stop, daemon=True).start()
    return run(arguments)

commands._run = run_until
for line in sys.stdin:
    arguments, file = json.loads(line)
    print(json.dumps(commands._fork(arguments)), flush=True)
"""


class CommandServer:
    """Runs `mister-jax` commands as the runner of `run_stages`.

    Attributes:
      stop_file: Pattern of a file name. The next command receives SIGTERM when such a file exists.
      results: Result of each command.
    """

    def __init__(self):
        self.stop_file = ""
        self.results = []
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
                "COLUMNS": "200",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, arguments):
        self._process.stdin.write(json.dumps([[*arguments], self.stop_file]) + "\n")
        self._process.stdin.flush()
        self.stop_file = ""
        result = CommandResult(*json.loads(self._process.stdout.readline()))
        self.results.append(result)
        return result.status

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture(scope="session")
def command_server():
    server = CommandServer()
    yield server
    server.close()


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
