"""Key-table entries of common PyTorch layers, one function per type of layer.

Each function takes the path of a module of ours and the name of the PyTorch layer. With
`num_layers`, the name is a pattern with `{}` for the layer's number, and the parameters of all
layers are stacked, as in `mister_jax.nn.ScannedLayers`.
"""

from __future__ import annotations

import numpy as np

from mister_jax.convert.key_table import Source, layer_names


def parameter(name: str, num_layers: int = 0, axes: tuple[int, ...] | None = None) -> Source:
    """Returns the source of one tensor, or of one tensor per layer."""
    names = layer_names(name, num_layers) if num_layers else (name,)
    return Source(names, axes, stacked=num_layers > 0)


def linear(path: str, name: str, num_layers: int = 0, *, bias: bool = True) -> dict[str, Source]:
    """Returns the entries of a Linear layer, with or without a bias."""
    table = {f"{path}/kernel": parameter(f"{name}.weight", num_layers, axes=(1, 0))}
    if bias:
        table[f"{path}/bias"] = parameter(f"{name}.bias", num_layers)
    return table


def conv(path: str, name: str, *, bias: bool = True) -> dict[str, Source]:
    """Returns the entries of a Conv1d, with or without a bias."""
    table = {f"{path}/kernel": parameter(f"{name}.weight", axes=(2, 1, 0))}
    if bias:
        table[f"{path}/bias"] = parameter(f"{name}.bias")
    return table


def norm(path: str, name: str, num_layers: int = 0, *, bias: bool = True) -> dict[str, Source]:
    """Returns the entries of a LayerNorm or GroupNorm, or without a bias of an RMSNorm."""
    table = {f"{path}/scale": parameter(f"{name}.weight", num_layers)}
    if bias:
        table[f"{path}/bias"] = parameter(f"{name}.bias", num_layers)
    return table


def weight_norm_conv(path: str, name: str) -> dict[str, Source]:
    """Returns the entries of a Conv1d under `torch.nn.utils.weight_norm` with dim=2.

    PyTorch stores a gain and a direction, which are merged into one kernel.
    """
    kernel = Source(
        (f"{name}.weight_g", f"{name}.weight_v"),
        combine=_merge_weight_norm,
        split=_split_weight_norm,
    )
    return {f"{path}/kernel": kernel, f"{path}/bias": parameter(f"{name}.bias")}


def _merge_weight_norm(tensors: list[np.ndarray]) -> np.ndarray:
    """Returns the kernel, [kernel_size, in, out].

    Args:
      tensors: Gain [1, 1, kernel_size] and direction [out, in, kernel_size].
    """
    gain, direction = (tensor.astype(np.float64) for tensor in tensors)
    length = np.sqrt((direction**2).sum((0, 1), keepdims=True))
    return (gain * direction / length).transpose(2, 1, 0).astype(tensors[1].dtype)


def _split_weight_norm(kernel: np.ndarray) -> list[np.ndarray]:
    """Returns a gain and a direction of a kernel: its norm at each position, and the kernel."""
    direction = kernel.transpose(2, 1, 0)
    gain = np.sqrt((direction.astype(np.float64) ** 2).sum((0, 1), keepdims=True))
    return [gain.astype(kernel.dtype), direction]
