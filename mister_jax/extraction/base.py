"""Interfaces of utterance encoders and of their inputs, and what pretrained encoders share."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from flax import nnx

from mister_jax.data.utterances import Utterances
from mister_jax.encoders import hub
from mister_jax.parallel.oom import explain_oom
from mister_jax.parallel.partitioning import JitPartitioner


class Input(Protocol):
    """Turns utterances of one modality into items, which are arrays, and items into batches.

    Attributes:
      modality: "speech" or "text".
      unit: Unit of budgets and speeds.
      budget: Default number of units in a batch on each device, including padding.
      steps_per_unit: Length steps per unit.
      length_steps: Lengths in steps that batches are padded to, besides `max_length`.
      max_length: Length in steps of the longest item that a batch holds.
      max_samples: Maximum number of samples read from a clip; None if unlimited or for text.
    """

    modality: str
    unit: str
    budget: int
    steps_per_unit: int
    length_steps: tuple[int, ...]
    max_length: int
    max_samples: int | None

    def load(self, dataset: str, split: str, data_dir: epath.PathLike | None) -> Utterances:
        """Loads the utterances of a split of a dialogue dataset."""

    def items(self, utterances: Sequence[Any]) -> list[np.ndarray]:
        """Returns an item for each utterance, empty if there is nothing to encode."""

    def windows(self, item: np.ndarray) -> list[np.ndarray]:
        """Splits an item into parts that a batch can hold, whose features are averaged."""

    def lengths(self, items: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the lengths of items in steps [N] int."""

    def num_units(self, items: Sequence[np.ndarray]) -> float:
        """Returns the total number of units in items."""

    def batch(self, items: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Returns items, which may be empty, padded to a length in steps."""


class Encoder:
    """An utterance encoder that is compiled for all devices.

    Args:
      input_: Input of the encoder.
      partitioner: Partitioner of batches and parameters.
      metadata: JSON values that the features depend on. `kind`, `name` and `options` tell
        `encoder_from_metadata` how to load the encoder; the others detect changes to its files.
      encode: Function from a batch to features [B, F].

    Attributes:
      input: Input of the encoder.
      partitioner: Partitioner of batches and parameters.
      metadata: JSON values that the features depend on.
      oom_hint: How to reduce the memory that an extraction takes.
    """

    def __init__(
        self,
        input_: Input,
        partitioner: JitPartitioner,
        metadata: dict[str, Any],
        encode: Callable[[dict[str, Any]], jax.Array],
    ):
        self.input = input_
        self.partitioner = partitioner
        self.metadata = metadata
        self.oom_hint = "a smaller --budget"
        if metadata["options"].get("dtype", "bfloat16") != "bfloat16":
            self.oom_hint += " or --dtype=bfloat16"
        self._encode = encode

    @property
    def modality(self) -> str:
        """Modality that is encoded, "speech" or "text"."""
        return self.input.modality

    def __call__(self, batch: dict[str, Any]) -> jax.Array:
        """Encodes a batch of the input on the devices to features [B, F] float32."""
        return self._encode(batch)


def compile_encoder(
    partitioner: JitPartitioner,
    module: nnx.Module,
    encode: Callable[[Any, dict[str, Any]], jax.Array],
) -> Callable[[dict[str, Any]], jax.Array]:
    """Compiles a function of a module and a batch for all devices, and binds its parameters."""
    graph, params = nnx.split(module)

    def step(params: Any, batch: dict[str, Any], _axis_name: str | None) -> jax.Array:
        return encode(nnx.merge(graph, params), batch)

    return functools.partial(partitioner.compile_eval(step), nnx.as_pure(params))


def pretrained_metadata(
    kind: str, name: str, options: dict[str, Any], files: str, adapter: str
) -> dict[str, Any]:
    """Returns the metadata of a pretrained encoder, see `Encoder`.

    Args:
      kind: Kind of encoder, "text" or "speech".
      name: Folder or name on the Hugging Face Hub.
      options: Further arguments of the encoder.
      files: Fingerprint of the encoder's files.
      adapter: Folder of a PEFT adapter, empty if there is none.
    """
    if adapter:
        options = {**options, "adapter": absolute_path(adapter)}
        files = f"{files} {hub.fingerprint(adapter)}"
    return {"kind": kind, "name": absolute_path(name), "options": options, "files": files}


def explain_load_oom(name: str, dtype: str) -> contextlib.AbstractContextManager[None]:
    """Explains running out of device memory while an encoder is loaded, see `explain_oom`."""
    hint = "devices with more memory, or more of them"
    if dtype != "bfloat16":
        hint = f"extraction with --dtype=bfloat16, or {hint}"
    return explain_oom(name, "the encoder's parameters", hint)


def absolute_path(name: epath.PathLike) -> str:
    """Returns the absolute path of an existing file, or a name on the Hub unchanged."""
    path = pathlib.Path(name)
    return str(path.absolute()) if path.exists() else os.fspath(name)
