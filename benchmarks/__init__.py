"""Benchmarks for MiSTER-E, its encoders and the preparation of corpora.

`mister-jax benchmark` runs `benchmarks.cli` in a checkout of the project. Only `--training` needs a
dataset; other inputs are random.
"""
