"""Fine-tuning of a text encoder on single utterances: stage 1 of MiSTER-E for text."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from mister_jax.data.utterances import Utterances, load_tokens, token_batches
from mister_jax.encoders import hf_config, hub, registry
from mister_jax.encoders.tokenization import check_max_tokens, encode_texts
from mister_jax.models.utterance import TextUtterance, UtteranceHead, UtteranceOutput
from mister_jax.tasks.base import Batch, Split
from mister_jax.tasks.encoder import EncoderOptions, EncoderTask


@dataclasses.dataclass(frozen=True)
class TextEncoderOptions(EncoderOptions):
    """Options of a text encoder.

    Attributes:
      max_tokens: Maximum number of tokens per utterance; longer utterances are truncated.
    """

    max_tokens: int = 128


class TextEncoderTask(EncoderTask):
    """Trains a text backbone and a head on labeled utterances that have text."""

    options_class = TextEncoderOptions

    @classmethod
    def read_backbone_config(cls, options: TextEncoderOptions) -> dict[str, Any]:
        """Reads the backbone's config.json."""
        backbone_config = hf_config.read_config(hub.fetch(options.name))
        registry.find_architecture(backbone_config, options.name, "text")
        return backbone_config

    def _check_backbone(self, backbone: Any) -> None:
        check_max_tokens(backbone, self.options.max_tokens)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the backbone."""
        return registry.load_processor(
            self.folder, self._abstract_backbone.config, hf_config=self._backbone_config
        )

    def encode(self, texts: Any, **options: Any) -> list[np.ndarray]:
        """Tokenizes texts; `options` are `where` and `truncated` of `encode_texts`."""
        return encode_texts(self.tokenizer, texts, self.options.max_tokens, **options)

    def make_model(self, backbone: Any, head: UtteranceHead) -> TextUtterance:
        """Combines a backbone and a head into the model."""
        return TextUtterance(backbone, head)

    def apply(self, model: TextUtterance, batch: Batch, **options: Any) -> UtteranceOutput:
        """Runs the model on a batch from `token_batches`."""
        return model(batch["input_ids"], batch["mask"], **options)

    def features(self, split: str, name: str | None = None) -> Utterances:
        """Loads the utterances with text; see `Task.features`.

        Raises:
          InputError: The dataset or the split does not exist, or its classes differ from the
            model's.
        """
        name = self._data.name if name is None else name
        encode = functools.partial(self.encode, where=f"dataset {name}, split {split}")
        utterances = load_tokens(name, split, self._data.data_dir or None, encode)
        return self._check_classes(utterances)

    def batched(self, utterances: Utterances, *, num_shards: int, shuffle: bool = False) -> Split:
        """Returns utterances in batches whose number of rows is a multiple of `num_shards`."""
        plan = self._plan(utterances.sizes, utterances.label, num_shards, shuffle=shuffle)
        make_batches = functools.partial(token_batches, utterances, plan)
        return Split(utterances, plan, make_batches, self._seed, shuffle)
