"""Benchmarks for MiSTER-E, its encoders and the preparation of corpora.

`mister-jax benchmark` runs `benchmarks.cli` in a checkout of the project. `--training` and `--set`
need a dataset, and `--recording` needs a recording. All other inputs are random by default.
"""
