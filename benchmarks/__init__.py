"""Performance measurements of MiSTER-E, its encoders and the preparation of a corpus.

They need a checkout of the project but no dataset: inputs are random. `mister-jax benchmark` runs
`benchmarks.cli`.
"""
