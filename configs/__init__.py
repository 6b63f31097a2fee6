"""Experiment configs (`ml_collections`); each module has a function `get_config`."""
