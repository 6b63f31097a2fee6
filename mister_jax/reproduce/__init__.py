"""Reproduction of the paper: all stages from a released corpus to the table of scores."""
