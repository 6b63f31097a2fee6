"""Measures speed and memory, like `mister-jax benchmark`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("benchmark")
