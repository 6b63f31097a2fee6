"""Prepares a dataset, like `mister-jax prepare`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("prepare")
