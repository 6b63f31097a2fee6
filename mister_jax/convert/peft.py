"""LoRA adapters of the `peft` library: read into a module's low-rank paths, and written from them.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. Its tensors are
named after the modules of the model in PyTorch; the architecture's key table says which of our
layers those are.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import numpy as np
from flax import nnx
from safetensors.numpy import save as to_bytes

from mister_jax.convert.key_table import KeyTable, Source, load_params, save_params
from mister_jax.convert.safetensors import Checkpoint
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig, linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

AnyModule = TypeVar("AnyModule", bound=nnx.Module)
_PREFIX = "base_model.model."
_HEAD = "model."  # before all names of a model that has a language-model head
_ONLY_LORA = nnx.Not(nnx.LoRAParam)
_MATRICES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
# Options that change what an adapter computes, all of them off here. Those that only add tensors
# show as surplus tensors.
_OFF = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alpha_pattern",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "velora_config",
)
# Others start from a base that is not the released one.
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_lora_config(folder: str | os.PathLike[str], table: KeyTable) -> LoRAConfig:
    """What an adapter's low-rank paths are like and which layers have them.

    Args:
      folder: the adapter's.
      table: of the module that is to have it.

    Returns:
      The config to make the module with, or to give to `add_lora`, before `load_adapter`.

    Raises:
      InputError: files that are missing or damaged, an option that changes what LoRA computes, or
        tensors of none of the module's layers.
    """
    folder = pathlib.Path(folder)
    options = _read_options(folder / CONFIG)
    tensors = Checkpoint.open(folder / WEIGHTS)
    known = _modules_in(tensors, table)
    adapted = {path for path, names in known.items() if _adapted(tensors) & set(names)}
    if not adapted:
        raise InputError(
            f"{folder / WEIGHTS}: has LoRA of none of the model's modules; allowed are names such "
            f"as {next(iter(known.values()))[0]}.{_MATRICES['lora_a']}"
        )
    try:
        return LoRAConfig(
            rank=options["r"],
            alpha=options["lora_alpha"],
            dropout=options.get("lora_dropout", 0.0),
            targets=tuple(sorted(_shortest_ends(adapted, known.keys() - adapted, "/"))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG}: no LoRA of these sizes: {error}") from error


def load_adapter(module: AnyModule, folder: str | os.PathLike[str], table: KeyTable) -> AnyModule:
    """Fills a module's low-rank paths from an adapter.

    Args:
      module: with LoRA as `read_lora_config` says; changed in place.
      folder: the adapter's.
      table: of the module. An adapter of a model with a head and one of a model without, whose
        names differ by "model.", both fit it.

    Returns:
      The module.

    Raises:
      InputError: what `read_lora_config` raises, another alpha / r than the module's, or tensors
        that are missing, surplus or misshapen, all of them named in one line.
    """
    folder = pathlib.Path(folder)
    config = read_lora_config(folder, table)
    scales = {layer.lora.scale for _, layer in linear_layers(module) if layer.lora}
    if scales != {config.scale}:
        raise InputError(
            f"{folder / CONFIG}: lora_alpha / r = {config.scale:g}; allowed is that of the "
            f"module's LoRA, {', '.join(f'{scale:g}' for scale in scales) or 'which has none'}"
        )
    tensors = Checkpoint.open(folder / WEIGHTS)
    sources = _lora_table(module, table, _modules_in(tensors, table))
    return load_params(module, sources, tensors, skip=_ONLY_LORA)


def save_adapter(
    module: nnx.Module,
    folder: str | os.PathLike[str],
    table: KeyTable,
    *,
    base_model: str | None = None,
) -> None:
    """Writes a module's low-rank paths as an adapter, which `peft` loads onto the same base.

    Args:
      module: with LoRA, all of one rank and alpha.
      folder: made where it is missing.
      table: of the module, with the names of the PyTorch model the adapter is for: with a
        language-model head or without.
      base_model: name or folder of the base's weights, for the reader.

    Raises:
      InputError: the folder cannot be written.
      ValueError: a module without LoRA, or with LoRA that one adapter cannot hold.
    """
    layers = {path: layer.lora for path, layer in linear_layers(module) if layer.lora}
    shapes = {(lora.rank, lora.alpha, lora.dropout) for lora in layers.values()}
    if len(shapes) != 1:
        raise ValueError(f"one adapter holds LoRA of one (rank, alpha, dropout), not {shapes}")
    ((rank, alpha, dropout),) = shapes
    sources = _lora_table(module, table, _modules(table, _PREFIX.__add__))
    tensors = save_params(module, sources, skip=_ONLY_LORA)
    names = _modules(table, str)
    adapted = {name for path in layers for name in names[path]}
    others = {name for path in names for name in names[path]} - adapted
    options = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": sorted(_shortest_ends(adapted, others, ".")),
    }
    weights = {name: np.ascontiguousarray(tensor[...]) for name, tensor in tensors.items()}
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / WEIGHTS, to_bytes(weights, metadata={"format": "pt"}))
        _write(folder / CONFIG, f"{json.dumps(options, indent=2)}\n".encode())
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from error


def _read_options(path: pathlib.Path) -> dict[str, Any]:
    try:
        options = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); an adapter is a folder with {CONFIG} and "
            f"{WEIGHTS}"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: damaged (no JSON: {error})") from error
    if not isinstance(options, dict):
        raise InputError(f"{path}: damaged (JSON, but not of names and values)")
    allowed: dict[str, Collection[Any]] = {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "init_lora_weights": _INITIALISATIONS,
    }
    for field, values in allowed.items():
        if field in options and options[field] not in values:
            raise InputError(f"{path}: {field}={options[field]!r}; allowed are {values}")
    for field in _OFF:
        if options.get(field):
            raise InputError(f"{path}: {field}={options[field]!r}; allowed is to leave it out")
    return options


def _modules(table: KeyTable, rename: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    """Our layers -> the PyTorch modules, renamed, whose weights and no others are their kernels."""
    return {
        path.removesuffix("/kernel"): tuple(
            rename(name.removesuffix(".weight")) for name in source.names
        )
        for path, source in table.items()
        if path.endswith("/kernel") and not source.combine
    }


def _modules_in(tensors: Mapping[str, Any], table: KeyTable) -> dict[str, tuple[str, ...]]:
    """Our layers -> the modules' names in an adapter of a model with a head or without."""
    ways: tuple[Callable[[str], str], ...] = (
        lambda name: f"{_PREFIX}{name}",
        lambda name: f"{_PREFIX}{_HEAD}{name}",
        lambda name: f"{_PREFIX}{name.removeprefix(_HEAD)}",
    )
    adapted = _adapted(tensors)
    return max(
        (_modules(table, rename) for rename in ways),
        key=lambda modules: len(adapted.intersection(itertools.chain(*modules.values()))),
    )


