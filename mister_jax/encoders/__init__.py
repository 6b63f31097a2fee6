"""Pretrained text and speech encoders; `registry` lists, loads and saves them."""

from mister_jax.errors import require_extra

require_extra("encoders", "mister_jax.encoders")
