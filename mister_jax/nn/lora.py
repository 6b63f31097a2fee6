"""LoRA (arXiv 2106.09685): low-rank adapters for linear layers with float or int8 kernels.

A low-rank path adds scale * x lora_a lora_b to the output of a frozen kernel. The filter
`nnx.LoRAParam` selects the low-rank matrices; `nnx.Not(nnx.LoRAParam)` selects everything else.
"""

from __future__ import annotations

import dataclasses
import math
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
    """Config of the low-rank paths.

    Attributes:
      rank: Rank r of the low-rank matrices.
      alpha: Numerator of the scale.
      dropout: Dropout rate on the input of the low-rank path.
      targets: Layers that get a low-rank path, given by name ("query") or by the end of their path
        if the name is ambiguous ("attention/query"). A leading "/" marks a complete path.
      use_rslora: Whether the scale is alpha / sqrt(r) (arXiv 2312.03732) instead of alpha / r.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "value")
    use_rslora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"LoRAConfig.rank={self.rank}; allowed: at least 1")
        if self.alpha <= 0:
            raise ValueError(f"LoRAConfig.alpha={self.alpha}; allowed: positive numbers")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRAConfig.dropout={self.dropout}; allowed: 0 <= rate < 1")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"LoRAConfig.targets={self.targets!r}; allowed: a tuple of names")

    @property
    def scale(self) -> float:
        """Factor that multiplies the output of the low-rank path."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class QuantizedParam(nnx.Variable):
    """Int8 kernel or its scales; not an `nnx.Param`, so it gets no gradient."""


class LoRALinear(nnx.Module):
    """Linear layer: x kernel + bias, plus scale * dropout(x) lora_a lora_b if it has LoRA.

    A new layer has no LoRA: `add_lora` adds the low-rank path. `quantize` converts the kernel to
    int8. Both functions also work on layers that are stacked along a leading axis L.

    Attributes:
      kernel: Kernel, [in, out]; an `nnx.Param`, or an int8 `QuantizedParam`.
      kernel_scale: Scale of each output of an int8 kernel, [out]; otherwise None.
      bias: Bias, [out], or None.
      lora: Config of the low-rank path, or None.
      lora_a: First matrix, [in, r] float32, or None without LoRA.
      lora_b: Second matrix, [r, out] float32, or None without LoRA.

    Args:
      in_features: Input size.
      out_features: Output size.
      use_bias: Whether to add a bias.
      quantizable: Whether `quantize` applies; False for small layers that should stay exact.
      dtype: Dtype of the computation and the output; the input is cast to it. The low-rank path
        computes in float32.
      param_dtype: Dtype of the kernel and the bias.
      rngs: RNGs for kernel initialization.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        quantizable: bool = True,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.quantizable = quantizable
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
        """Applies the layer to x [..., in]; returns [..., out] in `dtype`."""
        x = x.astype(self.dtype)
        kernel = self.kernel[...].astype(self.dtype)
        if self.kernel_scale is None:
            y = x @ kernel
        else:
            # bfloat16 represents every int8 value exactly, so only the scales need float32.
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
    """Adds a low-rank path to the target layers.

    The first matrix is uniform in [-1 / sqrt(in), 1 / sqrt(in)]. The second matrix is zero, so the
    outputs do not change. Existing low-rank paths of the target layers are replaced. The module may
    come from `nnx.eval_shape`.

    Args:
      module: Module with `LoRALinear` layers; changed in place.
      config: Config of the low-rank paths.
      rngs: RNGs for the initialization of the first matrices.

    Returns:
      The module.

    Raises:
      ValueError: A target does not match any `LoRALinear` layer.
    """
    layers = dict(linear_layers(module))
    matches = {
        target: [path for path in layers if _matches(path, target)] for target in config.targets
    }
    unknown = [target for target, paths in matches.items() if not paths]
    if unknown:
        names = sorted({path.rpartition("/")[2] for path in layers})
        allowed = f"allowed: {names}" if names else f"{type(module).__name__} has none"
        raise ValueError(
            f"LoRA targets {unknown}: no such layers of type mister_jax.nn.lora.LoRALinear; "
            f"{allowed}"
        )
    for path in sorted(set().union(*matches.values())):
        layer = layers[path]
        *stacked, in_features, out_features = layer.kernel.shape
        bound = in_features**-0.5
        lora_a = jax.random.uniform(
            rngs.params(), (*stacked, in_features, config.rank), minval=-bound, maxval=bound
        )
        layer.lora = config
        layer.lora_dropout = Dropout(config.dropout)
        layer.lora_a = nnx.LoRAParam(lora_a)
        layer.lora_b = nnx.LoRAParam(jnp.zeros((*stacked, config.rank, out_features)))
    return module


def merge_lora(module: AnyModule) -> AnyModule:
    """Merges every low-rank path into its kernel.

    Without dropout, outputs stay the same up to rounding.

    An int8 kernel is converted to `param_dtype`, because int8 cannot represent the sum. To convert
    the kernel back to int8, call `quantize`.

    Args:
      module: Module to change in place.

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
    """Quantizes `LoRALinear` kernels to int8, symmetrically, with one scale per output.

    A weight changes by at most 1 / 254 of the largest absolute value in its column. Low-rank paths
    do not change.

    Args:
      module: Module to change in place; layers that are not `quantizable` do not change.

    Returns:
      The module.
    """
    for _, layer in linear_layers(module):
        if layer.kernel_scale is None and layer.quantizable:
            kernel, scale = _quantized(layer.kernel[...])
            layer.kernel, layer.kernel_scale = QuantizedParam(kernel), QuantizedParam(scale)
    return module


def dequantize(module: AnyModule) -> AnyModule:
    """Converts int8 kernels to `param_dtype`; the rounding error of `quantize` remains.

    Args:
      module: Module to change in place.

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
    """Yields all `LoRALinear` layers of a module with their "/"-joined paths."""
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, LoRALinear):
            yield "/".join(map(str, path)), layer


def _matches(path: str, target: str) -> bool:
    """Returns whether `target` names the layer at `path`.

    A target with a leading "/" is the complete path. Any other target is the last part or parts of
    the path.
    """
    return path == target[1:] if target.startswith("/") else f"/{path}".endswith(f"/{target}")


@jax.jit
def _merged(kernel: jax.Array, kernel_scale: Any, lora_a: Any, lora_b: Any, scale: float):
    base = kernel if kernel_scale is None else _dequantized(kernel, kernel_scale)
    return base.astype(jnp.float32) + scale * jnp.matmul(lora_a, lora_b, precision="highest")


@jax.jit
def _quantized(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel = kernel.astype(jnp.float32)
    maximum = jnp.abs(kernel).max(-2)  # ... out
    scale = jnp.where(maximum == 0, 1.0, maximum / _INT8_MAX)
    return jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), scale


@jax.jit
def _dequantized(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    return kernel.astype(jnp.float32) * scale[..., None, :]
