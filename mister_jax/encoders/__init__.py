"""Pretrained text and speech encoders; `registry` lists, loads and saves them."""

import os

from mister_jax.errors import require_extra

require_extra("encoders", "mister_jax.encoders")

# transformers is used for its tokenizers; this silences its advice to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
