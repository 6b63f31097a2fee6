"""Dropout with one key per example.

The mask of an example depends only on its key, not on the other examples or on the number of
devices.

The keys are ordinary JAX keys, but the mask bits and the next keys are computed by a cheap hash,
not by Threefry, JAX's default generator. Threefry runs 20 rounds per value, which dropout does not
need: the bits only have to look independent. With the hash, training steps compile faster.
"""

from __future__ import annotations

import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class KeySource(Protocol):
    """Source of dropout keys: an `nnx.Rngs` or a `PerExampleRngs`."""

    def dropout(self) -> jax.Array:
        """Returns one new typed key for the batch, [], or one per example, [B]."""


class PerExampleRngs:
    """Stream of dropout keys, with one key per example.

    Args:
      keys: Typed keys (`jax.random.key`), [B].
    """

    def __init__(self, keys: jax.Array):
        self._keys = keys
        self._num_draws = 0

    @classmethod
    def from_batch_key(
        cls, key: jax.Array, batch_size: int, offset: jax.Array | int = 0
    ) -> PerExampleRngs:
        """Derives one key per example from a single key.

        Args:
          key: Typed key of the global batch, [].
          batch_size: Number of examples on this device, B.
          offset: Position of this device's first example in the global batch.
        """
        return cls(fold_in(key, offset + jnp.arange(batch_size)))

    def dropout(self) -> jax.Array:
        """Returns new keys, [B]; the keys differ between calls."""
        # The first word of a key stays the same, so that XLA can compute the hash of this word once
        # for all masks of one shape.
        words = jax.random.key_data(self._keys)
        change = np.zeros(words.shape[-1], np.uint32)
        change[-1] = self._num_draws * _MULTIPLIER % 2**32
        self._num_draws += 1
        return _wrap(words + change, like=self._keys)


def rngs_from_key(key: jax.Array) -> KeySource:
    """Returns a stream of dropout keys. `key` is a single key, [], or one key per example, [B]."""
    return PerExampleRngs(key) if key.shape else nnx.Rngs(dropout=key)


class Dropout(nnx.Module):
    """Sets units to zero with probability `rate` and scales the others by 1 / (1 - rate).

    Args:
      rate: Dropout rate, 0 <= rate < 1.

    Raises:
      ValueError: The rate is out of range.
    """

    def __init__(self, rate: float):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate {rate}; allowed: 0 <= rate < 1")
        self.rate = rate

    def __call__(
        self,
        x: jax.Array,
        *,
        deterministic: bool = True,
        rngs: KeySource | None = None,
        padded_shape: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """Applies dropout.

        Args:
          x: Input, [B, ...].
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys; required if dropout is on.
          padded_shape: Largest shape that x may be padded to; see `random_bits`. This argument is
            needed only if several axes of x are padded, and has no effect without per-example keys.

        Returns:
          Result in the shape and dtype of x.

        Raises:
          ValueError: Dropout is on and `rngs` is missing, or the number of keys is not B.
        """
        if deterministic or self.rate == 0.0:
            return x
        if rngs is None:
            raise ValueError("dropout needs rngs (an nnx.Rngs or PerExampleRngs) in training")
        key = rngs.dropout()
        dropped = random_mask(key, x.shape, self.rate, padded_shape if key.ndim else None)
        return jnp.where(dropped, 0, x / (1 - self.rate))


def fold_in(keys: jax.Array, data: jax.Array | int) -> jax.Array:
    """Derives new keys for `random_bits` from keys and integers, like `jax.random.fold_in`.

    Args:
      keys: Typed keys.
      data: Non-negative integers, broadcastable against the keys.

    Returns:
      Typed keys.
    """
    words = jax.random.key_data(keys)
    new_words = []
    mixed = jnp.asarray(data, jnp.uint32) * jnp.uint32(_MULTIPLIER) + jnp.uint32(1)
    for word in range(words.shape[-1]):
        mixed = _murmur3_finalizer(words[..., word] ^ mixed)
        new_words.append(mixed)
    return _wrap(jnp.stack(new_words, axis=-1), like=keys)


def random_mask(
    key: jax.Array,
    shape: tuple[int, ...],
    probability: float,
    padded_shape: tuple[int, ...] | None = None,
) -> jax.Array:
    """Returns a bool mask whose elements are True with `probability`; see `random_bits`."""
    return random_bits(key, shape, padded_shape) < jnp.uint32(probability * 2**32)


def random_bits(
    key: jax.Array, shape: tuple[int, ...], padded_shape: tuple[int, ...] | None = None
) -> jax.Array:
    """Hashes every position of an array with the position's key.

    The bits are random enough for masks, but not for sampling.

    A position is the row-major index over the axes after the key's axes. Padding the time axis of a
    sequence [T, F] therefore does not change its bits. If other axes may also be padded, pass
    `padded_shape`; positions are then computed as if the array had that shape. Each word of the key
    is mixed in by one MurmurHash3 finalizer, in which every input bit flips half of the output bits
    on average.

    Args:
      key: Typed keys for the leading axes, or one key [] for the whole array.
      shape: Shape of the array; bits repeat after 2**32 positions of one key.
      padded_shape: Shape after padding at the end of each axis; `shape` by default.

    Returns:
      Random bits, uint32 with shape `shape`.

    Raises:
      ValueError: The shape of the keys is not that of the leading axes.
    """
    if key.shape != tuple(shape[: key.ndim]):
        raise ValueError(
            f"dropout keys have shape {key.shape} for an array of shape {tuple(shape)}; allowed: "
            f"{tuple(shape[: key.ndim])}, one key per row"
        )
    key_words = jax.random.key_data(key)
    strides = [math.prod((padded_shape or shape)[axis + 1 :]) for axis in range(len(shape))]
    bits = jnp.zeros(shape, jnp.uint32)
    for axis in range(key.ndim, len(shape)):
        step = strides[axis] * _MULTIPLIER % 2**32
        bits += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(step)
    for word in range(key_words.shape[-1]):
        key_word = key_words[..., word].reshape(key.shape + (1,) * (len(shape) - key.ndim))
        bits = _murmur3_finalizer(bits ^ key_word)
    return bits


# This factor spreads neighboring positions, which differ only in their last bits, over all 32 bits.
_MULTIPLIER = 0x9E3779B1


def _wrap(words: jax.Array, *, like: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(like))


def _murmur3_finalizer(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
