"""Reusable layers that do not depend on the rest of the package; layers over sequences take masks.

The results for one example do not depend on the other examples in the batch. Sizes are named
`*_dim`, except in `LoRALinear`, which has the argument names of `nnx.Linear`.
"""

from mister_jax.nn.attention import CoAttentionLayer, MultiHeadAttention, dot_product_attention
from mister_jax.nn.convolution import ParallelConvolution
from mister_jax.nn.crf import ConditionalRandomField
from mister_jax.nn.dropout import Dropout, PerExampleRngs
from mister_jax.nn.initialization import initialize_like_torch
from mister_jax.nn.lora import (
    LoRAConfig,
    LoRALinear,
    QuantizedParam,
    add_lora,
    merge_lora,
    quantize,
)
from mister_jax.nn.masking import length_mask, positions_and_segment_mask
from mister_jax.nn.pooling import AttentiveStatisticsPooling, masked_mean
from mister_jax.nn.recurrent import GRU, gru_scan, run_grus
from mister_jax.nn.scanned_layers import ScannedLayers
from mister_jax.nn.stacked_modules import StackedModules

__all__ = [
    "GRU",
    "AttentiveStatisticsPooling",
    "CoAttentionLayer",
    "ConditionalRandomField",
    "Dropout",
    "LoRAConfig",
    "LoRALinear",
    "MultiHeadAttention",
    "ParallelConvolution",
    "PerExampleRngs",
    "QuantizedParam",
    "ScannedLayers",
    "StackedModules",
    "add_lora",
    "dot_product_attention",
    "gru_scan",
    "initialize_like_torch",
    "length_mask",
    "masked_mean",
    "merge_lora",
    "positions_and_segment_mask",
    "quantize",
    "run_grus",
]
