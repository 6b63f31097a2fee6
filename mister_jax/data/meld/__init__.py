"""MELD: scenes from a television series, seven emotions (arXiv 1810.02508)."""
