"""IEMOCAP as a TFDS dataset."""

import dataclasses
import pathlib
from typing import ClassVar

import tensorflow_datasets as tfds

from mister_jax.data.builder import DialogueBuilder
from mister_jax.data.corpus import Corpus
from mister_jax.data.iemocap import reader


@dataclasses.dataclass
class IemocapConfig(tfds.core.BuilderConfig):
    """Options of `reader.read`."""

    classes: str = "six"
    validation: str = "session1"


class Iemocap(DialogueBuilder):
    """Ten actors in pairs, six or four emotions."""

    BUILDER_CONFIGS: ClassVar = [
        IemocapConfig(
            name=f"{classes}_{validation}",
            description=f"{classes} classes, validation {validation}.",
            classes=classes,
            validation=validation,
        )
        for classes in reader.CLASS_NAMES
        for validation in reader.VALIDATION
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""
    IEMOCAP is licensed: ask for it at https://sail.usc.edu/iemocap. The manual directory is
    {reader.LAYOUT}.
    """
    DESCRIPTION = "Scripted and improvised dialogues of actors, an emotion for most turns."
    CITATION = """
    @article{busso2008iemocap,
      title={{IEMOCAP}: interactive emotional dyadic motion capture database},
      author={Busso, Carlos and Bulut, Murtaza and Lee, Chi-Chun and Kazemzadeh, Abe and
              Mower, Emily and Kim, Samuel and Chang, Jeannette N. and Lee, Sungbok and
              Narayanan, Shrikanth S.},
      journal={Language Resources and Evaluation},
      year={2008}
    }
    """
    LICENSE = "By agreement with the University of Southern California; not to be passed on."
    HOMEPAGE = "https://sail.usc.edu/iemocap"

    def class_names(self) -> tuple[str, ...]:
        return reader.CLASS_NAMES[self.builder_config.classes]

    def read(self, source: pathlib.Path, *, partial: bool = False) -> Corpus:
        config = self.builder_config
        return reader.read(
            source, classes=config.classes, validation=config.validation, partial=partial
        )
