"""Inference: predictions from a trained work directory, without any training code."""

from mister_jax.errors import require_extra

require_extra("predict", "mister_jax.inference")
