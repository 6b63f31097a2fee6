"""Key table and name rules of Qwen2-Audio checkpoints."""

from __future__ import annotations

import dataclasses

from mister_jax.convert.key_table import KeyTable, NameRules, linear
from mister_jax.encoders import decoder, whisper
from mister_jax.encoders.qwen2_audio.config import Qwen2AudioConfig

NAME_RULES = NameRules(
    prefixes=("", "model."),
    # transformers 5 names its modules `language_model.layers`; released checkpoints and
    # transformers 4 have `language_model.model.layers`.
    renamed={r"^(model\.)?language_model\.(?!model\.|lm_head\.)": r"\1language_model.model."},
    unused=decoder.NAME_RULES.unused,
    heads=(r"^(language_model\.)?lm_head\.",),
    module_names={r"^language_model\.model\.": "language_model."},
)
"""Variants of the tensor names."""


def key_table(config: Qwen2AudioConfig) -> KeyTable:
    """Returns the tensor names of a released checkpoint for each parameter of a `Qwen2Audio`."""
    table = linear("projection", "multi_modal_projector.linear")
    for path, source in whisper.key_table(config.tower).items():
        names = tuple(f"audio_tower.{name.removeprefix('encoder.')}" for name in source.names)
        table[f"tower/{path}"] = dataclasses.replace(source, names=names)
    for path, source in decoder.key_table(config.decoder, "language_model.model.").items():
        table[f"decoder/{path}"] = source
    return table
