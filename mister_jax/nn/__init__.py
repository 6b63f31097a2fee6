"""Layers for anyone's JAX code: masked, batch-invariant, and free of the rest of the project."""

from mister_jax.nn.attention import CoAttentionLayer, MultiHeadAttention, dot_product_attention
from mister_jax.nn.convolution import ParallelConvolution
from mister_jax.nn.crf import ConditionalRandomField
from mister_jax.nn.dropout import Dropout, PerExampleRngs
from mister_jax.nn.lora import (
    LoRAConfig,
    LoRALinear,
    QuantizedParam,
    add_lora,
    merge_lora,
    quantize,
)
from mister_jax.nn.pooling import AttentiveStatisticsPooling, masked_mean
from mister_jax.nn.recurrent import GRU, gru_scan, run_grus
from mister_jax.nn.scanned_layers import ScannedLayers

__all__ = [
    "GRU",
    "AttentiveStatisticsPooling",
    "CoAttentionLayer",
    "ConditionalRandomField",
    "PerExampleRngs",
    "Dropout",
    "LoRAConfig",
    "LoRALinear",
    "MultiHeadAttention",
    "ParallelConvolution",
    "QuantizedParam",
    "ScannedLayers",
    "add_lora",
    "dot_product_attention",
    "gru_scan",
    "masked_mean",
    "merge_lora",
    "quantize",
    "run_grus",
]
