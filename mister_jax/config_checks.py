"""Checks for the fields of config dataclasses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

DTYPES = ("float32", "bfloat16")


def invalid_field(config: Any, field: str, allowed: str) -> ValueError:
    """Returns the error for a config field with an invalid value."""
    name = f"{type(config).__name__}.{field}"
    return ValueError(f"{name}={getattr(config, field)!r}; allowed: {allowed}")


def check_at_least(config: Any, minimum: int, *fields: str) -> None:
    """Raises ValueError if one of the fields is below the minimum."""
    for field in fields:
        if not getattr(config, field) >= minimum:  # also rejects NaN
            raise invalid_field(config, field, f"at least {minimum}")


def check_multiple(config: Any, field: str, divisor: str) -> None:
    """Raises ValueError if the value of `field` is not a multiple of the value of `divisor`."""
    if getattr(config, field) % getattr(config, divisor):
        allowed = f"a multiple of {divisor}={getattr(config, divisor)}"
        raise invalid_field(config, field, allowed)


def check_rates(config: Any, *fields: str) -> None:
    """Raises ValueError if one of the fields is not a rate, 0 <= rate < 1."""
    for field in fields:
        if not 0 <= getattr(config, field) < 1:
            raise invalid_field(config, field, "0 <= rate < 1")


def check_choice(config: Any, field: str, choices: Iterable[str | None]) -> None:
    """Raises ValueError if the field's value is not one of the choices."""
    if getattr(config, field) not in choices:
        raise invalid_field(config, field, ", ".join(map(str, choices)))


def check_dtypes(config: Any) -> None:
    """Raises ValueError if `dtype` or `param_dtype` is not one of `DTYPES`."""
    check_choice(config, "dtype", DTYPES)
    check_choice(config, "param_dtype", DTYPES)
