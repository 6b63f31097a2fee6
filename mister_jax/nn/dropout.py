"""Dropout whose mask for a dialogue depends on that dialogue's key alone.

With one key for a whole batch, the mask of a dialogue changes with its place in the batch and with
the number of devices. With one key a dialogue, one device and eight devices drop the same units.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx


class KeySource(Protocol):
    """What layers draw dropout keys from: an `nnx.Rngs` or a `DialogueKeys`."""

    def dropout(self) -> jax.Array:
        """A fresh key: of shape [] for the whole batch, or [B], one a dialogue."""


class DialogueKeys:
    """A stream of dropout keys with one key a dialogue.

    Args:
      keys: typed keys [B] (`jax.random.key`), one a dialogue of the batch.
    """

    def __init__(self, keys: jax.Array):
        self._keys = keys
        self._drawn = 0

    @classmethod
    def of_batch(cls, key: jax.Array, size: int, offset: jax.Array | int = 0) -> DialogueKeys:
        """Keys for dialogues `offset ... offset + size - 1` of a batch whose key is `key` []."""
        return cls(jax.vmap(jax.random.fold_in, (None, 0))(key, offset + jnp.arange(size)))

    def dropout(self) -> jax.Array:
        """The next keys [B]; each call gives different ones."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(self._keys, self._drawn)
        self._drawn += 1
        return keys


class Dropout(nnx.Module):
    """Zeroes units with probability `rate` and scales the others by 1 / (1 - rate)."""

    def __init__(self, rate: float):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate {rate}: allowed are 0 <= rate < 1")
        self.rate = rate

    def __call__(
        self, x: jax.Array, *, deterministic: bool = True, rngs: KeySource | None = None
    ) -> jax.Array:
        """Drops units of x [B, ...].

        Raises:
          ValueError: `deterministic` is off, the rate is not 0, and there is no `rngs`.
        """
        if deterministic or self.rate == 0.0:
            return x
        if rngs is None:
            raise ValueError("dropout needs rngs (an nnx.Rngs or DialogueKeys) in training")
        key = rngs.dropout()
        if key.shape:
            keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.rate, x.shape[1:]))(key)
        else:
            keep = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0)
