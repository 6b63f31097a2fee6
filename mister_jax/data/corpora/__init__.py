"""Corpus readers, with one module per corpus. `registry` lists the released corpora."""
