"""Key tables and name rules: which tensors of a checkpoint are which parameters of a module.

An architecture has one key table, which is plain data with the tensor names of the bare backbone.
A task model stores the same tensors under a prefix and adds a head. `NameRules` describes these
variants, for checkpoints and adapters. `params.load_params` and `params.save_params` apply a table.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Collection, Mapping

import numpy as np

from mister_jax.convert.safetensors import Checkpoint, Tensor


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of one parameter.

    Attributes:
      names: Tensor names; several with `stacked`, one per layer, or with `combine`.
      axes: Permutation of each tensor's axes when it is loaded, as for `np.transpose`: (1, 0) for
        the weight of a PyTorch Linear, (2, 1, 0) for that of a Conv1d.
      stacked: Whether the values of all layers are stacked along a new leading axis L; the names
        are ordered by layer.
      combine: Function from the tensors (of one layer) to the value, for anything but a plain
        permutation: fused projections, weight normalization. It reads whole tensors.
      split: Inverse of `combine`; without it the parameter cannot be saved.
    """

    names: tuple[str, ...]
    axes: tuple[int, ...] | None = None
    stacked: bool = False
    combine: Callable[[list[np.ndarray]], np.ndarray] | None = None
    split: Callable[[np.ndarray], list[np.ndarray]] | None = None

    def __post_init__(self):
        if not self.names or (len(self.names) > 1 and not (self.stacked or self.combine)):
            raise ValueError(
                f"Source.names={self.names}; allowed: one name, or several with stacked or combine"
            )


KeyTable = Mapping[str, Source]
"""Tensors of each parameter, by the parameter's "/"-joined path in `nnx.state(module)`."""


def layer_names(pattern: str, num_layers: int) -> tuple[str, ...]:
    """Returns the names of all layers, from a pattern with `{}` for the layer number."""
    return tuple(pattern.format(layer) for layer in range(num_layers))


def parameter(name: str, num_layers: int = 0, axes: tuple[int, ...] | None = None) -> Source:
    """Returns the source of one tensor, or with `num_layers` of one tensor per layer."""
    names = layer_names(name, num_layers) if num_layers else (name,)
    return Source(names, axes, stacked=num_layers > 0)


def linear(path: str, name: str, num_layers: int = 0, *, bias: bool = True) -> dict[str, Source]:
    """Returns the key-table entries of a PyTorch Linear.

    Args:
      path: Path of the module.
      name: Name of the PyTorch layer; with `num_layers` a pattern with `{}` for the layer number.
      num_layers: Number of layers whose parameters are stacked; 0 for a single layer.
      bias: Whether the layer has a bias.
    """
    return _layer(path, "kernel", name, num_layers, bias, axes=(1, 0))


def conv(path: str, name: str, *, bias: bool = True) -> dict[str, Source]:
    """Returns the key-table entries of a PyTorch Conv1d; see `linear`."""
    return _layer(path, "kernel", name, 0, bias, axes=(2, 1, 0))


def norm(path: str, name: str, num_layers: int = 0, *, bias: bool = True) -> dict[str, Source]:
    """Returns the key-table entries of a PyTorch norm; see `linear`. An RMSNorm has no bias."""
    return _layer(path, "scale", name, num_layers, bias)


def _layer(
    path: str,
    weight: str,
    name: str,
    num_layers: int,
    bias: bool,
    axes: tuple[int, ...] | None = None,
) -> dict[str, Source]:
    table = {f"{path}/{weight}": parameter(f"{name}.weight", num_layers, axes)}
    if bias:
        table[f"{path}/bias"] = parameter(f"{name}.bias", num_layers)
    return table


def weight_norm_conv(path: str, name: str) -> dict[str, Source]:
    """Returns the key-table entries of a Conv1d under `torch.nn.utils.weight_norm` with dim=2."""
    kernel = Source(
        (f"{name}.weight_g", f"{name}.weight_v"),
        combine=_merge_weight_norm,
        split=_split_weight_norm,
    )
    return {f"{path}/kernel": kernel, f"{path}/bias": parameter(f"{name}.bias")}


