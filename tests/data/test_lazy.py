"""TensorFlow is used when it is needed and no earlier."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]

WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
from mister_jax import data
features = data.generate(0, {"train": 2})["train"]
plan = data.BatchPlan(features.lengths, 2)
try:
    data.batches(features, plan, seed=0, epoch=0)
except ImportError as error:
    print("told" if "pip install tensorflow" in str(error) else error)
"""


def test_only_reading_writing_and_batching_need_tensorflow():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "told\n", done.stderr


def test_tensorflow_leaves_the_accelerators_alone():
    from mister_jax.data.lazy import tf

    assert tf.config.get_visible_devices("GPU") == []
