"""Reads and writes LoRA adapters in the format of the `peft` library.

The adapters' tensors are named after the modules of the PyTorch model. The architecture's key table
and `NameRules` map these names to layers.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import numpy as np
from flax import nnx
from safetensors.numpy import save as to_safetensors

from mister_jax.convert.key_table import (
    KeyTable,
    NameRules,
    Source,
    SplitCheckpoint,
    split_checkpoint,
)
from mister_jax.convert.params import load_params, log_ignored, save_params, summarize
from mister_jax.convert.safetensors import Checkpoint, parse_json_object, write_atomically
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig, linear_layers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TORCH_WEIGHTS_FILE = "adapter_model.bin"

AnyModule = TypeVar("AnyModule", bound=nnx.Module)
_PREFIX = "base_model.model."
_ONLY_LORA = nnx.Not(nnx.LoRAParam)
_MATRICES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_LINEAR_AXES = (1, 0)  # `Source.axes` for the weight of a PyTorch Linear
# Unsupported options that change what an adapter computes. Options that only add tensors need no
# check, because unexpected tensors raise an error.
_UNSUPPORTED_OPTIONS = (
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
# Supported initializations. All others change the base model's weights.
_INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_lora_config(
    folder: str | os.PathLike[str], table: KeyTable, rules: NameRules | None = None
) -> LoRAConfig:
    """Reads an adapter's LoRA config.

    Create the module with this config, or call `add_lora` with it, before calling `load_adapter`.

    Args:
      folder: Folder of the adapter.
      table: Key table of the module, with the names of the bare backbone.
      rules: Name rules of the architecture; by default, names must match the table.

    Raises:
      InputError: Files are missing or damaged, an option is not supported, or the adapter has no
        LoRA for the module's layers.
    """
    folder = pathlib.Path(folder)
    options = _read_options(folder / CONFIG_FILE)
    parts = _read_tensors(folder, table, rules)
    modules = _modules(table, parts.prefix)
    lora_a = f".{_MATRICES['lora_a']}"
    adapted = {
        path
        for path, names in modules.items()
        if any(name + lora_a in parts.backbone for name in names)
    }
    if not adapted:
        raise InputError(
            f"{parts.backbone.path}: has no LoRA for the model's modules; allowed: names such as "
            f"{next(iter(modules.values()))[0]}{lora_a}"
        )
    try:
        return LoRAConfig(
            rank=options["r"],
            alpha=options["lora_alpha"],
            dropout=options.get("lora_dropout", 0.0),
            targets=tuple(sorted(_shortest_suffixes(adapted, modules.keys() - adapted, "/"))),
            use_rslora=bool(options.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG_FILE}: invalid LoRA options: {error}") from error


def read_base_model(folder: str | os.PathLike[str]) -> str | None:
    """Returns the name or folder of an adapter's base model, or None if it is not stored.

    Raises:
      InputError: The adapter's config is missing, damaged or not supported.
    """
    base = _read_options(pathlib.Path(folder) / CONFIG_FILE).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def load_adapter(
    module: AnyModule,
    folder: str | os.PathLike[str],
    table: KeyTable,
    rules: NameRules | None = None,
) -> AnyModule:
    """Fills a module's LoRA parameters from an adapter, and returns the module.

    The module must have the LoRA config that `read_lora_config` returns for the same arguments.
    Tensors of a head, or of parts that the module does not have, are ignored and logged.

    Raises:
      InputError: The adapter cannot be read (see `read_lora_config`), its scale differs from the
        module's scale, or tensors are missing, unexpected, mismatched or not finite.
    """
    folder = pathlib.Path(folder)
    config = read_lora_config(folder, table, rules)
    scales = {layer.lora.scale for _, layer in linear_layers(module) if layer.lora}
    if scales != {config.scale}:
        formula = "lora_alpha / sqrt(r)" if config.use_rslora else "lora_alpha / r"
        needed = "the module has no LoRA; call add_lora before"
        if scales:
            allowed = ", ".join(f"{scale:g}" for scale in scales)
            needed = f"allowed: the scale of the module's LoRA, {allowed}"
        raise InputError(f"{folder / CONFIG_FILE}: {formula} = {config.scale:g}; {needed}")
    parts = _read_tensors(folder, table, rules)
    sources = _lora_table(module, table, lambda name: parts.prefix + name)
    load_params(module, sources, parts.backbone, skip=_ONLY_LORA)
    log_ignored(parts.head.path, tuple(parts.head), "the head")
    log_ignored(parts.unused.path, tuple(parts.unused), "parts that the encoder does not have")
    return module


def save_adapter(
    module: nnx.Module,
    folder: str | os.PathLike[str],
    table: KeyTable,
    rules: NameRules | None = None,
    *,
    base_model: str | None = None,
) -> None:
    """Saves a module's LoRA as a `peft` adapter.

    Args:
      module: Module whose LoRA layers all have the same rank, alpha and dropout rate.
      folder: Output folder; created if missing.
      table: Key table of the module, with the names in the PyTorch model.
      rules: Name rules of the architecture; by default, modules have the names in the table.
      base_model: Name or folder of the base model.

    Raises:
      InputError: The folder cannot be written, or `peft` would not apply the LoRA of a layer.
      ValueError: The module has no LoRA, or its LoRA configs differ between layers.
    """
    rules = rules or NameRules()
    configs = {path: layer.lora for path, layer in linear_layers(module) if layer.lora}
    shapes = {(lora.rank, lora.alpha, lora.dropout, lora.use_rslora) for lora in configs.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"layers with (rank, alpha, dropout, use_rslora) {sorted(shapes)}; needed: LoRA in at "
            "least one layer, with equal values in all"
        )
    ((rank, alpha, dropout, use_rslora),) = shapes
    modules = {
        path: [rules.module_name(name) for name in names]
        for path, names in _modules(table, "").items()
    }
    sources = _lora_table(module, table, lambda name: _PREFIX + rules.module_name(name))
    adapted = {name for path in configs for name in modules[path]}
    bypassed = [name for name in sorted(adapted) if rules.bypasses_lora(name)]
    if bypassed:
        raise InputError(
            f"{folder}: peft would ignore the LoRA of {summarize(bypassed)}, whose weights "
            "transformers reads directly; allowed: the merged model (export without --adapter)"
        )
    others = {name for names in modules.values() for name in names} - adapted
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
        "target_modules": sorted(_shortest_suffixes(adapted, others, ".")),
    }
    tensors = save_params(module, sources, skip=_ONLY_LORA)
    weights = {name: np.ascontiguousarray(tensor[...]) for name, tensor in tensors.items()}
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data = to_safetensors(weights, metadata={"format": "pt"})
        write_atomically(folder / WEIGHTS_FILE, data)
        write_atomically(folder / CONFIG_FILE, f"{json.dumps(options, indent=2)}\n".encode())
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from error


def _read_options(path: pathlib.Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); allowed: a folder with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE} or {TORCH_WEIGHTS_FILE}"
        ) from error
    options = parse_json_object(data, path)
    allowed: dict[str, Collection[Any]] = {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "init_lora_weights": _INITIALIZATIONS,
    }
    for field, values in allowed.items():
        if field in options and options[field] not in values:
            raise InputError(f"{path}: {field}={options[field]!r}; allowed: {values}")
    for field in _UNSUPPORTED_OPTIONS:
        if options.get(field):
            raise InputError(f"{path}: {field}={options[field]!r} is not supported; remove it")
    return options


def _read_tensors(
    folder: pathlib.Path, table: KeyTable, rules: NameRules | None
) -> SplitCheckpoint:
    """Opens an adapter's tensors and renames them to a prefix plus the names in the key table."""
    torch_file = folder / TORCH_WEIGHTS_FILE
    use_torch = torch_file.exists() and not (folder / WEIGHTS_FILE).exists()
    checkpoint = Checkpoint.open(torch_file if use_torch else folder / WEIGHTS_FILE)
    expected = [
        f"{name}.{_MATRICES['lora_a']}" for names in _modules(table, "").values() for name in names
    ]
    return split_checkpoint(checkpoint, rules or NameRules(), expected, root=_PREFIX)


