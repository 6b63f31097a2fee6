"""A linear layer whose kernel may be bfloat16 or int8, and frozen while a low-rank path learns.

LoRA (arXiv 2106.09685) adds x a b to what a frozen kernel gives. The low-rank matrices and nothing
else are of type `nnx.LoRAParam`, so that is the filter for them, and `nnx.Not(nnx.LoRAParam)` the
one for the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mister_jax.nn.dropout import Dropout, KeySource

AnyModule = TypeVar("AnyModule", bound=nnx.Module)
_INT8_MAX = 127


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which layers get a low-rank path, and its shape.

    Attributes:
      rank: r, columns of the first matrix.
      alpha: the path's output is multiplied by alpha / r.
      dropout: rate on the path's input.
      targets: names of the layers, or the ends of their paths if a name is not enough:
        "query", "attention/query".
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"LoRAConfig.rank={self.rank}: must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"LoRAConfig.alpha={self.alpha}: must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRAConfig.dropout={self.dropout}: allowed are 0 <= rate < 1")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"LoRAConfig.targets={self.targets!r}: must be a tuple of names")

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


class QuantizedParam(nnx.Variable):
    """An int8 kernel or its scales. Not an `nnx.Param`, so nothing takes its gradient."""


class LoRALinear(nnx.Module):
    """x kernel + bias, and with LoRA + alpha / r * dropout(x) lora_a lora_b.

    A layer is made without LoRA; `add_lora` gives it the low-rank path, `quantize` an int8 kernel.
    Layers stacked along a leading axis L are given theirs in the same way.

    Attributes:
      kernel: [in, out], an `nnx.Param`, or int8 as a `QuantizedParam`.
      kernel_scale: of an int8 kernel, what an output's column is multiplied by [out], else None.
      bias: [out] or None.
      lora: of the low-rank path, or None.
      lora_a: [in, r] float32, or None without LoRA.
      lora_b: [r, out] float32, likewise.

    Args:
      in_features: width of the input.
      out_features: width of the output.
      use_bias: adds a bias.
      dtype: of the computation; the low-rank path is float32.
      param_dtype: of kernel and bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.param_dtype = param_dtype
        kernel = nnx.initializers.lecun_normal()(
            rngs.params(), (in_features, out_features), param_dtype
        )
        self.kernel: nnx.Variable = nnx.Param(kernel)
        self.kernel_scale: QuantizedParam | None = nnx.data(None)
        bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if use_bias else None
        self.bias: nnx.Param | None = nnx.data(bias)
        self.lora: LoRAConfig | None = None
        self.lora_dropout = Dropout(0.0)
        self.lora_a: Any = nnx.data(None)
        self.lora_b: Any = nnx.data(None)

    def __call__(
        self, x: jax.Array, *, deterministic: bool = True, rngs: KeySource | None = None
    ) -> jax.Array:
        """Multiplies x [..., in]; gives [..., out] in `dtype`."""
        x = x.astype(self.dtype)
        kernel = self.kernel[...].astype(self.dtype)
        if self.kernel_scale is None:
            y = x @ kernel
        else:
            # Every int8 is a bfloat16, so the scales alone need the wider type.
            y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
            y = (y * self.kernel_scale[...]).astype(self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if self.lora is None:
            return y
        dropped = self.lora_dropout(x, deterministic=deterministic, rngs=rngs)
        low_rank = dropped.astype(jnp.float32) @ self.lora_a[...] @ self.lora_b[...]
        return (y + self.lora.scale * low_rank).astype(self.dtype)


def add_lora(module: AnyModule, config: LoRAConfig, *, rngs: nnx.Rngs) -> AnyModule:
    """Gives a low-rank path to the layers the config names.

    The first matrix is uniform within 1 / sqrt(in), the second zero, so no output changes. A path
    that is there already is replaced, also that of a module from `nnx.eval_shape`.

    Args:
      module: whose `LoRALinear` layers are looked through; changed in place.
      config: of the paths.
      rngs: for the first matrices.

    Returns:
      The module.

    Raises:
      ValueError: a target that is the name of no such layer.
    """
    layers = dict(linear_layers(module))
    chosen = {target: [path for path in layers if _ends(path, target)] for target in config.targets}
    unknown = [target for target, paths in chosen.items() if not paths]
    if unknown:
        names = sorted({path.rpartition("/")[2] for path in layers})
        raise ValueError(f"LoRA targets {unknown}: no such layers; allowed are {names}")
    for path in sorted(set().union(*chosen.values())):
        layer = layers[path]
        *stacked, in_features, out_features = layer.kernel.shape
        bound = in_features**-0.5
        first = jax.random.uniform(
            rngs.params(), (*stacked, in_features, config.rank), minval=-bound, maxval=bound
        )
        layer.lora = config
        layer.lora_dropout = Dropout(config.dropout)
        layer.lora_a = nnx.LoRAParam(first)
        layer.lora_b = nnx.LoRAParam(jnp.zeros((*stacked, config.rank, out_features)))
    return module


def merge_lora(module: AnyModule) -> AnyModule:
    """Adds every low-rank path to its kernel and takes it away; outputs without dropout stay.

    An int8 kernel becomes one of `param_dtype`, since int8 could not hold the sum; `quantize` may
    follow.

    Args:
      module: changed in place.

    Returns:
      The module.
    """
    for _, layer in linear_layers(module):
        if layer.lora is None:
            continue
        scale = None if layer.kernel_scale is None else layer.kernel_scale[...]
        merged = _merged(
            layer.kernel[...], scale, layer.lora_a[...], layer.lora_b[...], layer.lora.scale
        )
        layer.kernel = nnx.Param(merged.astype(layer.param_dtype))
        layer.kernel_scale = nnx.data(None)
        layer.lora = None
        layer.lora_dropout = Dropout(0.0)
        layer.lora_a = nnx.data(None)
        layer.lora_b = nnx.data(None)
    return module


def quantize(module: AnyModule) -> AnyModule:
    """Turns the kernels of all `LoRALinear` layers to int8, symmetric, one scale an output.

    A weight moves by at most 1 / 254 of the largest in its column. Low-rank paths stay.

    Args:
      module: changed in place.

    Returns:
      The module.
    """
    for _, layer in linear_layers(module):
        if layer.kernel_scale is None:
            kernel, scale = _quantized(layer.kernel[...])
            layer.kernel, layer.kernel_scale = QuantizedParam(kernel), QuantizedParam(scale)
    return module


def dequantize(module: AnyModule) -> AnyModule:
    """Turns int8 kernels back to ones of `param_dtype`, of the values that int8 left of them.

    Args:
      module: changed in place.

    Returns:
      The module.
    """
    for _, layer in linear_layers(module):
        if layer.kernel_scale is not None:
            kernel = _dequantized(layer.kernel[...], layer.kernel_scale[...])
            layer.kernel = nnx.Param(kernel.astype(layer.param_dtype))
            layer.kernel_scale = nnx.data(None)
    return module


def linear_layers(module: nnx.Module) -> Iterator[tuple[str, LoRALinear]]:
    """All `LoRALinear` layers in a module by their "/"-joined paths."""
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, LoRALinear):
            yield "/".join(map(str, path)), layer


def _ends(path: str, target: str) -> bool:
    return f"/{path}".endswith(f"/{target}")


@jax.jit
def _merged(kernel: jax.Array, kernel_scale: Any, first: Any, second: Any, scale: float):
    base = kernel if kernel_scale is None else _dequantized(kernel, kernel_scale)
    return base.astype(jnp.float32) + scale * jnp.matmul(first, second, precision="highest")


@jax.jit
def _quantized(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(-2)  # ... out
    scale = jnp.where(largest == 0, 1.0, largest / _INT8_MAX)
    return jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), scale


@jax.jit
def _dequantized(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    return kernel.astype(jnp.float32) * scale[..., None, :]
