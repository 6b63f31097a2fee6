"""From a dataset of dialogues to one of features: the stage between the two trainings.

`encoders` are what reads utterances, `features` runs one over many of them, `dataset` writes
datasets that stage 2 trains on and joins those of two modalities.
"""

from mister_jax.extraction.encoders import (
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
from mister_jax.extraction.encoding import encode_utterances
from mister_jax.extraction.feature_dataset import extract_features, merge_features

__all__ = [
    "ENCODER_PARTS",
    "Encoder",
    "PretrainedSpeech",
    "PretrainedText",
    "ProsodyEncoder",
    "TunedEncoder",
    "encode_utterances",
    "encoder_from_metadata",
    "extract_features",
    "load_encoder",
    "merge_features",
    "with_new_paths",
]
