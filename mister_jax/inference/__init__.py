"""Inference with trained models: predictions for texts and recordings, timelines and exports."""

from mister_jax.errors import require_extra

require_extra("predict", "mister_jax.inference")
