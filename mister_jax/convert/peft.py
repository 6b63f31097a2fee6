"""LoRA adapters of the `peft` library: read into a module's low-rank paths, and written from them.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`, or
`adapter_model.bin` where PyTorch is installed. Its tensors are named after the modules of the
PyTorch model; the architecture's key table and `NameRules` map them to layers.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import numpy as np
from flax import nnx
from safetensors.numpy import save as to_bytes

from mister_jax.convert.key_table import (
    KeyTable,
    NameRules,
    Source,
    SplitCheckpoint,
    split_checkpoint,
)
from mister_jax.convert.params import load_params, log_ignored, save_params, summarize
from mister_jax.convert.safetensors import Checkpoint
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig, linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

AnyModule = TypeVar("AnyModule", bound=nnx.Module)
_TORCH_WEIGHTS = "adapter_model.bin"
_PREFIX = "base_model.model."
_ONLY_LORA = nnx.Not(nnx.LoRAParam)
_MATRICES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_TRANSPOSED = (1, 0)  # `Source.axes` of the weight of a PyTorch Linear
# Options that change what an adapter computes and must be off. Options that only add tensors are
# reported with these tensors.
_OFF = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "rank_pattern",
    "alpha_pattern",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "velora_config",
)
# Other initializations modify the base model's weights.
_INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_lora_config(
    folder: str | os.PathLike[str], table: KeyTable, names: NameRules | None = None
) -> LoRAConfig:
    """Reads which layers an adapter adapts, and the shape of its low-rank paths.

    Args:
      folder: Folder of the adapter.
      table: Key table of the module, with the names of the bare backbone.
      names: Rules of the architecture's names; by default names must be those of the table.

    Returns:
      The config to create the module with, or to pass to `add_lora`, before `load_adapter`.

    Raises:
      InputError: Files are missing or damaged, an option changes what LoRA computes, or the adapter
        adapts none of the module's layers.
    """
    folder = pathlib.Path(folder)
    options = _read_options(folder / CONFIG)
    parts = _read_tensors(folder, table, names)
    modules = _modules(table, parts.prefix)
    lora_a = f".{_MATRICES['lora_a']}"
    adapted = {
        path
        for path, each in modules.items()
        if any(name + lora_a in parts.backbone for name in each)
    }
    if not adapted:
        raise InputError(
            f"{parts.backbone.path}: has LoRA of none of the model's modules; allowed are names "
            f"such as {next(iter(modules.values()))[0]}{lora_a}"
        )
    try:
        return LoRAConfig(
            rank=options["r"],
            alpha=options["lora_alpha"],
            dropout=options.get("lora_dropout", 0.0),
            targets=tuple(sorted(_shortest_ends(adapted, modules.keys() - adapted, "/"))),
            use_rslora=bool(options.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG}: no LoRA of these sizes: {error}") from error


def read_base_model(folder: str | os.PathLike[str]) -> str | None:
    """Returns the name or folder of the model that an adapter was trained on, if it is stored.

    Raises:
      InputError: The adapter's config is missing, damaged or not supported.
    """
    base = _read_options(pathlib.Path(folder) / CONFIG).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def load_adapter(
    module: AnyModule,
    folder: str | os.PathLike[str],
    table: KeyTable,
    names: NameRules | None = None,
) -> AnyModule:
    """Fills a module's low-rank paths from an adapter.

    Tensors of a head, and of parts that the module does not have, are ignored and logged.

    Args:
      module: Module with the LoRA of `read_lora_config`; changed in place.
      folder: Folder of the adapter.
      table: Key table of the module, with the names of the bare backbone.
      names: Rules of the architecture's names; by default names must be those of the table.

    Returns:
      The module.

    Raises:
      InputError: `read_lora_config` raises it, the scale differs from the module's, or tensors are
        missing, surplus, misshapen or not finite.
    """
    folder = pathlib.Path(folder)
    config = read_lora_config(folder, table, names)
    scales = {layer.lora.scale for _, layer in linear_layers(module) if layer.lora}
    if scales != {config.scale}:
        formula = "lora_alpha / sqrt(r)" if config.use_rslora else "lora_alpha / r"
        raise InputError(
            f"{folder / CONFIG}: {formula} = {config.scale:g}; allowed is that of the module's "
            f"LoRA, {', '.join(f'{scale:g}' for scale in scales) or 'which has none'}"
        )
    parts = _read_tensors(folder, table, names)
    sources = _lora_table(module, table, lambda name: parts.prefix + name)
    load_params(module, sources, parts.backbone, skip=_ONLY_LORA)
    log_ignored(parts.head.path, tuple(parts.head), "the head")
    log_ignored(parts.unused.path, tuple(parts.unused), "parts that the encoder does not have")
    return module


def save_adapter(
    module: nnx.Module,
    folder: str | os.PathLike[str],
    table: KeyTable,
    names: NameRules | None = None,
    *,
    base_model: str | None = None,
) -> None:
    """Writes a module's low-rank paths as an adapter, which `peft` loads onto the same base.

    Args:
      module: Module whose LoRA has one rank, alpha and dropout everywhere.
      folder: Folder to write; created if it is missing.
      table: Key table of the module, with the names of the PyTorch model the adapter is for.
      names: Rules of the architecture's names; by default modules have the names of the table.
      base_model: Name or folder of the base model.

    Raises:
      InputError: The folder cannot be written, or `peft` would not apply the LoRA of a layer.
      ValueError: The module has no LoRA, or LoRA that one adapter cannot hold.
    """
    names = names or NameRules()
    configs = {path: layer.lora for path, layer in linear_layers(module) if layer.lora}
    shapes = {(lora.rank, lora.alpha, lora.dropout, lora.use_rslora) for lora in configs.values()}
    if len(shapes) != 1:
        raise ValueError(f"one adapter holds LoRA of one (rank, alpha, dropout), not {shapes}")
    ((rank, alpha, dropout, use_rslora),) = shapes
    modules = {
        path: [names.module_name(name) for name in each]
        for path, each in _modules(table, "").items()
    }
    sources = _lora_table(module, table, lambda name: _PREFIX + names.module_name(name))
    adapted = {name for path in configs for name in modules[path]}
    bypassed = [name for name in sorted(adapted) if names.bypasses_lora(name)]
    if bypassed:
        raise InputError(
            f"{folder}: peft would ignore the LoRA of {summarize(bypassed)}, whose weights "
            "transformers reads directly; allowed: the merged model (export without --adapter)"
        )
    others = {name for each in modules.values() for name in each} - adapted
    options = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "bias": "none",
        "target_modules": sorted(_shortest_ends(adapted, others, ".")),
    }
    tensors = save_params(module, sources, skip=_ONLY_LORA)
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
            f"{WEIGHTS} or {_TORCH_WEIGHTS}"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: damaged (no JSON: {error})") from error
    if not isinstance(options, dict):
        raise InputError(f"{path}: damaged (JSON, but not of names and values)")
    allowed: dict[str, Collection[Any]] = {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "init_lora_weights": _INITIALIZATIONS,
    }
    for field, values in allowed.items():
        if field in options and options[field] not in values:
            raise InputError(f"{path}: {field}={options[field]!r}; allowed are {values}")
    for field in _OFF:
        if options.get(field):
            raise InputError(f"{path}: {field}={options[field]!r}; allowed is to leave it out")
    return options


def _read_tensors(
    folder: pathlib.Path, table: KeyTable, names: NameRules | None
) -> SplitCheckpoint:
    """Opens an adapter's tensors, under the names of the key table and a prefix."""
    torch_file = folder / _TORCH_WEIGHTS
    use_torch = torch_file.exists() and not (folder / WEIGHTS).exists()
    checkpoint = Checkpoint.open(torch_file if use_torch else folder / WEIGHTS)
    expected = [
        f"{name}.{_MATRICES['lora_a']}" for each in _modules(table, "").values() for name in each
    ]
    return split_checkpoint(checkpoint, names or NameRules(), expected, root=_PREFIX)


