"""Predicts the emotions of recordings and texts, like `mister-jax predict`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("predict")
