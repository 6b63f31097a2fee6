"""Set-up of all tests: eight CPU devices, the `--parity` option, shared fixtures."""

import os
import tempfile

# JAX reads these when it is imported, so they come first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Tests and the processes they start compile a program once between them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="jax_cache_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import pathlib
from collections import defaultdict

import jax
import numpy as np
import pytest

from mister_jax import MisterEConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption("--parity", action="store_true", help="run the tests marked parity, too")


def pytest_configure(config):
    # Most of a test's time is XLA's optimiser. A run with --parity tests what users run.
    jax.config.update("jax_disable_most_optimizations", not config.getoption("parity"))


def pytest_collection_modifyitems(config, items):
    if config.getoption("parity"):
        return
    skip = pytest.mark.skip(reason="needs --parity")
    for item in items:
        if "parity" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def golden():
    """What the official model gave, as {group: {name: array}}; see golden/README.md."""
    groups = defaultdict(dict)
    with np.load(GOLDEN / "mister_e_head.npz") as file:
        for path, value in file.items():
            group, _, name = path.partition("/")
            groups[group][name] = value
    return dict(groups)


@pytest.fixture(scope="session")
def tiny_config():
    """A `MisterEConfig` with all of the model's parts, as small as they get."""
    return MisterEConfig(
        num_classes=4,
        speech_dim=6,
        text_dim=5,
        context_width=8,
        kernel_sizes=(1, 3),
        gru_layers=1,
        fusion_width=8,
        fusion_layers=1,
        attention_width=6,
        attention_heads=3,
        gate_width=5,
    )


@pytest.fixture(scope="session")
def make_batch(tiny_config):
    """Function of dialogue lengths that makes a padded batch of random dialogues.

    Some utterances miss a modality, some have no label. All vectors are random, also those in
    padding and of a missing modality.
    """

    def make(lengths, seed=0):
        random = np.random.default_rng(seed)
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        speech_present = mask & (random.random(mask.shape) < 0.7)
        text_present = mask & ((random.random(mask.shape) < 0.7) | ~speech_present)
        label = random.integers(tiny_config.num_classes, size=mask.shape)
        labelled = mask & (random.random(mask.shape) < 0.9)

        def vectors(width):
            return random.normal(size=(*mask.shape, width)).astype(np.float32)

        return {
            "speech": vectors(tiny_config.speech_dim),
            "text": vectors(tiny_config.text_dim),
            "mask": mask,
            "speech_present": speech_present,
            "text_present": text_present,
            "label": np.where(labelled, label, -1).astype(np.int32),
        }

    return make
