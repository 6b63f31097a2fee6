"""What is measured of MiSTER-E: sizes, batch, precision, devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax

from mister_jax.errors import InputError
from mister_jax.models import MisterEConfig

PRESETS: dict[str, Callable[..., MisterEConfig]] = {
    "paper": MisterEConfig.paper,
    "small": MisterEConfig.small,
}


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured.

    Attributes:
      preset: sizes of the model, "paper" or "small".
      speech_dim: D of the speech vectors.
      text_dim: D of the text vectors.
      batch_size: dialogues in a global batch.
      length: utterances of each dialogue, where an epoch's lengths are not asked for.
      dtype: of the model's computation.
      precision: of float32 matrix products, PyTorch's too. "default" is JAX's own (one bfloat16
        pass on a TPU, TF32 on a GPU), "highest" full float32. A CPU knows only the latter.
      devices: how many to spread a batch over.
      backend: "jit" or "pmap".
      steps: timed runs, or with an epoch's lengths timed epochs.
    """

    preset: str = "paper"
    speech_dim: int = 2048
    text_dim: int = 2048
    batch_size: int = 8
    length: int = 49
    dtype: str = "float32"
    precision: Literal["default", "highest"] = "default"
    devices: int = 1
    backend: Literal["jit", "pmap"] = "jit"
    steps: int = 10

    def __post_init__(self):
        allowed = {
            "preset": tuple(PRESETS),
            "dtype": ("float32", "bfloat16"),
            "precision": ("default", "highest"),
            "backend": ("jit", "pmap"),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if value not in values:
                raise InputError(f"{name} {value!r}; allowed are {', '.join(values)}")
        for name in ("speech_dim", "text_dim", "batch_size", "length", "devices", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}; must be at least 1")

    @property
    def model(self) -> MisterEConfig:
        return PRESETS[self.preset](
            speech_dim=self.speech_dim, text_dim=self.text_dim, dtype=self.dtype
        )


def devices_of(config: BenchmarkConfig) -> list[jax.Device]:
    """As many of those that are there as the config asks for.

    Raises:
      InputError: there are fewer.
    """
    found = jax.devices()
    if len(found) < config.devices:
        raise InputError(f"devices {config.devices}; allowed are 1 to {len(found)}, as many as are")
    return found[: config.devices]


def check_divisible(config: BenchmarkConfig, devices: int) -> None:
    """Raises InputError if the batch cannot be spread evenly."""
    if config.batch_size % devices:
        raise InputError(
            f"batch_size {config.batch_size}; allowed are multiples of the {devices} devices"
        )