def _modules(table: KeyTable, prefix: str) -> dict[str, tuple[str, ...]]:
    """Returns the PyTorch Linears, one per layer of a stack, of each layer of the module."""
    return {
        path.removesuffix("/kernel"): tuple(
            prefix + name.removesuffix(".weight") for name in source.names
        )
        for path, source in table.items()
        if path.endswith("/kernel") and source.axes == _TRANSPOSED and not source.combine
    }


def _lora_table(
    module: nnx.Module, table: KeyTable, rename: Callable[[str], str]
) -> dict[str, Source]:
    """Returns the key table of a module's low-rank paths, with the modules renamed."""
    modules = _modules(table, "")
    layers = [path for path, layer in linear_layers(module) if layer.lora]
    without = [path for path in layers if path not in modules]
    if without:
        raise ValueError(f"layers with LoRA that are no one module in PyTorch: {without}")
    return {
        f"{path}/{matrix}": Source(
            tuple(f"{rename(name)}.{suffix}" for name in modules[path]),
            axes=_TRANSPOSED,
            stacked=table[f"{path}/kernel"].stacked,
        )
        for path in layers
        for matrix, suffix in _MATRICES.items()
    }


def _shortest_ends(chosen: Collection[str], others: Collection[str], separator: str) -> set[str]:
    """Returns, for each chosen name, its shortest suffix of whole parts that no other name has.

    A name that is the suffix of another one is marked by a separator before it.
    """

    def ends(name: str) -> list[str]:
        parts = name.split(separator)
        return [separator.join(parts[start:]) for start in reversed(range(len(parts)))]

    taken = {end for name in others for end in ends(name)}
    return {
        next((end for end in ends(name) if end not in taken), separator + name) for name in chosen
    }


def _write(path: pathlib.Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
