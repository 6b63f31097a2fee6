"""wav2vec 2.0, HuBERT and WavLM: speech encoders with one vector per 20 ms of audio."""

from mister_jax.encoders.wavlm.config import WavLMConfig
from mister_jax.encoders.wavlm.modeling import WavLM
from mister_jax.encoders.wavlm.params import NAME_RULES, WAVLM_NAME_RULES, key_table

__all__ = [
    "NAME_RULES",
    "WAVLM_NAME_RULES",
    "WavLM",
    "WavLMConfig",
    "key_table",
]
