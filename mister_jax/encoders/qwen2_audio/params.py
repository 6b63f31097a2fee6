"""Key table and name rules of Qwen2-Audio checkpoints, for `Qwen2Audio`."""

from __future__ import annotations

import dataclasses

from mister_jax.convert import decoder
from mister_jax.convert.key_table import KeyTable, Source
from mister_jax.convert.names import NameRules
from mister_jax.encoders import whisper
from mister_jax.encoders.qwen2_audio.config import Qwen2AudioConfig

NAME_RULES = NameRules(
    prefixes=("", "model."),
    # The modules of transformers 5 are `language_model.layers`, those of released checkpoints and
    # of transformers 4 `language_model.model.layers`.
    renamed={r"^(model\.)?language_model\.(?!model\.|lm_head\.)": r"\1language_model.model."},
    unused=decoder.NAME_RULES.unused,
    heads=(r"^(language_model\.)?lm_head\.",),
    module_names={r"^language_model\.model\.": "language_model."},
)
"""Variants of the tensor names."""


def key_table(config: Qwen2AudioConfig) -> KeyTable:
    """Returns the tensor names of a released checkpoint for each parameter of a `Qwen2Audio`."""
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
