"""Creates encoders, loads them from the Hugging Face Hub or a folder, and saves them.

`registry.ARCHITECTURES` lists the supported model types.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mister_jax.convert.key_table import save_params
from mister_jax.convert.names import load_backbone
from mister_jax.convert.peft import load_adapter, read_base_model, read_lora_config
from mister_jax.convert.safetensors import Checkpoint, save
from mister_jax.encoders.hf_config import CONFIG_FILE, read_config
from mister_jax.encoders.hub import fetch
from mister_jax.encoders.registry import find_architecture
from mister_jax.encoders.tokenization import load_processor
from mister_jax.errors import InputError
from mister_jax.nn.lora import add_lora, dequantize, merge_lora
from mister_jax.parallel import sharding
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES, ShardingRules

_DTYPES = ("float32", "bfloat16", "float16")


def create_module(
    hf_config: Mapping[str, Any],
    *,
    rngs: nnx.Rngs,
    where: str | os.PathLike[str] = CONFIG_FILE,
    **changes: Any,
) -> nnx.Module:
    """Creates an encoder with random parameters. Reads no files and can be traced.

    Args:
      hf_config: Content of the encoder's config.json.
      rngs: Source of the parameters.
      where: Location of `hf_config`, for errors.
      **changes: Further fields of the architecture's config.

    Raises:
      InputError: The architecture is not supported.
    """
    architecture = find_architecture(hf_config, where)
    _check_dtypes(changes)
    return architecture.module(
        architecture.config.from_huggingface(hf_config, **changes), rngs=rngs
    )


def load_pretrained(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules = ENCODER_SHARDING_RULES,
    adapter: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **changes: Any,
) -> tuple[nnx.Module, Any]:
    """Loads an encoder and its tokenizer or feature extractor.

    Args:
      name_or_folder: Folder, which needs no network, or name of a model on the Hugging Face Hub.
      revision: Branch, tag or commit of the model on the Hub.
      mesh: Mesh to place the parameters on; by default the first device.
      rules: Sharding rules for the mesh, see `parallel.sharding.shardings`.
      adapter: Folder of a `peft` adapter, whose low-rank paths replace `lora`.
      seed: Seed of new low-rank paths.
      **changes: Further fields of the architecture's config, such as `dtype`, `param_dtype` and
        `lora`.

    Returns:
      The module and its tokenizer, or for speech its feature extractor.

    Raises:
      InputError: The model cannot be downloaded or read or is not supported, its weights, tokenizer
        or adapter do not fit it, or it does not support a type or the low-rank paths.
    """
    folder = fetch(name_or_folder, revision=revision)
    hf_config = read_config(folder)
    module = load_module(
        folder,
        hf_config=hf_config,
        mesh=mesh,
        rules=rules,
        adapter=adapter,
        seed=seed,
        **changes,
    )
    return module, load_processor(folder, getattr(module, "config", None), hf_config=hf_config)


def load_module(
    folder: str | os.PathLike[str],
    *,
    hf_config: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules = ENCODER_SHARDING_RULES,
    adapter: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **changes: Any,
) -> nnx.Module:
    """Loads an encoder without its tokenizer; see `load_pretrained`.

    The head of a task model is ignored, which is logged.

    Args:
      folder: Folder of the model.
      hf_config: Content of the folder's config.json; read from the folder by default.
      mesh: Mesh to place the parameters on; by default the first device.
      rules: Sharding rules for the mesh.
      adapter: Folder of a `peft` adapter.
      seed: Seed of new low-rank paths.
      **changes: Further fields of the architecture's config.

    Raises:
      InputError: The architecture is not supported, or weights or an adapter do not fit it.
    """
    folder = pathlib.Path(folder)
    hf_config = read_config(folder) if hf_config is None else hf_config
    architecture = find_architecture(hf_config, folder / CONFIG_FILE)

    def create() -> nnx.Module:
        return architecture.module(config, rngs=nnx.Rngs(seed))

    try:
        _check_dtypes(changes)
        config = architecture.config.from_huggingface(hf_config, **changes)
        module = nnx.eval_shape(create)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error
    table = architecture.key_table(config)
    shapes = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    load_backbone(
        module,
        table,
        Checkpoint.open(folder),
        architecture.names,
        shardings=None if mesh is None else sharding.shardings(shapes, mesh, rules),
    )
    # Variables that no checkpoint holds, such as low-rank paths, are initialized as in a new
    # module. The compiler drops the rest, so that no parameter is allocated twice.
    others = nnx.Any(nnx.LoRAParam, nnx.Not(nnx.Param))
    replicated = None if mesh is None else NamedSharding(mesh, P())
    if jax.tree.leaves(nnx.state(module, others)):
        initial = jax.jit(lambda: nnx.state(create(), others), out_shardings=replicated)()
        nnx.update(module, initial)
    if adapter is not None:
        _warn_of_other_base_model(adapter, folder, hf_config)
        lora = read_lora_config(adapter, table, architecture.names)
        add_lora(module, lora, rngs=nnx.Rngs(seed))
        load_adapter(module, adapter, table, architecture.names)
        nnx.update(module, jax.device_put(nnx.state(module, nnx.LoRAParam), replicated))
    return module


def _check_dtypes(changes: Mapping[str, Any]) -> None:
    for name in ("dtype", "param_dtype"):
        if name in changes and changes[name] not in _DTYPES:
            raise InputError(f"{name}={changes[name]!r}; allowed: {', '.join(_DTYPES)}")


def _warn_of_other_base_model(
    adapter: str | os.PathLike[str], folder: pathlib.Path, hf_config: Mapping[str, Any]
) -> None:
    """Warns if an adapter was trained on a base model with another name than the encoder's.

    Only the last part of the name is compared, with each part of the encoder's path, and with the
    model's name in a folder of the Hub's cache, so that a copy of the same model is recognized.
    """
    base_model = read_base_model(adapter)
    name = _alphanumeric(pathlib.PurePath(base_model or "").name)
    stored_name = pathlib.PurePath(str(hf_config.get("_name_or_path")))
    parts = (*folder.resolve().parts, *stored_name.parts)
    if name and name not in {_alphanumeric(part.rpartition("--")[2]) for part in parts}:
        logging.warning(
            "%s: trained on %s; the encoder is %s. The result is wrong unless both are the same",
            adapter,
            base_model,
            folder,
        )


def _alphanumeric(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def save_pretrained(
    module: nnx.Module,
    hf_config: Mapping[str, Any],
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
) -> None:
    """Writes a folder that `load_pretrained` and transformers read with equal outputs.

    Low-rank paths are merged into their kernels and int8 kernels are dequantized in the files; the
    module keeps both.

    Args:
      module: Encoder with a `config`.
      hf_config: Content of its config.json, from `read_config` or `to_huggingface`.
      folder: Folder to write; created if it is missing.
      tokenizer: Tokenizer or feature extractor to save as well.

    Raises:
      InputError: The architecture is not supported, or the folder cannot be written.
      ValueError: The config belongs to another model.
    """
    folder = pathlib.Path(folder)
    architecture = find_architecture(hf_config, folder / CONFIG_FILE)
    merged = dequantize(merge_lora(nnx.merge(*nnx.split(module))))
    config = architecture.config.from_huggingface(hf_config)
    expected = nnx.eval_shape(lambda: architecture.module(config, rngs=nnx.Rngs(0)))
    if _param_shapes(expected) != _param_shapes(merged):
        raise ValueError("save_pretrained: the config belongs to a model with other parameters")
    tensors = save_params(
        merged, architecture.key_table(config), prefix=architecture.names.prefixes[0]
    )
    save(folder, tensors)
    # transformers loads the weights in this dtype.
    dtype = max((tensor.dtype for tensor in tensors.values()), key=lambda dtype: dtype.itemsize)
    fields = {name: value for name, value in hf_config.items() if name != "torch_dtype"}
    text = json.dumps(fields | {"dtype": dtype.name}, indent=2, sort_keys=True)
    try:
        partial = folder / f".{CONFIG_FILE}.partial"
        partial.write_text(f"{text}\n")
        partial.replace(folder / CONFIG_FILE)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from error


def _param_shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
