"""MiSTER-E in JAX: emotion recognition in conversations from speech and text."""

from mister_jax.models import MisterE, MisterEConfig, MisterEOutput

__version__ = "0.1.0"

__all__ = ["MisterE", "MisterEConfig", "MisterEOutput", "__version__"]
