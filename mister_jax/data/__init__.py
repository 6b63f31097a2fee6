"""Dialogues from disk to batches.

`features` stores and reads utterance vectors as TFDS datasets, `synthetic` makes up dialogues with
known best scores, and `pipeline` turns a split into padded batches. This is the only package that
uses TensorFlow, and only when a dataset is read, written or iterated.
"""

from mister_jax.data.features import load, prepare, read_npz, write
from mister_jax.data.pipeline import BatchPlan, batches, length_buckets, prefetch_to_device
from mister_jax.data.schema import SPLITS, UNLABELLED, DialogueFeatures
from mister_jax.data.synthetic import generate

__all__ = [
    "SPLITS",
    "UNLABELLED",
    "BatchPlan",
    "DialogueFeatures",
    "batches",
    "generate",
    "length_buckets",
    "load",
    "prefetch_to_device",
    "prepare",
    "read_npz",
    "write",
]
