"""Exports a model or a fine-tuned encoder, like `mister-jax export`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("export")
