"""MiSTER-E in JAX: emotion recognition in conversations from speech and text."""

import importlib
from typing import Any

from mister_jax.models import MisterE, MisterEConfig, MisterEOutput

__version__ = "0.1.0"

__all__ = ["MisterE", "MisterEConfig", "MisterEOutput", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Whoever wants the model alone does not wait for all that reads and writes files.
    if name == "load":
        return importlib.import_module("mister_jax.inference.recognizer").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
