"""Key tables and name rules, which map the tensors of a checkpoint to the parameters of a module.

Each architecture has a key table with the tensor names of the bare backbone. A task model stores
the same tensors under a prefix and adds a head. `NameRules` describes such variants in checkpoints
and adapters. `params.load_params` and `params.save_params` apply a key table.
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
    """Tensors from which a parameter is loaded.

    Attributes:
      names: Tensor names of all layers if `stacked` is set, else of a single layer. A layer has one
        name or, with `combine`, one or more.
      axes: Permutation of each tensor's axes on loading, as in `np.transpose`: (1, 0) for the
        weight of a PyTorch Linear, (2, 1, 0) for the weight of a Conv1d.
      stacked: Whether the values of all layers are stacked along a new leading axis L. The names
        are then ordered by layer.
      combine: Function that computes the value (of one layer) from whole tensors, if a permutation
        is not enough, for example for fused projections or weight normalization.
      split: Inverse of `combine`. A parameter with `combine` but without `split` cannot be saved.
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
"""Source of each parameter, by the parameter's "/"-joined path in `nnx.state(module)`."""


def layer_names(pattern: str, num_layers: int) -> tuple[str, ...]:
    """Returns one name per layer from a pattern with `{}` for the layer number."""
    return tuple(pattern.format(layer) for layer in range(num_layers))


def parameter(name: str, num_layers: int = 0, axes: tuple[int, ...] | None = None) -> Source:
    """Returns a source with one tensor or, if `num_layers` is set, one tensor per layer."""
    names = layer_names(name, num_layers) if num_layers else (name,)
    return Source(names, axes, stacked=num_layers > 0)


def linear(path: str, name: str, num_layers: int = 0, *, bias: bool = True) -> dict[str, Source]:
    """Returns the key-table entries for a PyTorch Linear.

    Args:
      path: Path of the module.
      name: Name of the PyTorch layer; with `num_layers`, a pattern with `{}` for the layer number.
      num_layers: Number of layers whose parameters are stacked; 0 for a single layer.
      bias: Whether the layer has a bias.
    """
    return _layer(path, "kernel", name, num_layers, bias, axes=(1, 0))


def conv(path: str, name: str, *, bias: bool = True) -> dict[str, Source]:
    """Returns the key-table entries for a PyTorch Conv1d; see `linear`."""
    return _layer(path, "kernel", name, 0, bias, axes=(2, 1, 0))


def norm(path: str, name: str, num_layers: int = 0, *, bias: bool = True) -> dict[str, Source]:
    """Returns the key-table entries for a PyTorch LayerNorm or RMSNorm; see `linear`."""
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
    """Returns the key-table entries for a Conv1d with `torch.nn.utils.weight_norm`, dim=2."""
    kernel = Source(
        (f"{name}.weight_g", f"{name}.weight_v"),
        combine=_merge_weight_norm,
        split=_split_weight_norm,
    )
    return {f"{path}/kernel": kernel, f"{path}/bias": parameter(f"{name}.bias")}


def _merge_weight_norm(tensors: list[np.ndarray]) -> np.ndarray:
    """Returns the kernel, [K, in, out], for a gain, [1, 1, K], and a direction, [out, in, K]."""
    gain, direction = (tensor.astype(np.float64) for tensor in tensors)
    length = np.sqrt((direction**2).sum((0, 1), keepdims=True))
    return (gain * direction / length).transpose(2, 1, 0).astype(tensors[1].dtype)


def _split_weight_norm(kernel: np.ndarray) -> list[np.ndarray]:
    """Splits a kernel into a gain (its norm at each position) and a direction (the kernel)."""
    direction = kernel.transpose(2, 1, 0)
    gain = np.sqrt((direction.astype(np.float64) ** 2).sum((0, 1), keepdims=True))
    return [gain.astype(kernel.dtype), direction]


@dataclasses.dataclass(frozen=True)
class NameRules:
    """Variants of an architecture's tensor names in checkpoints and adapters.

    All attributes except `prefixes` contain regular expressions.

    Attributes:
      prefixes: Prefixes of the backbone's names, "" for the bare model. Files are written with the
        first prefix.
      renamed: Replacements that convert alternative names to the names in the key table.
      unused: Backbone tensors, without the prefix, that the module does not need.
      heads: Head tensors in a checkpoint whose backbone has no prefix. If the backbone has a
        prefix, all tensors without the prefix belong to the head.
      module_names: Replacements that convert names in the key table to module names in
        transformers, if these differ.
      lora_bypassed: Modules whose weights transformers uses without calling the module, so that a
        `peft` LoRA adapter has no effect on them.
    """

    prefixes: tuple[str, ...] = ("",)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    module_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lora_bypassed: tuple[str, ...] = ()

    def table_name(self, name: str) -> str:
        """Converts a tensor name in a file to the name in the key table; keeps the prefix."""
        return _substitute(self.renamed, name)

    def module_name(self, name: str) -> str:
        """Converts a module name in the key table to the name in transformers."""
        return _substitute(self.module_names, name)

    def bypasses_lora(self, module_name: str) -> bool:
        """Returns whether a `peft` LoRA adapter has no effect on a module."""
        return _matches(self.lora_bypassed, module_name)


@dataclasses.dataclass(frozen=True)
class SplitCheckpoint:
    """Parts of a checkpoint. The module does not need the `unused` tensors of the backbone."""

    prefix: str
    backbone: Checkpoint
    unused: Checkpoint
    head: Checkpoint


def split_checkpoint(
    checkpoint: Mapping[str, Tensor], rules: NameRules, expected: Collection[str], *, root: str = ""
) -> SplitCheckpoint:
    """Splits a checkpoint into backbone and head.

    The backbone's prefix is the prefix with the most expected names. If no expected name is found,
    the prefix is not used to recognize head tensors, so that an error can list all tensors.

    Args:
      checkpoint: Checkpoint or adapter.
      rules: Name rules of the architecture.
      expected: Tensor names of the bare backbone.
      root: Prefix before the backbone's prefix, such as "base_model.model.".
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
