"""TensorFlow and TensorFlow Datasets, imported on first use.

Every module of `mister_jax.data` imports `tf` and `tfds` from here, so that it can be imported
without TensorFlow, and so that TensorFlow is always quiet and leaves accelerator memory to JAX.
"""

import contextlib
import os

from etils import epy

from mister_jax.errors import require_extra

__all__ = ["tf", "tfds"]

# TensorFlow reads these when it is imported. The second one silences a message about oneDNN that
# ignores the log level; TensorFlow only reads and batches data here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def _hide_accelerators(_: str) -> None:
    # The lazy `tf` is not ready during this callback.
    import tensorflow

    # A RuntimeError means that the program has already initialized TensorFlow's devices.
    with contextlib.suppress(RuntimeError):
        tensorflow.config.set_visible_devices([], "GPU")


def _name_the_extra(error: Exception) -> None:
    require_extra("train", "reading and writing datasets")


with epy.lazy_imports(
    error_callback=_name_the_extra,
    success_callback=_hide_accelerators,
):
    import tensorflow as tf
    import tensorflow_datasets as tfds
