"""A text encoder, fine-tuned on single utterances: stage 1 of MiSTER-E for text."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from mister_jax.data.tokens import load_tokens, token_batches
from mister_jax.data.utterances import Utterances
from mister_jax.encoders import hub
from mister_jax.encoders.text import check_max_tokens, encode_texts
from mister_jax.models.utterance import TextUtterance, UtteranceHead, UtteranceOutput
from mister_jax.tasks.base import Batch
from mister_jax.tasks.encoder import EncoderOptions, EncoderSplit, EncoderTask


@dataclasses.dataclass(frozen=True)
class TextEncoderOptions(EncoderOptions):
    """Options of a text encoder.

    Attributes:
      max_tokens: of an utterance.
    """

    max_tokens: int = 128


class TextEncoderTask(EncoderTask):
    """A text backbone with a head, on utterances with text and a label."""

    options_class = TextEncoderOptions

    @classmethod
    def described(cls, options: TextEncoderOptions) -> dict[str, Any]:
        described = hub.read_config(hub.fetch(options.name))
        hub.architecture_of(described, options.name, "text")
        return described

    def _check_backbone(self, backbone: Any) -> None:
        check_max_tokens(backbone, self.options.max_tokens)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The backbone's."""
        return hub.load_processor(self.folder, self._shapes.config)

    def encode(self, texts: Any, *, where: str = "") -> list[np.ndarray]:
        """Tokens of texts; see `encode_texts`."""
        return encode_texts(self.tokenizer, texts, self.options.max_tokens, where=where)

    def model(self, backbone: Any, head: UtteranceHead) -> TextUtterance:
        return TextUtterance(backbone, head)

    def read(self, model: TextUtterance, batch: Batch, **options: Any) -> UtteranceOutput:
        return model(batch["input_ids"], batch["mask"], **options)

    def features(self, split: str, name: str | None = None) -> Utterances:
        """The utterances with text of a split of the config's dataset, or of another.

        Raises:
          InputError: there is none, or its classes are others.
        """
        name = self._data.name if name is None else name
        encode = functools.partial(self.encode, where=f"dataset {name}, split {split}")
        return self._checked(load_tokens(name, split, self._data.data_dir or None, encode))

    def batched(
        self, utterances: Utterances, *, num_shards: int, shuffle: bool = False
    ) -> EncoderSplit:
        plan = self._plan(utterances.sizes, num_shards, shuffle=shuffle)
        make = functools.partial(token_batches, utterances, plan)
        return EncoderSplit(utterances, plan, make, self._seed, shuffle)
