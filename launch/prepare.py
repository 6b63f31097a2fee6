"""Prepares a dataset, the same as `mister-jax prepare`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("prepare")
