"""Llama 2 and 3, Qwen2 and 2.5, and Vicuna: decoder-only transformers used as text encoders."""

from mister_jax.encoders.decoder.config import DecoderConfig, RopeScaling
from mister_jax.encoders.decoder.modeling import Decoder, rope_frequencies
from mister_jax.encoders.decoder.params import NAME_RULES, key_table

__all__ = [
    "NAME_RULES",
    "Decoder",
    "DecoderConfig",
    "RopeScaling",
    "key_table",
    "rope_frequencies",
]