def _adapted(tensors: Mapping[str, Any]) -> set[str]:
    """The modules that have LoRA in an adapter."""
    end = f".{_MATRICES['lora_a']}"
    return {name.removesuffix(end) for name in tensors if name.endswith(end)}


def _lora_table(
    module: nnx.Module, table: KeyTable, names: Mapping[str, tuple[str, ...]]
) -> dict[str, Source]:
    """The key table of a module's low-rank paths."""
    layers = [path for path, layer in linear_layers(module) if layer.lora]
    without = [path for path in layers if path not in names]
    if without:
        raise ValueError(f"layers with LoRA that are no one module in PyTorch: {without}")
    return {
        f"{path}/{ours}": Source(
            tuple(f"{name}.{theirs}" for name in names[path]),
            axes=(1, 0),
            stacked=table[f"{path}/kernel"].stacked,
        )
        for path in layers
        for ours, theirs in _MATRICES.items()
    }


def _shortest_ends(chosen: Collection[str], others: Collection[str], separator: str) -> set[str]:
    """For each chosen name, its shortest end of whole parts that no other name has."""

    def ends(name: str) -> list[str]:
        parts = name.split(separator)
        return [separator.join(parts[start:]) for start in reversed(range(len(parts)))]

    taken = {end for name in others for end in ends(name)}
    return {next((end for end in ends(name) if end not in taken), name) for name in chosen}


def _write(path: pathlib.Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
