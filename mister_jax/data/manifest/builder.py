"""One's own dialogues as a TFDS dataset."""

import dataclasses
import pathlib
from typing import ClassVar

import tensorflow_datasets as tfds

from mister_jax.data.builder import DialogueBuilder
from mister_jax.data.corpus import Corpus
from mister_jax.data.manifest import reader


@dataclasses.dataclass
class ManifestConfig(tfds.core.BuilderConfig):
    """A manifest; `name` is that of the dataset.

    Attributes:
        file: Name of the manifest in the manual directory.
        labels: Class names in their order.
        label_map: Pairs of a name in the file and a class name, see `reader.read`.
        scored: Whether rows have scores.
        group_by: Column whose values random splits keep apart, see `reader.read`.
        seed: Seed of the random split.
    """

    file: str = "manifest.jsonl"
    labels: tuple[str, ...] = ()
    label_map: tuple[tuple[str, str], ...] = ()
    scored: bool = False
    group_by: str = ""
    seed: int = 0


class Manifest(DialogueBuilder):
    """Dialogues that a JSON Lines or CSV file lists."""

    BUILDER_CONFIGS: ClassVar[list[ManifestConfig]] = []
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The manual directory holds the manifest that the config names."
    DESCRIPTION = "Dialogues of recordings and transcripts, as listed in a manifest."
    CITATION = ""
    LICENSE = "That of the recordings."
    HOMEPAGE = ""

    def class_names(self) -> tuple[str, ...]:
        return self.builder_config.labels

    @property
    def scored(self) -> bool:
        return self.builder_config.scored

    def read(self, source: pathlib.Path, *, partial: bool = False) -> Corpus:
        config = self.builder_config
        return reader.read(
            source / config.file,
            labels=config.labels,
            label_map=dict(config.label_map),
            group_by=config.group_by,
            seed=config.seed,
        )
