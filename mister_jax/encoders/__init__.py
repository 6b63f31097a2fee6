"""Text and speech encoders; `registry` loads and saves those in the Hugging Face layout."""

import os

from mister_jax.errors import require_extra

require_extra("encoders", "mister_jax.encoders")

# mister_jax uses only the tokenizers and feature extractors of transformers. This variable hides
# the advice of transformers to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
