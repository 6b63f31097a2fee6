"""Keys for the initialization of modules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Number of keys that one operation computes.
_BLOCK_SIZE = 64


class _InitRngs:
    """Source of the keys that `nnx.Rngs` returns for parameters.

    `nnx.Rngs` computes each key with operations of its own. Their compilation would take most of
    the time of an initialization that is compiled as one program.
    """

    def __init__(self, key: jax.Array):
        self._key = key
        self._count = 0
        self._block = key[None]

    def params(self) -> jax.Array:
        """Returns the next key, []."""
        position = self._count % _BLOCK_SIZE
        if position == 0:
            self._block = _fold_in_block(self._key, self._count)
        self._count += 1
        return jax.lax.index_in_dim(self._block, position, keepdims=False)


@jax.jit
def _fold_in_block(key: jax.Array, start: int) -> jax.Array:
    counts = start + jnp.arange(_BLOCK_SIZE, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, counts)


def make_rngs(key: jax.Array | int) -> nnx.Rngs:
    """Returns RNGs for the parameters of a module, with the same keys as `nnx.Rngs(key)`.

    Compared with `nnx.Rngs`, the initialization of a module is traced and compiled faster.

    Args:
      key: Typed key or seed.
    """
    rngs: Any = _InitRngs(jax.random.key(key) if isinstance(key, int) else key)
    return rngs
