"""CMU-MOSI as a TFDS dataset."""

import pathlib
from typing import ClassVar

import tensorflow_datasets as tfds

from mister_jax.data.builder import DialogueBuilder
from mister_jax.data.corpus import Corpus
from mister_jax.data.mosi import reader


class Mosi(DialogueBuilder):
    """Opinions on films, negative or not, with scores."""

    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="binary", description="[-3, 0) against [0, 3], and the score.")
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""
    Get the raw data and the labels with the CMU Multimodal SDK
    (https://github.com/CMU-MultiComp-Lab/CMU-MultimodalSDK). The manual directory is
    {reader.LAYOUT}.
    """
    DESCRIPTION = "Monologues about films, a sentiment score for each segment."
    CITATION = """
    @article{zadeh2016mosi,
      title={{MOSI}: multimodal corpus of sentiment intensity and subjectivity analysis in online
             opinion videos},
      author={Zadeh, Amir and Zellers, Rowan and Pincus, Eli and Morency, Louis-Philippe},
      journal={arXiv:1606.06259},
      year={2016}
    }
    """
    LICENSE = "For research; the videos belong to their authors."
    HOMEPAGE = "http://multicomp.cs.cmu.edu/resources/cmu-mosi-dataset"

    def class_names(self) -> tuple[str, ...]:
        return reader.CLASS_NAMES

    @property
    def scored(self) -> bool:
        return True

    def read(self, source: pathlib.Path, *, partial: bool = False) -> Corpus:
        return reader.read(source, partial=partial)
