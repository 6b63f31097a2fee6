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
from mister_jax.models.utterance import (
    SpeechUtterance,
    TextUtterance,
    UtteranceConfig,
    UtteranceHead,
    UtteranceOutput,
)

__all__ = [
    "EXPERTS",
    "ContextExpert",
    "CrossModalExpert",
    "Gate",
    "MisterE",
    "MisterEConfig",
    "MisterEOutput",
    "SpeechUtterance",
    "TextUtterance",
    "UtteranceConfig",
    "UtteranceHead",
    "UtteranceOutput",
]
