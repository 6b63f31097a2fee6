"""Compares the predictions of runs, like `mister-jax compare`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("compare")
