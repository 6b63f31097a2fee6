"""SALMONN: Whisper and BEATs, a window-level Q-Former and the Vicuna language model."""

from mister_jax.encoders.salmonn.config import QFormerConfig, SalmonnConfig
from mister_jax.encoders.salmonn.modeling import Salmonn, WindowQFormer, prompt_tokens
from mister_jax.encoders.salmonn.params import (
    PREFIX,
    TRAINED_PARAMS,
    key_table,
    load_salmonn,
    read_sizes,
)

__all__ = [
    "PREFIX",
    "TRAINED_PARAMS",
    "QFormerConfig",
    "Salmonn",
    "SalmonnConfig",
    "WindowQFormer",
    "key_table",
    "load_salmonn",
    "prompt_tokens",
    "read_sizes",
]
