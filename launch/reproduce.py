"""Reproduces the paper, like `mister-jax reproduce`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("reproduce")
