"""Reads and checks the config.json of Hugging Face models.

Unsupported values raise a one-line error with the field, its value and the allowed values.
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
"""Options that apply to both the language model and the Whisper encoder of a speech LLM."""
_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    tuple: "a list of integers",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Options common to all transformer encoders.

    Subclasses add sizes and dropout rates, whose names have the same meaning in all subclasses:
    `hidden_size` D, `num_layers` L, `num_heads` K, `mlp_dim` (hidden size of the MLPs),
    `attention_dropout` (on the attention weights) and `activation_dropout` (inside the MLPs).

    Attributes:
      lora: LoRA config, or None for no LoRA.
      remat: Rematerialization policy; see `mister_jax.nn.ScannedLayers`.
      attention_implementation: `implementation` argument of `jax.nn.dot_product_attention`. It has
        no effect when attention dropout is active.
      dtype: Computation dtype; RoPE, softmaxes, position-bias gates, norm statistics and
        spectrograms are float32.
      param_dtype: Parameter dtype; LoRA parameters are float32.
    """

    lora: LoRAConfig | None = None
    remat: Remat = "none"
    attention_implementation: Implementation | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a folder's config.json.

    If the folder has a feature extractor for waveforms, as for wav2vec 2.0, HuBERT and WavLM, the
    result also contains `do_normalize` from the feature extractor's file. This field says whether
    the encoder expects normalized waveforms.

    Raises:
      InputError: The config.json is missing, or a file is damaged.
    """
    folder = pathlib.Path(folder)
    config = _read_json(folder / CONFIG_FILE)
    extractor = _read_feature_extractor(folder)
    # Old files do not contain the type.
    waveform_types = (None, "Wav2Vec2FeatureExtractor")
    if extractor is not None and extractor.get("feature_extractor_type") in waveform_types:
        config["do_normalize"] = extractor.get("do_normalize", True)
    return config


def _read_feature_extractor(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the fields of a folder's feature extractor, or None if the folder has none.

    transformers 5 writes these fields to processor_config.json; older versions write
    preprocessor_config.json. As in transformers, processor_config.json takes precedence.
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
    """Returns the error for a config.json field with an unsupported value."""
    return InputError(f"{CONFIG_FILE}: {name}={value!r}; allowed: {allowed}")


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Checks fields that have only one supported value.

    Args:
      config: Content of the config.json; fields that are missing or null pass the check.
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
    """Reads the fields of an encoder's config from a config.json.

    Args:
      config: Content of the config.json.
      table: Name in the file and default value for each field. A type instead of a default means
        that the field is required.
      prefix: Prefix of field names in error messages, for fields of a nested object.

    Returns:
      Values by field, with the types of their defaults; lists become tuples.

    Raises:
      InputError: A value is missing or has the wrong type.
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
    """Creates a config from fields that were read from a file, and from further options.

    Raises:
      InputError: A name or value is not allowed.
    """
    allowed = [field.name for field in dataclasses.fields(config_class)]
    unknown = [name for name in fields if name not in allowed]
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    try:
        return config_class(**fields)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def select_options(changes: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Returns the config changes with the given names."""
    return {name: changes[name] for name in names if name in changes}
