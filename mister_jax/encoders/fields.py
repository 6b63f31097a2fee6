"""Fields of the encoders' configs: read from a config.json, checked, and turned into types.

What cannot be is refused in one line: the field, its value, and what is allowed.
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
    """The error for a field of a config.json."""
    return InputError(f"config.json: {name}={value!r}: allowed is {allowed}")


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises InputError where a config.json does not have the one value that is supported."""
    for name, allowed in fixed.items():
        if config.get(name, allowed) != allowed:
            raise unsupported(name, config[name], repr(allowed))


def read(config: Mapping[str, Any], table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Reads a config.json.

    Args:
      config: its content.
      table: field of ours -> its name there and what an absent one is, or where none may be absent,
        its type.

    Returns:
      The values by our fields, each of its default's type; lists are tuples.

    Raises:
      InputError: a value of another type.
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
    """Raises ValueError if one of a config's fields is no rate of dropout."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"{type(config).__name__}.{name}={value}: allowed are 0 <= rate < 1")


def types_of(config: Any) -> dict[str, Any]:
    """The `dtype` and `param_dtype` of a config, for layers."""
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def layer_norm(width: int, epsilon: float, config: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A LayerNorm of a config's types."""
    # A few dimensions are far larger than the rest; the fast variance would cancel.
    return nnx.LayerNorm(
        width, epsilon=epsilon, use_fast_variance=False, rngs=rngs, **types_of(config)
    )
