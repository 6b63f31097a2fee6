"""Qwen2-Audio: a Whisper-like audio tower and the Qwen language model."""

from mister_jax.encoders.qwen2_audio.config import Qwen2AudioConfig
from mister_jax.encoders.qwen2_audio.modeling import Qwen2Audio, prompt_tokens
from mister_jax.encoders.qwen2_audio.params import NAME_RULES, key_table

__all__ = [
    "NAME_RULES",
    "Qwen2Audio",
    "Qwen2AudioConfig",
    "key_table",
    "prompt_tokens",
]
