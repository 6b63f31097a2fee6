"""Evaluation: scores, missing-modality study, ablation, figures and the HTML report."""

from mister_jax.errors import require_extra

require_extra("train", "mister_jax.evaluation")
