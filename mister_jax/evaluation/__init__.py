"""Evaluates models: scores, studies, sweeps, comparisons of runs, figures and HTML reports."""

from mister_jax.errors import require_extra

require_extra("train", "mister_jax.evaluation")
