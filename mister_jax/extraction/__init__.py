"""Converts dialogue datasets to feature datasets, on which MiSTER-E is trained."""

from mister_jax.extraction.encoder import Encoder, encode_utterances
from mister_jax.extraction.feature_dataset import export_features, extract_features, merge_features
from mister_jax.extraction.loading import (
    ENCODER_PARTS,
    TunedEncoder,
    encoder_from_metadata,
    load_encoder,
    with_new_paths,
)
from mister_jax.extraction.speech import PretrainedSpeech, ProsodyEncoder
from mister_jax.extraction.text import PretrainedText

__all__ = [
    "ENCODER_PARTS",
    "Encoder",
    "PretrainedSpeech",
    "PretrainedText",
    "ProsodyEncoder",
    "TunedEncoder",
    "encode_utterances",
    "encoder_from_metadata",
    "export_features",
    "extract_features",
    "load_encoder",
    "merge_features",
    "with_new_paths",
]