def _merge_weight_norm(tensors: list[np.ndarray]) -> np.ndarray:
    """Returns the kernel [K, in, out] of a gain [1, 1, K] and a direction [out, in, K]."""
    gain, direction = (tensor.astype(np.float64) for tensor in tensors)
    length = np.sqrt((direction**2).sum((0, 1), keepdims=True))
    return (gain * direction / length).transpose(2, 1, 0).astype(tensors[1].dtype)


def _split_weight_norm(kernel: np.ndarray) -> list[np.ndarray]:
    """Returns a gain and a direction of a kernel: its norm at each position, and the kernel."""
    direction = kernel.transpose(2, 1, 0)
    gain = np.sqrt((direction.astype(np.float64) ** 2).sum((0, 1), keepdims=True))
    return [gain.astype(kernel.dtype), direction]


@dataclasses.dataclass(frozen=True)
class NameRules:
    """How the tensor names of an architecture vary between files.

    Attributes:
      prefixes: Prefixes of the backbone's names, "" for the bare model. Files are written with the
        first.
      renamed: Regular expressions of alternative spellings and their replacements, which give the
        spelling of the key table.
      unused: Regular expressions of backbone tensors, without the prefix, that the module does not
        need.
      heads: Regular expressions of head tensors beside a backbone without a prefix. Beside a
        backbone with a prefix, every other tensor belongs to the head.
      module_names: Regular expressions of names in the key table and their replacements, which
        give the module's name in transformers where files spell it differently.
      lora_bypassed: Regular expressions of modules whose weights transformers reads without
        calling the module, so a `peft` LoRA adapter has no effect there.
    """

    prefixes: tuple[str, ...] = ("",)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    module_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lora_bypassed: tuple[str, ...] = ()

    def table_name(self, name: str) -> str:
        """Converts a tensor name in a file to the key table's spelling; keeps the prefix."""
        return _substitute(self.renamed, name)

    def module_name(self, name: str) -> str:
        """Returns the name in transformers of a module in the key table."""
        return _substitute(self.module_names, name)

    def bypasses_lora(self, module_name: str) -> bool:
        """Returns whether a `peft` LoRA adapter has no effect on a module."""
        return _matches(self.lora_bypassed, module_name)


@dataclasses.dataclass(frozen=True)
class SplitCheckpoint:
    """The parts of a checkpoint; a module does not need the `unused` tensors of the backbone."""

    prefix: str
    backbone: Checkpoint
    unused: Checkpoint
    head: Checkpoint


def split_checkpoint(
    checkpoint: Mapping[str, Tensor], rules: NameRules, expected: Collection[str], *, root: str = ""
) -> SplitCheckpoint:
    """Splits a checkpoint into backbone and head.

    The prefix is the one under which the most expected names exist. If there is none, no tensor is
    taken for the head because of its prefix, so that the error can list all of them.

    Args:
      checkpoint: Checkpoint or adapter.
      rules: Name rules of the architecture.
      expected: Tensor names of the bare backbone.
      root: Prefix before that of the backbone, such as "base_model.model.".
    """
    tensors = {
        root + rules.table_name(name.removeprefix(root)) if name.startswith(root) else name: tensor
        for name, tensor in checkpoint.items()
    }
    matches = {
        prefix: sum(f"{root}{prefix}{name}" in tensors for name in expected)
        for prefix in rules.prefixes
    }
    best = max(rules.prefixes, key=lambda prefix: matches[prefix])
    prefix = f"{root}{best}"
    is_prefixed = bool(best) and matches[best] > 0

    def part(name: str) -> str:
        if is_prefixed and not name.startswith(prefix):
            return "head"
        if not is_prefixed and _matches(rules.heads, name.removeprefix(root)):
            return "head"
        return "unused" if _matches(rules.unused, name.removeprefix(prefix)) else "backbone"

    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "unused": {}, "head": {}}
    for name, tensor in tensors.items():
        parts[part(name)][name] = tensor
    path = getattr(checkpoint, "path", pathlib.Path("weights"))
    return SplitCheckpoint(prefix, **{kind: Checkpoint(path, parts[kind]) for kind in parts})


def _substitute(replacements: Mapping[str, str], name: str) -> str:
    for pattern, replacement in replacements.items():
        name = re.sub(pattern, replacement, name)
    return name


def _matches(patterns: Collection[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
