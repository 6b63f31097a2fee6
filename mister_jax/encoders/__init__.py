"""Ported encoders, one architecture a file, their front ends, and the hub that loads them."""
