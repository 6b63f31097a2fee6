"""Parallel convolutions, compared with the convolutions of JAX and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.nn import ParallelConvolution

SIZES = (1, 3, 5)
MASK = np.arange(7) < np.array([[7], [2], [4]])


def convolution_and_input(kernel_sizes=SIZES):
    convolution = nnx.jit(lambda: ParallelConvolution(3, 4, kernel_sizes, rngs=nnx.Rngs(0)))()
    random = np.random.default_rng(0)
    for bias in convolution.biases:
        bias.set_value(random.normal(size=4).astype(np.float32))
    return convolution, random.normal(size=(*MASK.shape, 3)).astype(np.float32)


def test_output_is_the_sum_of_one_convolution_per_size():
    convolution, x = convolution_and_input()

    @jax.jit
    def branch(kernel, bias):
        convolved = jax.lax.conv_general_dilated(
            jnp.where(MASK[..., None], x, 0),
            kernel.transpose(1, 0, 2),  # size, in, out
            window_strides=(1,),
            padding="SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return jax.nn.relu(convolved + bias)

    branches = zip(convolution.kernels, convolution.biases, strict=True)
    expected = sum(branch(kernel[...], bias[...]) for kernel, bias in branches)
    np.testing.assert_allclose(jax.jit(convolution)(x, MASK), expected, atol=1e-5)


def test_padding_does_not_change_valid_steps():
    convolution, x = convolution_and_input()
    longer = np.full((3, 28, 3), np.nan, np.float32)
    longer[:, :7] = np.where(MASK[..., None], x, np.inf)
    run = jax.jit(convolution)
    outputs = np.asarray(run(longer, np.pad(MASK, ((0, 0), (0, 21)))))[:, :7]
    np.testing.assert_allclose(outputs[MASK], np.asarray(run(x, MASK))[MASK], atol=1e-6)


def test_a_dialogue_may_be_shorter_than_the_kernel():
    convolution, x = convolution_and_input((5,))
    outputs = jax.jit(convolution)(x[:, :1], MASK[:, :1])
    kernel, bias = np.asarray(convolution.kernels[0]), np.asarray(convolution.biases[0])
    np.testing.assert_allclose(outputs, np.maximum(x[:, :1] @ kernel[:, 2] + bias, 0), atol=1e-6)


@pytest.mark.parametrize("kernel_sizes", [(), (2,), (1, 0), (-1,)])
def test_even_and_non_positive_kernel_sizes_raise(kernel_sizes):
    with pytest.raises(ValueError, match="odd sizes"):
        ParallelConvolution(3, 4, kernel_sizes, rngs=nnx.Rngs(0))


@pytest.mark.parity
def test_equals_pytorch():
    import torch

    convolution, x = convolution_and_input()
    expected = 0
    for size, kernel, bias in zip(SIZES, convolution.kernels, convolution.biases, strict=True):
        reference = torch.nn.Conv1d(3, 4, size, padding="same")
        reference.weight.data = torch.tensor(np.asarray(kernel[...]).transpose(2, 0, 1))
        reference.bias.data = torch.tensor(np.asarray(bias[...]))
        masked = torch.tensor(np.where(MASK[..., None], x, 0)).transpose(1, 2)
        expected = expected + torch.relu(reference(masked)).transpose(1, 2).detach().numpy()
    np.testing.assert_allclose(jax.jit(convolution)(x, MASK), expected, atol=1e-5)


def test_causal_convolutions_cover_the_last_steps():
    centered, x = convolution_and_input()
    causal = ParallelConvolution(3, 4, SIZES, causal=True, rngs=nnx.Rngs(0))
    nnx.update(causal, nnx.state(centered))
    # At each step, the kernel of size k is applied to this step and the k - 1 steps before it.
    expected = 0
    for size, kernel, bias in zip(SIZES, causal.kernels, causal.biases, strict=True):
        padded = jnp.pad(jnp.where(MASK[..., None], x, 0), ((0, 0), (size - 1, 0), (0, 0)))
        windows = jnp.stack([padded[:, tap : tap + 7] for tap in range(size)], axis=2)
        expected += jax.nn.relu(jnp.einsum("btsi,iso->bto", windows, kernel[...]) + bias[...])
    np.testing.assert_allclose(causal(x, MASK), expected, atol=1e-5)
    with pytest.raises(ValueError, match="steps need causal convolutions"):
        centered.initial_state(1)
