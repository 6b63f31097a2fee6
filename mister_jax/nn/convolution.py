"""Parallel temporal convolutions over padded dialogues."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class ParallelConvolution(nnx.Module):
    """One-dimensional convolutions of several widths side by side, ReLU each, summed.

    The taps of a kernel are column blocks of one matrix product over the unpadded input; the
    blocks are then shifted in time and added. That is as many multiplications as a convolution,
    at the speed of a large matrix product on every backend.

    Args:
      in_features: I, width of the input.
      out_features: O, width of the output.
      kernel_sizes: odd numbers of steps; a kernel of k sees (k - 1) / 2 steps to either side.
      dtype: of the computation.
      param_dtype: of the parameters; `kernels` are [I, size, O], `biases` [O].

    Raises:
      ValueError: no kernel, or an even or non-positive size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_sizes: Sequence[int] = (1, 3, 5),
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not kernel_sizes or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes={tuple(kernel_sizes)}: allowed are odd sizes >= 1")
        self.dtype = dtype
        initial = nnx.initializers.lecun_normal(in_axis=(0, 1))
        self.kernels = nnx.List(
            nnx.Param(initial(rngs.params(), (in_features, size, out_features), param_dtype))
            for size in kernel_sizes
        )
        self.biases = nnx.List(
            nnx.Param(jnp.zeros(out_features, param_dtype)) for _ in kernel_sizes
        )

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Convolves.

        Args:
          x: [B, T, I].
          mask: true at valid steps, [B, T] bool; other steps count as zeros.

        Returns:
          [B, T, O]; what stands where the mask is false has no meaning.
        """
        x = jnp.where(mask[..., None], x, 0).astype(self.dtype)
        branches = zip(self.kernels, self.biases, strict=True)
        return sum(
            (self._branch(x, kernel[...], bias[...]) for kernel, bias in branches),
            start=jnp.zeros((), self.dtype),
        )

    def _branch(self, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        time, size = x.shape[1], kernel.shape[1]
        taps = jnp.einsum("bti,iso->btso", x, kernel.astype(self.dtype))
        taps = jnp.pad(taps, ((0, 0), (size // 2, size // 2), (0, 0), (0, 0)))
        convolved = sum(taps[:, tap : tap + time, tap] for tap in range(size))  # B T O
        return jax.nn.relu(convolved + bias.astype(self.dtype))