def _modules(table: KeyTable, prefix: str) -> dict[str, tuple[str, ...]]:
    """Returns the PyTorch names of each linear layer by path; a stack has one name per layer."""
    return {
        path.removesuffix("/kernel"): tuple(
            prefix + name.removesuffix(".weight") for name in source.names
        )
        for path, source in table.items()
        if path.endswith("/kernel") and source.axes == _LINEAR_AXES and not source.combine
    }


def _lora_table(
    module: nnx.Module, table: KeyTable, rename: Callable[[str], str]
) -> dict[str, Source]:
    """Returns the key table for a module's LoRA; `rename` converts names of PyTorch modules."""
    modules = _modules(table, "")
    layers = [path for path, layer in linear_layers(module) if layer.lora]
    unmapped = [path for path in layers if path not in modules]
    if unmapped:
        raise ValueError(f"layers with LoRA that are not a single PyTorch Linear: {unmapped}")
    return {
        f"{path}/{matrix}": Source(
            tuple(f"{rename(name)}.{suffix}" for name in modules[path]),
            axes=_LINEAR_AXES,
            stacked=table[f"{path}/kernel"].stacked,
        )
        for path in layers
        for matrix, suffix in _MATRICES.items()
    }


def _shortest_suffixes(
    chosen: Collection[str], others: Collection[str], separator: str
) -> set[str]:
    """Returns, for each chosen name, the shortest suffix that no name in `others` ends with.

    A suffix starts after a separator. If every suffix is taken, the result is the whole name with a
    leading separator.
    """

    def suffixes(name: str) -> list[str]:
        parts = name.split(separator)
        return [separator.join(parts[start:]) for start in reversed(range(len(parts)))]

    taken = {suffix for name in others for suffix in suffixes(name)}
    return {
        next((suffix for suffix in suffixes(name) if suffix not in taken), separator + name)
        for name in chosen
    }
