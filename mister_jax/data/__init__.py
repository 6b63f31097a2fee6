"""Dialogue datasets, from corpora on disk to batches.

- `corpora` reads corpora and manifests; `corpora.registry` lists the released corpora.
- `prepare` stores a corpus as a dialogue dataset, and `dialogues` reads dialogue datasets.
- `features` stores and loads utterance vectors, `feature_files` imports and exports them, and
  `synthetic` generates them.
- `split_guard` keeps training from opening the test split.
- `batching` plans batches, `padding` makes padded arrays and masks, and `pipeline` yields batches.

TensorFlow is imported when a dataset is written, a shuffled batch is made, or training starts.
Reading a dataset does not need TensorFlow. Outside this package, only `training` uses TensorFlow.
"""

from mister_jax.errors import require_extra

require_extra("predict", "mister_jax.data")

from mister_jax.data.audio import SAMPLE_RATE
from mister_jax.data.batching import BatchPlan, length_buckets
from mister_jax.data.feature_files import read_features, read_npz
from mister_jax.data.features import load_features, split_names, write_features
from mister_jax.data.lazy import import_tensorflow
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
    "import_tensorflow",
    "length_buckets",
    "load_features",
    "prefetch_to_device",
    "read_features",
    "read_npz",
    "split_names",
    "write_features",
]
