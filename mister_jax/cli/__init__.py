"""The `mister-jax` command, with one subcommand per file."""
