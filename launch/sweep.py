"""Sweeps hyperparameters, like `mister-jax sweep`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("sweep")
