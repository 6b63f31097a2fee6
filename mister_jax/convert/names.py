"""Tensor names: which tensors of a checkpoint or an adapter belong to the backbone.

Key tables hold the names of the bare backbone. A task model stores the same tensors under a prefix
and adds a head beside them. `NameRules` describes these variants once per architecture, for
checkpoints and for adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from absl import logging
from flax import nnx

from mister_jax.convert.key_table import KeyTable, Tensor, load_params, summarize
from mister_jax.convert.safetensors import Checkpoint


@dataclasses.dataclass(frozen=True)
class NameRules:
    """How the tensor names of an architecture vary between files.

    Attributes:
      prefixes: Prefixes of the backbone's names, "" for the bare model. A file is written with the
        first.
      renamed: Regular expressions of alternative spellings and their replacements, which give the
        spelling of the key table.
      unused: Regular expressions of backbone tensors, without the prefix, that the module does not
        need.
      heads: Regular expressions of tensors beside a backbone that has no prefix. Beside a backbone
        with a prefix, every other tensor belongs to the head.
      module_names: Regular expressions of names in the key table and their replacements, which
        give the module's name in transformers where files spell it differently.
      lora_bypassed: Regular expressions of modules whose weights transformers reads without
        calling the module, so that LoRA of `peft` has no effect there.
    """

    prefixes: tuple[str, ...] = ("",)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    module_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lora_bypassed: tuple[str, ...] = ()

    def canonical(self, name: str) -> str:
        """Returns a file's name in the spelling of the key table, the prefix kept."""
        return _substitute(self.renamed, name)

    def module_name(self, name: str) -> str:
        """Returns the name in transformers of a module in the key table."""
        return _substitute(self.module_names, name)

    def bypasses_lora(self, module_name: str) -> bool:
        """Returns whether LoRA of `peft` has no effect on a module."""
        return _matches(self.lora_bypassed, module_name)


@dataclasses.dataclass(frozen=True)
class SplitCheckpoint:
    """A checkpoint by its parts.

    Attributes:
      prefix: Prefix of the backbone's names.
      backbone: Tensors of the backbone, prefix included.
      unused: Tensors of the backbone that the module does not need.
      head: Tensors beside the backbone.
    """

    prefix: str
    backbone: Checkpoint
    unused: Checkpoint
    head: Checkpoint


def split_checkpoint(
    checkpoint: Mapping[str, Tensor], rules: NameRules, expected: Collection[str], *, root: str = ""
) -> SplitCheckpoint:
    """Splits a checkpoint into backbone and head.

    The prefix is the one under which most of the expected names are. Where none of them is, no
    tensor is taken for a head because of its prefix, so that all can be reported.

    Args:
      checkpoint: Checkpoint or adapter.
      rules: ShardingRules of the architecture.
      expected: Tensor names of the bare backbone.
      root: Prefix of all names, that of the backbone included, such as "base_model.model.".
    """
    tensors = {
        root + rules.canonical(name.removeprefix(root)) if name.startswith(root) else name: tensor
        for name, tensor in checkpoint.items()
    }
    matches = {
        prefix: sum(f"{root}{prefix}{name}" in tensors for name in expected)
        for prefix in rules.prefixes
    }
    best = max(rules.prefixes, key=lambda prefix: matches[prefix])
    prefix = f"{root}{best}"
    only_prefixed = bool(best) and matches[best] > 0

    def part(name: str) -> str:
        bare = name.removeprefix(prefix)
        if only_prefixed and not name.startswith(prefix):
            return "head"
        if not only_prefixed and _matches(rules.heads, name.removeprefix(root)):
            return "head"
        return "unused" if _matches(rules.unused, bare) else "backbone"

    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "unused": {}, "head": {}}
    for name, tensor in tensors.items():
        parts[part(name)][name] = tensor
    path = getattr(checkpoint, "path", pathlib.Path("weights"))
    return SplitCheckpoint(prefix, **{kind: Checkpoint(path, parts[kind]) for kind in parts})


def load_backbone(
    module: nnx.Module,
    table: KeyTable,
    checkpoint: Mapping[str, Tensor],
    rules: NameRules,
    **options: Any,
) -> Checkpoint:
    """Fills a module from the backbone of a checkpoint and logs the head that it ignores.

    Args:
      module: Module, see `load_params`.
      table: Key table with the names of the bare backbone.
      checkpoint: Checkpoint of the bare backbone or of a task model.
      rules: ShardingRules of the architecture.
      **options: Further arguments of `load_params`.

    Returns:
      The tensors of the head, still in their file.

    Raises:
      InputError: Tensors of the backbone are missing, surplus, misshapen or not finite.
    """
    expected = [name for source in table.values() for name in source.names]
    parts = split_checkpoint(checkpoint, rules, expected)
    load_params(module, table, parts.backbone, prefix=parts.prefix, **options)
    log_ignored(parts.head.path, tuple(parts.head), "the head")
    return parts.head


@functools.cache  # A file that is read several times is reported once.
def log_ignored(where: pathlib.Path, names: tuple[str, ...], part: str) -> None:
    """Logs once that tensors are ignored.

    Args:
      where: File of the tensors.
      names: Tensor names; nothing is logged if there are none.
      part: What the tensors belong to.
    """
    if names:
        count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
        logging.info("%s: ignored %s (%s): %s", where, part, count, summarize(names))


def _substitute(replacements: Mapping[str, str], name: str) -> str:
    for pattern, replacement in replacements.items():
        name = re.sub(pattern, replacement, name)
    return name


def _matches(patterns: Collection[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
