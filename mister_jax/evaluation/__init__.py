"""Evaluates models: scores, missing-modality study, studies, comparisons, figures and HTML report."""

from mister_jax.errors import require_extra

require_extra("train", "mister_jax.evaluation")
