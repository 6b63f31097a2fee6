"""Pretrained text and speech encoders; `registry` lists, loads and saves them."""
