"""Weights of other projects, read into ours."""
