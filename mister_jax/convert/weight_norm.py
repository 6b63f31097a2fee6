"""Weight normalization of PyTorch convolutions: a kernel from its gain and direction, and back."""

from __future__ import annotations

import numpy as np


def merge_weight_norm(parts: list[np.ndarray]) -> np.ndarray:
    """Returns the kernel [taps, in, out] of a gain [1, 1, taps] and direction [out, in, taps]."""
    gain, direction = (part.astype(np.float64) for part in parts)
    norm = np.sqrt((direction**2).sum((0, 1), keepdims=True))
    return (gain * direction / norm).transpose(2, 1, 0).astype(parts[1].dtype)


def split_weight_norm(kernel: np.ndarray) -> list[np.ndarray]:
    """Returns a gain and a direction for a kernel: its norm at each tap, and the kernel."""
    direction = kernel.transpose(2, 1, 0)
    gain = np.sqrt((direction.astype(np.float64) ** 2).sum((0, 1), keepdims=True))
    return [gain.astype(kernel.dtype), direction]
