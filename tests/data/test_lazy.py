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


EVALUATION = """
import sys
from mister_jax.evaluation.results import evaluate
evaluate(sys.argv[1], "validation", quiet=True)
print("tensorflow" in sys.modules)
"""


def run_python(code, *arguments):
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return process.stdout, process.stderr


def test_only_batching_needs_tensorflow():
    output, errors = run_python(WITHOUT_TENSORFLOW)
    assert output == (
        "reading and writing datasets needs tensorflow, tensorflow_datasets; install it with pip "
        'install "mister_jax[train]"\n'
    ), errors


def test_evaluation_does_not_import_tensorflow(finished_workdir):
    output, errors = run_python(EVALUATION, str(finished_workdir))
    assert output == "False\n", errors


def test_tensorflow_sees_no_gpu():
    from mister_jax.data.lazy import tf

    assert tf.config.get_visible_devices("GPU") == []
