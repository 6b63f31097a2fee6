"""Imports utterance features from files of other programs, and exports them."""

from mister_jax.data.feature_files.npz import read_npz

__all__ = ["read_npz"]
