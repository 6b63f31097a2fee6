"""TFDS builder of user dialogues that a manifest lists."""

import dataclasses
import pathlib
from typing import ClassVar

from mister_jax.data.builder import DialogueBuilder
from mister_jax.data.corpora.manifest import reader
from mister_jax.data.corpus import Corpus
from mister_jax.data.lazy import tfds


@dataclasses.dataclass
class ManifestConfig(tfds.core.BuilderConfig):
    """Manifest of a dataset; `name` is the name of the dataset.

    Attributes:
        file: Name of the manifest in the manual directory.
        labels: Class names in their order.
        label_map: Pairs of a name in the file and its class name, see `read_manifest`.
        scored: Whether rows have sentiment scores.
        group_by: Column whose values random splits keep apart, see `read_manifest`.
        seed: Seed of the random split.
    """

    file: str = "manifest.jsonl"
    labels: tuple[str, ...] = ()
    label_map: tuple[tuple[str, str], ...] = ()
    scored: bool = False
    group_by: str = ""
    seed: int = 0


class Manifest(DialogueBuilder):
    """TFDS builder of manifests."""

    BUILDER_CONFIGS: ClassVar[list[ManifestConfig]] = []
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "The manual directory contains the manifest that the config names."
    )
    DESCRIPTION = "Dialogues of recordings and transcripts, as listed in a manifest."
    CITATION = ""
    LICENSE = "The license of the recordings."
    HOMEPAGE = ""

    def class_names(self) -> tuple[str, ...]:
        """Returns the emotions in the order of their labels."""
        return self.builder_config.labels

    @property
    def scored(self) -> bool:
        """Whether rows have sentiment scores."""
        return self.builder_config.scored

    def read(self, source: pathlib.Path, *, partial: bool = False) -> Corpus:
        """Reads the manifest of the config from the manual directory."""
        config = self.builder_config
        return reader.read_manifest(
            source / config.file,
            labels=config.labels,
            label_map=dict(config.label_map),
            group_by=config.group_by,
            seed=config.seed,
        )
