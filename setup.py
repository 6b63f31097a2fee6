"""Adds the top-level configs to the packages that setup.cfg cannot list together."""

from setuptools import find_packages, setup

# configs/ stays at the top level of a checkout and is installed as mister_jax.configs.
setup(packages=[*find_packages(include=["mister_jax", "mister_jax.*"]), "mister_jax.configs"])
