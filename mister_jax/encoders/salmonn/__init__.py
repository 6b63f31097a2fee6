"""SALMONN: Whisper and BEATs, a window-level Q-Former, and the Vicuna language model."""

from mister_jax.encoders.salmonn.config import QFormerConfig, SalmonnConfig
from mister_jax.encoders.salmonn.modeling import Salmonn, WindowQFormer, prompt_tokens
from mister_jax.encoders.salmonn.params import LEARNED, PREFIX, key_table, load

__all__ = [
    "LEARNED",
    "PREFIX",
    "QFormerConfig",
    "Salmonn",
    "SalmonnConfig",
    "WindowQFormer",
    "key_table",
    "load",
    "prompt_tokens",
]
