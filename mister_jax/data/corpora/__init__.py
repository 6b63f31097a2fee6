"""Readers of the supported corpora, a module for each; `registry` lists the released ones."""
