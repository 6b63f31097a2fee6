"""Dialogues from disk to batches.

`prepare` writes corpora as datasets of dialogues, which `dialogues` reads; `features` stores and
reads utterance vectors; `synthetic` makes up dialogues with known best scores; `pipeline` turns a
split into padded batches. This is the only package that uses TensorFlow. The modules that write
corpora (`prepare`, `builder` and those of the corpora) need it to be imported, the others only when
a dataset is read, written or iterated.
"""

from mister_jax.errors import require_extra

require_extra("predict", "mister_jax.data")

from mister_jax.data.audio import SAMPLE_RATE
from mister_jax.data.batching import BatchPlan, length_buckets
from mister_jax.data.features import load_features, read_npz, split_names, write_features
from mister_jax.data.pipeline import batches, prefetch_to_device
from mister_jax.data.schema import SPLITS, UNLABELED, DialogueFeatures
from mister_jax.data.storage import dataset_directory
from mister_jax.data.synthetic import generate_features

__all__ = [
    "SAMPLE_RATE",
    "SPLITS",
    "UNLABELED",
    "BatchPlan",
    "DialogueFeatures",
    "batches",
    "dataset_directory",
    "generate_features",
    "length_buckets",
    "load_features",
    "prefetch_to_device",
    "read_npz",
    "split_names",
    "write_features",
]
