"""Experiments as `ml_collections` configs; each module has a function `get_config`."""
