"""Initial parameters with the distribution of the released code of MiSTER-E."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.nn.attention import MultiHeadAttention
from mister_jax.nn.convolution import ParallelConvolution


def initialize_like_torch(model: nnx.Module, *, rngs: nnx.Rngs) -> None:
    """Draws the parameters of some layers again, in place.

    The layers are `nnx.Linear`, `ParallelConvolution` and `MultiHeadAttention`. PyTorch draws the
    weights and biases of a linear layer or convolution with N inputs from a uniform distribution
    between -1 / sqrt(N) and 1 / sqrt(N). Flax draws weights with three times this variance, and
    sets biases to 0. `GRU` always has PyTorch's distribution.

    In the released code of MiSTER-E, two linear layers in a row come before and after each
    attention. A projection of `MultiHeadAttention` gets the distribution of their product.

    Args:
      model: Model whose parameters are drawn.
      rngs: RNGs for parameter initialization.
    """
    modules = [module for _, module in nnx.iter_modules(model)]

    def draw(parameter: nnx.Param, fan_in: int) -> None:
        _set(parameter, _uniform(rngs, parameter.shape, 1 / math.sqrt(fan_in)))

    for module in modules:
        if isinstance(module, ParallelConvolution):
            for kernel, bias in zip(module.kernels, module.biases, strict=True):
                for parameter in (kernel, bias):
                    draw(parameter, kernel.shape[-3] * kernel.shape[-2])
        elif isinstance(module, nnx.Linear):
            fan_in = module.kernel.shape[-2]
            draw(module.kernel, fan_in)
            if module.bias is not None:
                draw(module.bias, fan_in)
    for module in modules:
        if isinstance(module, MultiHeadAttention):
            _initialize_attention(module, rngs)


def _initialize_attention(attention: MultiHeadAttention, rngs: nnx.Rngs) -> None:
    """Draws the parameters as products of two layers; see `initialize_like_torch`.

    The first or second layer belongs to `torch.nn.MultiheadAttention`, which has no initial biases.
    The projections of queries, keys and values have the distribution of Glorot and Bengio
    (AISTATS 2010) for a layer with three outputs per input.
    """
    *stack, _, dim = attention.query.kernel.shape
    inner_shape = (*stack, dim, dim)
    inner_bound = math.sqrt(6 / (4 * dim))

    def project_in(in_dim: int) -> tuple[jax.Array, jax.Array]:
        inner = _uniform(rngs, inner_shape, inner_bound)
        bound = 1 / math.sqrt(in_dim)
        kernel = _uniform(rngs, (*stack, in_dim, dim), bound)
        bias = _uniform(rngs, (*stack, 1, dim), bound)
        return kernel @ inner, (bias @ inner)[..., 0, :]

    key_dim = attention.key_value.kernel.shape[-2]
    query_kernel, query_bias = project_in(attention.query.kernel.shape[-2])
    key_kernel, _ = project_in(key_dim)
    value_kernel, value_bias = project_in(key_dim)
    bound = 1 / math.sqrt(dim)
    outer = _uniform(rngs, attention.out.kernel.shape, bound)
    _set(attention.query.kernel, query_kernel)
    assert attention.query.bias is not None
    _set(attention.query.bias, query_bias)
    _set(attention.key_value.kernel, jnp.concatenate([key_kernel, value_kernel], axis=-1))
    _set(attention.value_bias, value_bias)
    _set(attention.out.kernel, _uniform(rngs, inner_shape, bound) @ outer)


def _set(parameter: nnx.Param, value: jax.Array) -> None:
    # `parameter[...] = value` is traced and compiled slowly.
    parameter.set_raw_value(value.astype(parameter.dtype))


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
