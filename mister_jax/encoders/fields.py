"""Reads and checks the fields of a config.json for the encoders' configs.

Unsupported values raise a one-line error with the field, its value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mister_jax.errors import InputError

_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    tuple: "a list of integers",
}


def unsupported(name: str, value: Any, allowed: Any) -> InputError:
    """Returns the error for an unsupported field of a config.json."""
    return InputError(f"config.json: {name}={value!r}: allowed is {allowed}")


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises InputError if a field of a config.json has another than its one supported value."""
    for name, allowed in fixed.items():
        if config.get(name, allowed) != allowed:
            raise unsupported(name, config[name], repr(allowed))


def read(config: Mapping[str, Any], table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Reads the fields of a config.json.

    Args:
      config: Content of the file.
      table: Mapping of each field of the encoder's config to its name in the file and its default;
        a type in place of the default makes the field required.

    Returns:
      Values by field, each of its default's type; lists become tuples.

    Raises:
      InputError: A value has another type.
    """
    values = {}
    for field, (name, default) in table.items():
        required = isinstance(default, type)
        kind: Any = default if required else type(default)
        value = config.get(name, None if required else default)
        value = tuple(value) if isinstance(value, list) else value
        parts = value if isinstance(value, tuple) else ()
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise unsupported(name, value, _KINDS[kind])
        if any(type(part) is not int for part in parts):
            raise unsupported(name, value, _KINDS[kind])
        values[field] = value
    return values


def check_positive(config: Any, names: Iterable[str]) -> None:
    """Raises ValueError if one of a config's fields is below 1."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{type(config).__name__}.{name}={value}: must be at least 1")


def check_rates(config: Any, names: Iterable[str]) -> None:
    """Raises ValueError if one of a config's fields is no valid dropout rate."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"{type(config).__name__}.{name}={value}: allowed are 0 <= rate < 1")


def types_of(config: Any) -> dict[str, Any]:
    """Returns the `dtype` and `param_dtype` of a config as arguments of a layer."""
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def layer_norm(width: int, epsilon: float, config: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Creates a LayerNorm with a config's types."""
    # A few dimensions are far larger than the rest, where the fast variance loses precision.
    return nnx.LayerNorm(
        width, epsilon=epsilon, use_fast_variance=False, rngs=rngs, **types_of(config)
    )
