"""SALMONN: Whisper and BEATs, a window-level Q-Former, and the Vicuna language model."""

from mister_jax.encoders.salmonn.config import QFormerConfig, SalmonnConfig
from mister_jax.encoders.salmonn.modeling import Salmonn, WindowQFormer, prompt_tokens
from mister_jax.encoders.salmonn.params import TRAINED_PARAMS, PREFIX, key_table, load_salmonn

__all__ = [
    "TRAINED_PARAMS",
    "PREFIX",
    "QFormerConfig",
    "Salmonn",
    "SalmonnConfig",
    "WindowQFormer",
    "key_table",
    "load_salmonn",
    "prompt_tokens",
]
