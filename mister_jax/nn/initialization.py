"""Creates initial parameters fast, and draws them as the released code of MiSTER-E does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.nn.attention import MultiHeadAttention
from mister_jax.nn.convolution import ParallelConvolution
from mister_jax.nn.rngs import rngs_at

_Result = TypeVar("_Result")

# Number of values above which XLA's optimizations save more run time than they cost in
# compilation.
_MAX_UNOPTIMIZED = 5_000_000


class JitInitialization(Generic[_Result]):
    """Compiles a function that creates parameters and is called only a few times.

    On CPU, most of XLA's optimizations are disabled for up to `_MAX_UNOPTIMIZED` values, because
    they would take more time than they save.

    Args:
      function: Function of arrays, at least one of which is a `jax.Array`. The arguments of all
        calls must have the same shapes, types and devices, and must not be traced.
    """

    def __init__(self, function: Callable[..., _Result]):
        self._function = function
        self._lowered: Any = None
        self._compiled: Any = None

    def shapes(self, *args: Any) -> Any:
        """Returns the shapes of the result. This traces the function, but does not compile it."""
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return jax.eval_shape(self._function, *args)
        if self._lowered is None:
            self._lowered = jax.jit(self._function).lower(*args)
        return self._lowered.out_info

    def __call__(self, *args: Any) -> _Result:
        """Returns the result of the function."""
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return self._function(*args)
        if self._compiled is None:
            num_values = sum(leaf.size for leaf in jax.tree.leaves(self.shapes(*args)))
            arrays = (leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array))
            options: dict[str, Any] = {}
            if all(device.platform == "cpu" for device in next(arrays).devices()):
                options["xla_cpu_use_fusion_emitters"] = False
                if not jax.config.read("jax_disable_most_optimizations"):  # The flag sets level 0.
                    options["xla_backend_optimization_level"] = int(num_values > _MAX_UNOPTIMIZED)
            self._compiled = self._lowered.compile(compiler_options=options)
        return self._compiled(*args)


def create_in_one_program(make: Callable[[nnx.Rngs], _Result], rngs: nnx.Rngs) -> _Result:
    """Returns `make(rngs)`, whose operations are compiled and run as one program.

    Otherwise, JAX would compile and optimize each operation separately, which takes several times
    as long for `MisterE`. If the keys of `rngs` are traced, `make(rngs)` is called directly.

    Args:
      make: Function that takes a copy of `rngs` and returns a module or a container of modules. It
        must use no traced arrays except the keys.
      rngs: RNGs for parameter initialization. Their counts increase as in a direct call of `make`.
    """
    streams = dict(rngs.items())
    keys = {name: stream.key.get_value() for name, stream in streams.items()}
    if any(isinstance(key, jax.core.Tracer) for key in keys.values()):
        return make(rngs)
    counts = {name: np.asarray(stream.count.get_value()) for name, stream in streams.items()}
    created_graph: Any = None

    def create(keys: dict[str, jax.Array]) -> Any:
        nonlocal created_graph
        rngs_in_program = rngs_at(keys, counts)
        created_graph, state = nnx.split(make(rngs_in_program))
        return state, {name: stream.count.get_value() for name, stream in rngs_in_program.items()}

    state, new_counts = JitInitialization(create)(keys)
    for name, stream in streams.items():
        is_jax = isinstance(stream.count.get_value(), jax.Array)
        stream.count.set_value(new_counts[name] if is_jax else np.asarray(new_counts[name]))
    return nnx.merge(created_graph, state)


def initialize_like_torch(model: nnx.Module, *, rngs: nnx.Rngs) -> None:
    """Draws parameters again, in place, from the distributions of the released code (PyTorch).

    This applies to `nnx.Linear`, `ParallelConvolution` and `MultiHeadAttention`. PyTorch draws the
    weights and biases of a linear layer or convolution with N inputs from a uniform distribution
    between -1 / sqrt(N) and 1 / sqrt(N). Flax draws weights with three times this variance, and
    sets biases to 0. `GRU` always has PyTorch's distribution.

    In the released code of MiSTER-E, each projection of an attention consists of two consecutive
    linear layers. `MultiHeadAttention` has one layer instead, whose parameters get the distribution
    of the two layers' product.

    Args:
      model: Model whose parameters are drawn.
      rngs: RNGs for parameter initialization.
    """
    modules = [module for _, module in nnx.iter_modules(model)]
    uniform: list[tuple[nnx.Param, int]] = []  # parameters and numbers of inputs
    for module in modules:
        if isinstance(module, ParallelConvolution):
            for kernel, bias in zip(module.kernels, module.biases, strict=True):
                fan_in = kernel.shape[-3] * kernel.shape[-2]
                uniform += [(kernel, fan_in), (bias, fan_in)]
        elif isinstance(module, nnx.Linear):
            fan_in = module.kernel.shape[-2]
            uniform.append((module.kernel, fan_in))
            if module.bias is not None:
                uniform.append((module.bias, fan_in))
    if uniform:
        draws = tuple((parameter.shape, 1 / math.sqrt(fan_in)) for parameter, fan_in in uniform)
        for (parameter, _), value in zip(uniform, _draw_uniform(rngs.params(), draws), strict=True):
            _set(parameter, value)
    for module in modules:
        if isinstance(module, MultiHeadAttention):
            _initialize_attention(module, rngs)


def _initialize_attention(attention: MultiHeadAttention, rngs: nnx.Rngs) -> None:
    """Draws the parameters as products of two layers; see `initialize_like_torch`."""
    *stack, query_dim, dim = attention.query.kernel.shape
    values = _draw_attention(
        rngs.params(),
        tuple(stack),
        query_dim,
        attention.key_value.kernel.shape[-2],
        dim,
        attention.out.kernel.shape[-1],
    )
    parameters = (
        attention.query.kernel,
        attention.query.bias,
        attention.key_value.kernel,
        attention.value_bias,
        attention.out.kernel,
    )
    for parameter, value in zip(parameters, values, strict=True):
        assert parameter is not None
        _set(parameter, value)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _draw_attention(
    key: jax.Array, stack: tuple[int, ...], query_dim: int, key_dim: int, dim: int, out_dim: int
) -> tuple[jax.Array, ...]:
    """Draws the parameters of an attention of width `dim`; see `_initialize_attention`.

    One layer of each product belongs to `torch.nn.MultiheadAttention`, whose initial biases are
    zero. This class projects queries, keys and values with a single layer from `dim` inputs to
    3 * `dim` outputs, which has the uniform distribution of Glorot and Bengio (AISTATS 2010).
    """
    inner, bound = ((*stack, dim, dim), math.sqrt(6 / (4 * dim))), 1 / math.sqrt(dim)
    draws = []
    for in_dim in (query_dim, key_dim, key_dim):
        in_bound = 1 / math.sqrt(in_dim)
        draws += [((*stack, in_dim, dim), in_bound), ((*stack, 1, dim), in_bound), inner]
    draws += [((*stack, dim, dim), bound), ((*stack, dim, out_dim), bound)]
    *projections, out_inner, out_outer = _draw_uniform(key, tuple(draws))
    kernels, biases = [], []
    for kernel, bias, inner_kernel in zip(*(projections[i::3] for i in range(3)), strict=True):
        kernels.append(kernel @ inner_kernel)
        biases.append((bias @ inner_kernel)[..., 0, :])
    key_value_kernel = jnp.concatenate(kernels[1:], axis=-1)
    return kernels[0], biases[0], key_value_kernel, biases[2], out_inner @ out_outer


@functools.partial(jax.jit, static_argnums=1)
def _draw_uniform(
    key: jax.Array, draws: tuple[tuple[tuple[int, ...], float], ...]
) -> list[jax.Array]:
    """Draws an array for each shape and bound; the values are between -bound and bound."""
    sizes = [math.prod(shape) for shape, _ in draws]
    # One draw for all arrays compiles faster than one draw per array.
    values = jax.random.uniform(key, (sum(sizes),), minval=-1, maxval=1)
    parts = jnp.split(values, np.cumsum(sizes)[:-1])
    return [bound * part.reshape(shape) for part, (shape, bound) in zip(parts, draws, strict=True)]


def _set(parameter: nnx.Param, value: jax.Array) -> None:
    # `parameter[...] = value` would be traced and compiled, which is slow.
    parameter.set_raw_value(value.astype(parameter.dtype))
