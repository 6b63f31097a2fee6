"""Entry point of `mister-jax` and of the scripts in `launch/`, with few imports."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pathlib
import sys

import mister_jax
from mister_jax.errors import InputError, MissingExtraError, require_extra

# Maps each subcommand to the extra that it needs and to a description.
SUBCOMMANDS = {
    "prepare": ("train", "Prepare a dataset from a corpus, a manifest or feature files."),
    "extract": ("train", "Extract features from a dataset with an encoder."),
    "train": ("train", "Train MiSTER-E or an encoder with a config."),
    "evaluate": ("train", "Score a trained work directory on a split."),
    "reproduce": ("train", "Reproduce the paper's results on a corpus, with one command."),
    "crossval": ("train", "Train and score one model per speaker, session or other fold."),
    "compare": ("train", "Compare the predictions of two or more runs."),
    "sweep": ("train", "Train a grid of hyperparameters and rank the points by validation."),
    "ablate": ("train", "Compare variants of MiSTER-E."),
    "predict": ("predict", "Predict the emotions of recordings and texts."),
    "export": ("predict", "Export a model as a folder, or an encoder for transformers or peft."),
    "benchmark": ("train", "Measure speed and memory (from a checkout)."),
}


_USAGE = """Emotion recognition in conversations with MiSTER-E in JAX.

usage: mister-jax SUBCOMMAND --FLAG=VALUE ...

subcommands:
{subcommands}

`mister-jax SUBCOMMAND --help` describes the flags of a subcommand."""


def main(subcommand: str | None = None) -> None:
    """Runs the given subcommand, or the command line's subcommand, and exits with its status."""
    arguments = sys.argv[1:]
    if subcommand is None:
        subcommand, arguments = _read_subcommand(arguments)
    _set_environment()
    # JAX and TensorFlow create so many long-lived objects that garbage collections at Python's
    # default thresholds take a second of a short training. A collection at exit would take up to a
    # second more; after `gc.freeze`, it has nothing to do.
    gc.set_threshold(20_000, 20, 50)
    atexit.register(gc.freeze)
    try:
        require_extra(SUBCOMMANDS[subcommand][0], f"mister-jax {subcommand}")
        module = importlib.import_module(f"mister_jax.cli.{subcommand}")
        from mister_jax.cli import app
    except (InputError, MissingExtraError) as error:
        _fail(str(error))
    sys.argv = [f"mister-jax {subcommand}", *arguments]
    app.run(module)


def _read_subcommand(arguments: list[str]) -> tuple[str, list[str]]:
    if not arguments or arguments[0] in ("-h", "-help", "--help", "help"):
        lines = (f"  {name:<10} {summary}" for name, (_, summary) in SUBCOMMANDS.items())
        print(_USAGE.format(subcommands="\n".join(lines)))
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"mister_jax {mister_jax.__version__}")
        sys.exit(0)
    if arguments[0] not in SUBCOMMANDS:
        _fail(f"unknown subcommand {arguments[0]!r}; allowed: {', '.join(SUBCOMMANDS)}")
    return arguments[0], arguments[1:]


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _set_environment() -> None:
    """Configures TensorFlow and, if a cache folder can be created, JAX's compilation cache."""
    # Importing TensorFlow without Keras 3 saves 2 s and 100 MB. No Keras model is used.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    with contextlib.suppress(OSError, RuntimeError):
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        (cache / "mister_jax").mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "mister_jax"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
