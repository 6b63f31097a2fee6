"""Packages for datasets, imported on first use.

Modules in `mister_jax.data` import `tf` and `tfds` from here, so most modules can be imported
without TensorFlow and TFDS. Importing TensorFlow takes seconds, so `tfds` defers this import until
a dataset is written. This module configures TensorFlow to log little and to leave accelerator
memory to JAX.
"""

import contextlib
import os

from etils import epy

from mister_jax.errors import require_extra

__all__ = ["google_crc32c", "import_tensorflow", "tf", "tfds"]

# TensorFlow reads these variables when it is imported. Disabling oneDNN suppresses a message that
# ignores the log level, and costs nothing because TensorFlow does no computation here.
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


def import_tensorflow() -> None:
    """Imports TensorFlow now, with accelerators hidden."""
    tf.config.get_visible_devices("GPU")


with epy.lazy_imports(error_callback=_name_the_extra, success_callback=_hide_accelerators):
    import tensorflow as tf

with epy.lazy_imports(error_callback=_name_the_extra):
    import google_crc32c
    import tensorflow_datasets as tfds
