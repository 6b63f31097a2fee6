"""Dtypes of sums and states that need more precision than bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Returns float64 for float64 if `jax_enable_x64` is on, otherwise float32.

    `jnp.promote_types` with float32 would raise an error if implicit promotion is disabled.
    """
    is_float64 = jax.dtypes.canonicalize_dtype(dtype) == jnp.float64
    return jnp.dtype(jnp.float64 if is_float64 else jnp.float32)
