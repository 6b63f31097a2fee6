"""Extracts features from a dataset, like `mister-jax extract`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("extract")
