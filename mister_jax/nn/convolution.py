"""Parallel temporal convolutions over padded dialogues."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class ParallelConvolution(nnx.Module):
    """Sum of 1D convolutions with different kernel sizes, each followed by a ReLU.

    Each convolution is one matrix product that applies all taps to the input. The results of the
    taps are then shifted in time and added. This takes as many multiplications as a convolution,
    and large matrix products are fast on every backend.

    Attributes:
      kernels: One kernel per size, [in_dim, size, out_dim].
      biases: One bias per size, [out_dim].

    Args:
      in_dim: Input size I.
      out_dim: Output size O.
      kernel_sizes: Odd numbers of taps; a kernel of size k covers (k - 1) / 2 steps on each side.
      causal: Whether a kernel of size k instead covers the current step and the previous k - 1
        steps.
      dtype: Computation dtype.
      param_dtype: Parameter dtype.
      rngs: RNGs for parameter initialization.

    Raises:
      ValueError: `kernel_sizes` is empty, or a size is even or below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_sizes: Sequence[int] = (1, 3, 5),
        *,
        causal: bool = False,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not kernel_sizes or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes={tuple(kernel_sizes)}; allowed: odd sizes >= 1")
        self.causal = causal
        self.dtype = dtype
        initializer = nnx.initializers.lecun_normal(in_axis=(0, 1))
        self.kernels = nnx.List(
            nnx.Param(initializer(rngs.params(), (in_dim, size, out_dim), param_dtype))
            for size in kernel_sizes
        )
        self.biases = nnx.List(nnx.Param(jnp.zeros(out_dim, param_dtype)) for _ in kernel_sizes)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Applies the convolutions.

        Args:
          x: Input, [B, T, I].
          mask: Valid steps, [B, T] bool; other steps count as zeros.

        Returns:
          Sum of the convolutions, [B, T, O]; meaningless where the mask is False.
        """
        x = jnp.where(mask[..., None], x, 0).astype(self.dtype)
        branches = zip(self.kernels, self.biases, strict=True)
        return sum(
            (self._branch(x, kernel[...], bias[...]) for kernel, bias in branches),
            start=jnp.zeros((), self.dtype),
        )

    def initial_state(self, batch_size: int) -> jax.Array:
        """Returns the state before the first `step`: the inputs of the previous S steps, [B, S, I].

        S is the largest kernel size minus 1.

        Raises:
          ValueError: The convolutions are not causal.
        """
        if not self.causal:
            raise ValueError("causal=False; steps need causal convolutions")
        in_dim = self.kernels[0].shape[0]
        num_past = max(kernel.shape[1] for kernel in self.kernels) - 1
        return jnp.zeros((batch_size, num_past, in_dim), self.dtype)

    def step(self, state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Applies the convolutions to the next step.

        Args:
          state: State after the previous step.
          x: Input of this step, [B, I].

        Returns:
          The new state, and the sum of the convolutions, [B, O].
        """
        inputs = jnp.concatenate([state, x[:, None].astype(self.dtype)], axis=1)
        output = jnp.zeros((), self.dtype)
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            taps = kernel[...].astype(self.dtype)  # I S O
            convolved = jnp.einsum("bsi,iso->bo", inputs[:, -taps.shape[1] :], taps)
            output += jax.nn.relu(convolved + bias[...].astype(self.dtype))
        return inputs[:, 1:], output

    def _branch(self, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        time, size = x.shape[1], kernel.shape[1]
        taps = jnp.einsum("bti,iso->btso", x, kernel.astype(self.dtype))
        padding = (size - 1, 0) if self.causal else (size // 2, size // 2)
        taps = jnp.pad(taps, ((0, 0), padding, (0, 0), (0, 0)))
        convolved = sum(taps[:, tap : tap + time, tap] for tap in range(size))  # B T O
        return jax.nn.relu(convolved + bias.astype(self.dtype))
