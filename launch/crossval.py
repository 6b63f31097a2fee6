"""Cross-validates MiSTER-E, like `mister-jax crossval`."""

from mister_jax.cli.main import main

if __name__ == "__main__":
    main("crossval")
