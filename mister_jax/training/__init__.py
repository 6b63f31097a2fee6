"""Training loop, training and evaluation steps, metric files and curves."""

from mister_jax.errors import require_extra

require_extra("train", "mister_jax.training")
