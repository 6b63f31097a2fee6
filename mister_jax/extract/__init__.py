"""From a dataset of dialogues to one of features: the stage between the two trainings.

`encoders` are what reads utterances, `features` runs one over many of them, `dataset` writes
datasets that stage 2 trains on and joins those of two modalities.
"""

from mister_jax.extract.dataset import extract, merge
from mister_jax.extract.encoders import (
    ENCODER_PARTS,
    Encoder,
    PretrainedSpeech,
    PretrainedText,
    ProsodyEncoder,
    TunedEncoder,
    encoder_from_metadata,
    load_encoder,
    with_new_paths,
)
from mister_jax.extract.features import features_of

__all__ = [
    "ENCODER_PARTS",
    "Encoder",
    "PretrainedSpeech",
    "PretrainedText",
    "ProsodyEncoder",
    "TunedEncoder",
    "encoder_from_metadata",
    "extract",
    "features_of",
    "load_encoder",
    "merge",
    "with_new_paths",
]
