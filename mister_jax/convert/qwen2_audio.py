"""Tensors of Qwen2-Audio checkpoints in transformers' form as parameters of a `Qwen2Audio`."""

from __future__ import annotations

import dataclasses

from mister_jax.convert import decoder, whisper
from mister_jax.convert.key_table import KeyTable, Source
from mister_jax.encoders.qwen2_audio import Qwen2AudioConfig

# Tensors that a `Qwen2Audio` has no use for.
IGNORED = decoder.IGNORED


def key_table(config: Qwen2AudioConfig) -> KeyTable:
    """Tensor names of a released checkpoint for each parameter of a `Qwen2Audio`."""
    table = {
        "projection/kernel": Source(("multi_modal_projector.linear.weight",), axes=(1, 0)),
        "projection/bias": Source(("multi_modal_projector.linear.bias",)),
    }
    for path, source in whisper.key_table(config.tower).items():
        names = tuple(f"audio_tower.{name.removeprefix('encoder.')}" for name in source.names)
        table[f"tower/{path}"] = dataclasses.replace(source, names=names)
    for path, source in decoder.key_table(config.decoder, "language_model.model.").items():
        table[f"decoder/{path}"] = source
    return table
