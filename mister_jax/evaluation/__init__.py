"""Evaluation: scores, missing-modality study, ablation, figures and the HTML report."""
