"""Layers for anyone's JAX code: masked, batch-invariant, and free of the rest of the project."""

from mister_jax.nn.attention import CoAttentionLayer, MultiHeadAttention
from mister_jax.nn.convolution import ParallelConvolution
from mister_jax.nn.dropout import DialogueKeys, Dropout
from mister_jax.nn.pooling import AttentiveStatisticsPooling, masked_mean
from mister_jax.nn.recurrent import GRU, gru_scan, run_together
from mister_jax.nn.stack import Stack

__all__ = [
    "GRU",
    "AttentiveStatisticsPooling",
    "CoAttentionLayer",
    "DialogueKeys",
    "Dropout",
    "MultiHeadAttention",
    "ParallelConvolution",
    "Stack",
    "gru_scan",
    "masked_mean",
    "run_together",
]
