"""Compares variants of MiSTER-E, like `mister-jax ablate`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("ablate")
