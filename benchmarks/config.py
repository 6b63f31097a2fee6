"""Configures the benchmarks of MiSTER-E."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from mister_jax.errors import InputError
from mister_jax.models import MisterEConfig

PRESETS: dict[str, Callable[..., MisterEConfig]] = {
    "paper": MisterEConfig.paper,
    "small": MisterEConfig.small,
}


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Model, batch and devices of a benchmark. The flags of `benchmarks.cli` explain the fields."""

    preset: str = "paper"
    speech_dim: int = 2048
    text_dim: int = 2048
    batch_size: int = 8
    length: int = 49
    dtype: str = "float32"
    devices: int = 1
    backend: str = "jit"
    steps: int = 10

    @property
    def model(self) -> MisterEConfig:
        """Config of the model."""
        return PRESETS[self.preset](
            speech_dim=self.speech_dim, text_dim=self.text_dim, dtype=self.dtype
        )


def select_devices(config: BenchmarkConfig) -> list[jax.Device]:
    """Returns the first `config.devices` devices.

    Raises:
      InputError: There are fewer than `config.devices` devices.
    """
    devices = jax.devices()
    if len(devices) < config.devices:
        raise InputError(f"--devices={config.devices}; allowed: 1 to {len(devices)}")
    return devices[: config.devices]


def check_divisible(config: BenchmarkConfig, num_devices: int) -> None:
    """Raises `InputError` if the devices cannot share a batch equally."""
    if config.batch_size % num_devices:
        raise InputError(
            f"--batch_size={config.batch_size}; allowed: multiples of the {num_devices} devices"
        )
