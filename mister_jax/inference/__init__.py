"""Inference: predictions from a trained work directory, without any training code."""
