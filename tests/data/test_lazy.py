"""TensorFlow is imported only when it is used, and leaves accelerators to JAX."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]

WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
from mister_jax import data
features = data.generate_features(0, {"train": 2})["train"]
plan = data.BatchPlan(features.lengths, 2)
try:
    data.batches(features, plan, seed=0, epoch=0)
except ImportError as error:
    print(error)
"""


def test_only_batching_needs_tensorflow():
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout == (
        "reading and writing datasets needs tensorflow, tensorflow_datasets; install it with pip "
        'install "mister_jax[train]"\n'
    ), process.stderr


def test_tensorflow_sees_no_gpu():
    from mister_jax.data.lazy import tf

    assert tf.config.get_visible_devices("GPU") == []
