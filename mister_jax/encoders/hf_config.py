"""The config.json of Hugging Face models: reading, and checks of the fields that configs use.

Unsupported values raise a one-line error with the field, its value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mister_jax.convert.safetensors import parse_json_object
from mister_jax.errors import InputError
from mister_jax.nn.attention import Implementation
from mister_jax.nn.lora import LoRAConfig
from mister_jax.nn.scanned_layers import Remat

CONFIG_FILE = "config.json"
TYPE_OPTIONS = ("dtype", "param_dtype")
SHARED_OPTIONS = (*TYPE_OPTIONS, "attention_implementation")
"""Options that apply to several parts of a speech LLM."""
_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    tuple: "a list of integers",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Options that the transformers share.

    Subclasses add sizes and dropout rates. These have one meaning in all of them: `hidden_size` D,
    `num_layers` L, `num_heads` K, `mlp_dim` (hidden size of the feed-forward blocks),
    `attention_dropout` (on the attention weights) and `activation_dropout` (inside the feed-forward
    blocks).

    Attributes:
      lora: Low-rank paths, or None.
      remat: Rematerialization policy; see `mister_jax.nn.ScannedLayers`.
      attention_implementation: Implementation of `jax.nn.dot_product_attention`, used without
        dropout.
      dtype: Computation dtype; rotations, softmaxes, gates, statistics of norms and
        spectrograms are float32.
      param_dtype: Parameter dtype; low-rank paths are float32.
    """

    lora: LoRAConfig | None = None
    remat: Remat = "none"
    attention_implementation: Implementation | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a folder's config.json.

    wav2vec 2.0, HuBERT and WavLM store in a file of the feature extractor whether their input is
    normalized. Its `do_normalize` is added to the config.

    Raises:
      InputError: A file is missing or damaged.
    """
    folder = pathlib.Path(folder)
    config = _read_json(folder / CONFIG_FILE)
    if config.get("model_type") in ("wav2vec2", "hubert", "wavlm"):
        extractor = _read_feature_extractor(folder)
        if extractor is not None:
            config["do_normalize"] = extractor.get("do_normalize", True)
    return config


def _read_feature_extractor(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the fields of a folder's feature extractor, or None if it has none.

    transformers 5 writes them to processor_config.json, older versions to
    preprocessor_config.json. The precedence is that of transformers.
    """
    path = folder / "processor_config.json"
    fields = _read_json(path) if path.exists() else {}
    nested = fields.get("feature_extractor", fields.get("audio_processor"))
    if nested is None:
        path = folder / "preprocessor_config.json"
        return _read_json(path) if path.exists() else None
    if not isinstance(nested, dict):
        raise InputError(f"{path}: feature_extractor={nested!r}; allowed: a JSON object")
    return nested


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_json_object(data, path)


def unsupported(name: str, value: Any, allowed: Any) -> InputError:
    """Returns the error for an unsupported field of a config.json."""
    return InputError(f"{CONFIG_FILE}: {name}={value!r}; allowed: {allowed}")


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Checks fields that have only one supported value.

    Args:
      config: Content of the config.json; absent fields and null have the supported value.
      fixed: Supported value by field.

    Raises:
      InputError: A field has another value.
    """
    for name, allowed in fixed.items():
        value = config.get(name)
        if value is not None and value != allowed:
            raise unsupported(name, value, repr(allowed))


def read_fields(
    config: Mapping[str, Any], table: Mapping[str, tuple[str, Any]], *, prefix: str = ""
) -> dict[str, Any]:
    """Reads the fields of an encoder's config.

    Args:
      config: Content of the config.json.
      table: Name in the file and default of each field; a type in place of the default makes the
        field required.
      prefix: Prefix of field names in error messages, for fields of a nested object.

    Returns:
      Values by field, each of its default's type; lists become tuples.

    Raises:
      InputError: A value is missing or has another type.
    """
    values = {}
    for field, (name, default) in table.items():
        required = isinstance(default, type)
        kind: Any = default if required else type(default)
        value: Any = config.get(name, None if required else default)
        value = tuple(value) if isinstance(value, list) else value
        items = value if isinstance(value, tuple) else ()
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise unsupported(f"{prefix}{name}", value, _TYPE_NAMES[kind])
        if any(type(item) is not int for item in items):
            raise unsupported(f"{prefix}{name}", value, _TYPE_NAMES[kind])
        values[field] = float(value) if kind is float else value
    return values


def make_config(config_class: Any, fields: Mapping[str, Any], where: str = CONFIG_FILE) -> Any:
    """Creates a config from the fields of a file.

    Raises:
      InputError: The config refuses a field.
    """
    try:
        return config_class(**fields)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def select_options(changes: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Returns the changes of a speech LLM's config with the given names, for several parts."""
    return {name: changes[name] for name in names if name in changes}
