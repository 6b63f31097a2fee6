"""MiSTER-E in JAX: emotion recognition in conversations from speech and text."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mister_jax.inference.recognizer import EmotionRecognizer, load
    from mister_jax.models import MisterE, MisterEConfig, MisterEOutput

__version__ = "0.1.0"

__all__ = ["EmotionRecognizer", "MisterE", "MisterEConfig", "MisterEOutput", "__version__", "load"]

# Each name is imported on first use, because the recognizer needs more packages than the model,
# which needs only JAX and Flax.
_MODULES = {
    "EmotionRecognizer": "mister_jax.inference.recognizer",
    "MisterE": "mister_jax.models",
    "MisterEConfig": "mister_jax.models",
    "MisterEOutput": "mister_jax.models",
    "load": "mister_jax.inference.recognizer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
