"""Scores a trained work directory, like `mister-jax evaluate`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("evaluate")
