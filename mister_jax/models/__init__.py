"""MiSTER-E, and the utterance models that produce its input vectors."""

from mister_jax.models.config import EXPERTS, MisterEConfig
from mister_jax.models.experts import ContextExpert, CrossModalExpert, apply_context_experts
from mister_jax.models.gate import Gate
from mister_jax.models.mister_e import MisterE, MisterEOutput, MisterEState
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
    "MisterEState",
    "SpeechUtterance",
    "TextUtterance",
    "UtteranceConfig",
    "UtteranceHead",
    "UtteranceOutput",
    "apply_context_experts",
]
