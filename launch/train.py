"""Trains a model with a config, like `mister-jax train`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("train")
