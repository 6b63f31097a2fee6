"""Encodes the text of each utterance as one vector with pretrained encoders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mister_jax.data.padding import pad_tokens
from mister_jax.data.utterances import Utterances, load_tokens
from mister_jax.encoders import hf_config, hub, registry
from mister_jax.encoders.tokenization import check_max_tokens, encode_texts
from mister_jax.extraction.encoder import (
    Encoder,
    compile_encoder,
    explain_load_oom,
    pretrained_metadata,
)
from mister_jax.nn import masked_mean
from mister_jax.parallel.partitioning import JitPartitioner
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES, data_mesh

TOKEN_BUDGET = 4096
CPU_TOKEN_BUDGET = 1024  # small enough that a layer's activations stay in the cache

# Number of tokens that a device encodes while one program compiles. For MiniLM on two CPU cores,
# this is 5,000. `_CPU_PROGRAM_COST` is smaller because larger models encode fewer tokens, and
# because programs may be read from the compilation cache instead of compiled.
_PROGRAM_COST = 100_000
_CPU_PROGRAM_COST = 1000

# Padded lengths in tokens. CPUs use more lengths: on a CPU, compiling another program is cheap,
# while padding takes as long to encode as tokens.
_LENGTHS = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512)
_CPU_LENGTHS = (*range(4, 25, 2), *_LENGTHS[6:])


class TextInput:
    """Converts texts to tokens and batches; see `Input`. A length step is one token.

    Args:
      encode: Function that returns the token ids of each text, with the optional arguments `where`
        and `truncated` of `encode_texts`.
      max_tokens: Maximum number of tokens per text.
    """

    modality, unit, steps_per_unit = "text", "tokens", 1
    max_samples: int | None = None

    def __init__(self, encode: Callable[..., list[np.ndarray]], max_tokens: int):
        self._encode = encode
        self.max_length = max_tokens
        on_cpu = jax.default_backend() == "cpu"
        self.budget = CPU_TOKEN_BUDGET if on_cpu else TOKEN_BUDGET
        self.program_cost: float = _CPU_PROGRAM_COST if on_cpu else _PROGRAM_COST
        self.length_steps: tuple[int, ...] = _CPU_LENGTHS if on_cpu else _LENGTHS

    def load(self, dataset: str, split: str, data_dir: epath.PathLike | None) -> Utterances:
        """Loads and tokenizes the texts of a split."""
        encode = functools.partial(self._encode, where=f"dataset {dataset}, split {split}")
        return load_tokens(dataset, split, data_dir, encode)

    def items(
        self, utterances: Sequence[str], truncated: list[int] | None = None
    ) -> list[np.ndarray]:
        """Returns the token ids [n] int32 of each text.

        Args:
          utterances: Texts, which may be empty.
          truncated: List to which the indices of truncated texts are added. By default, the number
            of truncated texts is logged.
        """
        items = [np.zeros(0, np.int32)] * len(utterances)
        rows = [row for row, text in enumerate(utterances) if text.strip()]
        too_long: list[int] | None = None if truncated is None else []
        encoded = self._encode([utterances[row] for row in rows], truncated=too_long)
        for row, tokens in zip(rows, encoded, strict=True):
            items[row] = tokens
        if truncated is not None:
            truncated += (rows[index] for index in too_long or ())
        return items

    def windows(self, item: np.ndarray) -> list[np.ndarray]:
        """Returns the item as the only window, because `items` truncates longer texts."""
        return [item]

    def lengths(self, items: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the number of tokens in each text, [N] int."""
        return np.array([len(tokens) for tokens in items], int)

    def num_units(self, items: Sequence[np.ndarray]) -> float:
        """Returns the total number of tokens."""
        return sum(map(len, items))

    def batch(self, items: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Returns `input_ids` [B, length] int32 and `mask` [B, length] bool."""
        ids, mask = pad_tokens(items, length)
        return {"input_ids": ids, "mask": mask}


class PretrainedText(Encoder):
    """A pretrained text encoder. Features are the mean over tokens of the last hidden states.

    Args:
      name: Folder, or name on the Hugging Face Hub.
      max_tokens: Maximum number of tokens per utterance.
      adapter: Folder of a PEFT adapter to load; none if empty.
      dtype: Dtype of the computation.
      param_dtype: Dtype of the parameters.

    Raises:
      InputError: The encoder or adapter cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        *,
        max_tokens: int = 128,
        adapter: str = "",
        dtype: str = "float32",
        param_dtype: str = "float32",
    ):
        partitioner = JitPartitioner(data_mesh(), ENCODER_SHARDING_RULES)
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        folder = hub.fetch(name)
        config = hf_config.read_config(folder)
        registry.find_architecture(config, name, "text")
        with explain_load_oom(name, dtype):
            module, tokenizer = registry.load_pretrained(
                folder,
                hf_config=config,
                mesh=partitioner.mesh,
                adapter=adapter or None,
                **dtypes,
            )
        check_max_tokens(module, max_tokens)

        tokenize = functools.partial(encode_texts, tokenizer, max_tokens=max_tokens)

        def encode(module: Any, batch: dict[str, Any]) -> jax.Array:
            hidden_states = module(batch["input_ids"], batch["mask"])
            return masked_mean(hidden_states.astype(jnp.float32), batch["mask"])

        options = {"max_tokens": max_tokens, **dtypes}
        super().__init__(
            TextInput(tokenize, max_tokens),
            partitioner,
            pretrained_metadata("text", name, options, hub.fingerprint(folder), adapter),
            compile_encoder(partitioner, module, encode),
        )
