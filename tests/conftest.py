"""Setup of all tests: eight CPU devices, the `--parity` option, shared fixtures."""

import os
import shutil
import tempfile

# Temporary files of tests and libraries share one folder, which is deleted if all tests pass. The
# folders of pytest-xdist's workers are inside the folder of the process that starts the workers.
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="mister_jax_")
# JAX reads these variables when it is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# As in `mister-jax`: importing TensorFlow without Keras 3 saves 2 s in each process.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
# Tests and the processes they start share compiled programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="jax_cache_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import functools
import gc
import multiprocessing.util
import pathlib
from collections import defaultdict

import jax
import numpy as np
import pytest

from mister_jax import MisterEConfig, configs
from mister_jax.parallel import sharding
from tests.helpers.golden import GOLDEN

CHECKOUT = pathlib.Path(__file__).parents[1]

# The slowest test files, slowest first. They start first, so that none runs alone at the end.
SLOWEST = (
    "test_resume",
    "test_distributed",
    "test_docs",
    "test_notebooks",
    "test_commands",
    "test_encoder",
    "test_feature_dataset",
    "test_reproduce",
    "test_runs",
)


def pytest_addoption(parser):
    parser.addoption("--parity", action="store_true", help="run only the tests marked parity")


def pytest_configure(config):
    if not (CHECKOUT / "configs").samefile(pathlib.Path(configs.__file__).parent):
        raise pytest.UsageError(
            f"mister_jax.configs is {configs.__file__}, from another checkout; run "
            f"`pip install -e {CHECKOUT}`"
        )
    # JAX creates so many objects that garbage collection would take a tenth of the test time.
    gc.set_threshold(20_000, 20, 50)
    if config.getoption("parity"):
        return  # Parity tests compare the optimized programs that users run.
    # Compilation with all optimizations would take two thirds of the test time. The environment
    # variable is for the processes that tests start.
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    # The programs are small: splitting them to compile the parts in parallel takes longer.
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


# Compiling for eight devices takes twice as long as for one device. Therefore, a job uses only one
# device, except in tests marked `devices`.
sharding.job_devices = lambda: jax.devices()[:1]


def _use_marked_devices(request):
    """Lets the jobs of tests marked `devices` use all eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("devices"):
            patch.setattr(sharding, "job_devices", jax.devices)
        yield


# The second fixture also covers the module-scoped fixtures of a marked module.
use_devices_in_test = pytest.fixture(autouse=True)(_use_marked_devices)
use_devices_in_module = pytest.fixture(scope="module", autouse=True)(_use_marked_devices)


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs():
    """Frees the compiled programs of a test file.

    The programs of all files would take 6 GB. Few programs are used by several files.
    """
    yield
    jax.clear_caches()


def pytest_sessionfinish(exitstatus):
    # Without `gc.freeze`, the last garbage collections of pytest would take several seconds.
    gc.collect()
    gc.freeze()
    if exitstatus == 0 and "PYTEST_XDIST_WORKER" not in os.environ:
        # Priority -200 comes after -100, at which multiprocessing deletes its own folders.
        remove = functools.partial(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)
        multiprocessing.util.Finalize(None, remove, exitpriority=-200)


def pytest_collection_finish():
    # The objects of imported modules are never freed, so garbage collection can skip them.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    parity = config.getoption("parity")
    other = [item for item in items if ("parity" in item.keywords) != parity]
    if other:
        config.hook.pytest_deselected(items=other)
    order = {name: position for position, name in enumerate(SLOWEST)}
    items[:] = sorted(
        (item for item in items if ("parity" in item.keywords) == parity),
        key=lambda item: order.get(item.path.stem, len(order)),
    )


@pytest.fixture(scope="session")
def golden():
    """Arrays of the official model as {group: {name: array}}; see golden/README.md."""
    groups = defaultdict(dict)
    with np.load(GOLDEN / "mister_e_head.npz") as file:
        for path, value in file.items():
            group, _, name = path.partition("/")
            groups[group][name] = value
    return dict(groups)


@pytest.fixture(scope="session")
def tiny_config():
    """A tiny `MisterEConfig` with every kind of layer in the released model."""
    return MisterEConfig(
        num_classes=4,
        speech_dim=6,
        text_dim=5,
        context_dim=8,
        kernel_sizes=(1, 3),
        gru_layers=1,
        fusion_dim=8,
        fusion_layers=1,
        attention_dim=6,
        attention_heads=3,
        gate_dim=5,
    )


@pytest.fixture(scope="session")
def make_batch(tiny_config):
    """Returns a function that makes a padded batch of random dialogues from their lengths.

    Some utterances lack a modality or a label. Vectors of padding and of missing modalities are
    random too.
    """

    def make(lengths, seed=0):
        random = np.random.default_rng(seed)
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        speech_present = mask & (random.random(mask.shape) < 0.7)
        text_present = mask & ((random.random(mask.shape) < 0.7) | ~speech_present)
        label = random.integers(tiny_config.num_classes, size=mask.shape)
        labeled = mask & (random.random(mask.shape) < 0.9)

        def vectors(dim):
            return random.normal(size=(*mask.shape, dim)).astype(np.float32)

        return {
            "speech": vectors(tiny_config.speech_dim),
            "text": vectors(tiny_config.text_dim),
            "mask": mask,
            "speech_present": speech_present,
            "text_present": text_present,
            "label": np.where(labeled, label, -1).astype(np.int32),
        }

    return make


@pytest.fixture
def out_of_memory():
    """Returns a function that raises JAX's error for devices without free memory."""

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nHm"
        )

    return fail


