"""Dropout whose mask for a dialogue depends on that dialogue's key alone.

With one key for a whole batch, the mask of a dialogue changes with its place in the batch and with
the number of devices. With one key a dialogue, one device and eight devices drop the same units.

Keys are JAX's own. Which units a key drops is told by a hash of the unit's place and the key, not
by twenty rounds of Threefry: a mask does not need a cipher, and the programs of a training are
compiled in two thirds of the time.
"""

from __future__ import annotations

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx


class KeySource(Protocol):
    """What layers draw dropout keys from: an `nnx.Rngs` or a `PerExampleRngs`."""

    def dropout(self) -> jax.Array:
        """A fresh key: of shape [] for the whole batch, or [B], one a dialogue."""


class PerExampleRngs:
    """A stream of dropout keys with one key a dialogue.

    Args:
      keys: typed keys [B] (`jax.random.key`), one a dialogue of the batch.
    """

    def __init__(self, keys: jax.Array):
        self._keys = keys
        self._drawn = 0

    @classmethod
    def of_batch(cls, key: jax.Array, size: int, offset: jax.Array | int = 0) -> PerExampleRngs:
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
        self,
        x: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
        padded_shape: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """Drops units of x [B, ...].

        Args:
          padded_shape: Shape to which the caller may pad x, needed if more axes than the first
            after the keys' are padded; see `random_bits`. Not used with a single key.

        Raises:
          ValueError: `deterministic` is off, the rate is not 0, and there is no `rngs`.
        """
        if deterministic or self.rate == 0.0:
            return x
        if rngs is None:
            raise ValueError("dropout needs rngs (an nnx.Rngs or PerExampleRngs) in training")
        key = rngs.dropout()
        dropped = random_bits(key, x.shape, padded_shape if key.ndim else None) < jnp.uint32(
            self.rate * 2**32
        )
        return jnp.where(dropped, 0, x / (1 - self.rate))


def random_bits(
    key: jax.Array, shape: tuple[int, ...], padded_shape: tuple[int, ...] | None = None
) -> jax.Array:
    """Random bits by a hash, each of a place and a key, for masks and nothing that asks for more.

    Places count along the axes that are not the key's, the last one fastest, so a sequence [T, F]
    that is padded has the same bits in front. A round of MurmurHash3's finaliser, which changes
    half of its output's bits with any bit of its input, follows each half of the key.

    Args:
      key: typed keys of the array's first axes; [] for one key of it all.
      shape: of the array; of each key less than 2**32 places, beyond which they repeat.
      padded_shape: shape of a larger array, of which this one has the corner's bits; none if None.

    Returns:
      uint32 of the shape.
    """
    words = jax.random.key_data(key)
    strides = [math.prod((padded_shape or shape)[axis + 1 :]) for axis in range(len(shape))]
    mixed = jnp.zeros(shape, jnp.uint32)
    for axis in range(key.ndim, len(shape)):
        step = strides[axis] * _ODD % 2**32
        mixed += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(step)
    for word in range(words.shape[-1]):
        own = words[..., word].reshape(key.shape + (1,) * (len(shape) - key.ndim))
        mixed = _finalised(mixed ^ own)
    return mixed


_ODD = 0x9E3779B1  # Neighbours, that differ in the last bits alone, are taken apart first.


def _finalised(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser of 32 bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
