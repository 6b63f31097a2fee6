"""TensorFlow and TensorFlow Datasets, imported on first use.

Every module of `mister_jax.data` takes `tf` and `tfds` from here, so that it can be imported where
neither is installed and so that they are set up in one place: quiet, and off the accelerators,
whose memory belongs to JAX.
"""

import contextlib
import os

from etils import epy

__all__ = ["tf", "tfds"]

# Read when TensorFlow starts, so they must be set before it is imported. The second keeps its
# message about oneDNN, which ignores the log level, away; no tensor arithmetic runs in TensorFlow.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def _leave_accelerators_to_jax(_: str) -> None:
    # The lazy `tf` is not ready while it calls this.
    import tensorflow

    # A RuntimeError means that the program has used TensorFlow on its devices already.
    with contextlib.suppress(RuntimeError):
        tensorflow.config.set_visible_devices([], "GPU")


with epy.lazy_imports(
    error_callback="Datasets need TensorFlow: pip install tensorflow-cpu tensorflow-datasets",
    success_callback=_leave_accelerators_to_jax,
):
    import tensorflow as tf
    import tensorflow_datasets as tfds
