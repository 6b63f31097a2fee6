"""The models that are trained."""

from mister_jax.models.mister_e import (
    EXPERTS,
    ContextExpert,
    CrossModalExpert,
    Gate,
    MisterE,
    MisterEConfig,
    MisterEOutput,
)

__all__ = [
    "EXPERTS",
    "ContextExpert",
    "CrossModalExpert",
    "Gate",
    "MisterE",
    "MisterEConfig",
    "MisterEOutput",
]
