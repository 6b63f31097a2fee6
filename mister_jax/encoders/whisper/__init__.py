"""Whisper's encoder, with one vector per 20 ms of a clip of up to 30 s."""

from mister_jax.encoders.whisper.config import WhisperConfig
from mister_jax.encoders.whisper.modeling import Whisper
from mister_jax.encoders.whisper.params import NAME_RULES, key_table

__all__ = [
    "NAME_RULES",
    "Whisper",
    "WhisperConfig",
    "key_table",
]