@pytest.fixture(scope="session")
def word_tokenizer():
    """The function `make_word_tokenizer`."""
    from tests.helpers.tiny_encoders import make_word_tokenizer

    return make_word_tokenizer


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A tiny BERT with random weights and its tokenizer. Tests must not change it."""
    from tests.helpers.tiny_encoders import save_bert

    folder = tmp_path_factory.mktemp("tiny_bert")
    save_bert(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A tiny Llama with random weights and its tokenizer. Tests must not change it."""
    from tests.helpers.tiny_encoders import save_llama

    folder = tmp_path_factory.mktemp("tiny_llama")
    save_llama(folder)
    return folder


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory):
    """A tiny Whisper for clips up to 0.8 s, with random weights. Tests must not change it."""
    from tests.helpers.tiny_encoders import WHISPER_CONFIG, save_encoder

    folder = tmp_path_factory.mktemp("tiny_whisper")
    save_encoder(folder, WHISPER_CONFIG)
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    """A tiny Qwen2-Audio for clips up to 0.8 s, with random weights. Tests must not change it."""
    from tests.helpers.tiny_encoders import save_qwen2_audio

    folder = tmp_path_factory.mktemp("tiny_qwen")
    save_qwen2_audio(folder)
    return folder


@pytest.fixture(scope="session")
def salmonn_options(tmp_path_factory, llama_folder):
    """The four checkpoints of a tiny SALMONN for clips up to 1 s. Tests must not change them."""
    from tests.helpers.tiny_encoders import save_salmonn

    return save_salmonn(tmp_path_factory.mktemp("tiny_salmonn"), llama_folder)


@pytest.fixture(scope="session")
def spoken_dir(tmp_path_factory):
    """A folder with the dataset `manifest/spoken`, in which the words determine the emotion."""
    from tests.helpers.tiny_datasets import write_spoken

    folder = tmp_path_factory.mktemp("spoken")
    write_spoken(folder)
    return folder / "data"


@pytest.fixture(scope="session")
def heard_dir(tmp_path_factory):
    """A folder with the dataset `manifest/heard`, in which the pitch determines the emotion."""
    from tests.helpers.tiny_datasets import write_heard

    folder = tmp_path_factory.mktemp("heard")
    write_heard(folder)
    return folder / "data"


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory):
    """A folder with the dataset `tiny`: a few short synthetic dialogues."""
    from tests.helpers.training import write_tiny_dataset

    folder = tmp_path_factory.mktemp("data")
    write_tiny_dataset(folder, {"train": 12, "validation": 5, "test": 6})
    return folder


@pytest.fixture(scope="session")
def finished_workdir(tiny_data_dir, tmp_path_factory):
    """The work directory of a training run of two epochs on `tiny`."""
    from mister_jax.training.loop import train
    from tests.helpers.training import make_tiny_config

    workdir = tmp_path_factory.mktemp("finished") / "run"
    progress = train(make_tiny_config(tiny_data_dir), workdir, quiet=True)
    assert progress.finished and progress.epoch == 2
    return workdir
