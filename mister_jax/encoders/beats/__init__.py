"""BEATs: an encoder of general audio, used by SALMONN."""

from mister_jax.encoders.beats.config import BeatsConfig
from mister_jax.encoders.beats.modeling import Beats, batch_token_mask, compute_fbank
from mister_jax.encoders.beats.params import IGNORED, key_table

__all__ = [
    "IGNORED",
    "Beats",
    "BeatsConfig",
    "batch_token_mask",
    "compute_fbank",
    "key_table",
]
