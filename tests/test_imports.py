"""Import rules between modules, and packages that an import must not load."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("mister_jax", "configs", "launch", "benchmarks")
    for path in ROOT.glob(f"{folder}/**/*.py")
)

# A part is a top-level module or folder. A part may import only parts in lower rows, so no two
# parts import each other.
LAYERS = (
    ("launch",),
    ("cli",),
    ("benchmarks", "reproduce"),
    ("configs", "evaluation"),
    ("inference", "training"),
    ("extraction", "pretrained"),
    ("predictor",),
    ("tasks",),
    ("bundle", "data", "encoders", "losses", "multi_seed", "workdir"),
    ("calibration", "console", "convert", "imbalance", "optim"),
    ("checkpoint", "io", "metrics", "models", "parallel", "schedules"),
    ("nn",),
    ("config_checks", "errors", "moved_paths"),
)
RANK = {part: rank for rank, parts in enumerate(reversed(LAYERS)) for part in parts}
# A package that only one part may import -> that part.
OWNERS = {"tensorflow": "data", "tensorflow_datasets": "data", "orbax": "checkpoint"}
ALLOWED_IN_NN = {"jax", "flax", "numpy", *sys.stdlib_module_names}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}
# mister_jax/__init__.py is excluded, because it imports its names only on first use.
PARTS = {name: path for name, path in MODULES.items() if name != "mister_jax"}


def imported_modules(path):
    """Yields the full names of the modules that a file imports, without type-checking imports."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                is_config = node.module == "mister_jax.configs"
                yield submodule if submodule in MODULES or is_config else node.module


def part_of(module):
    """Returns the name in LAYERS of the part that contains a module; None for other modules."""
    package, *rest = module.split(".")
    if package == "mister_jax":
        return rest[0] if rest else None
    return package if package in ("configs", "launch", "benchmarks") else None


@pytest.mark.parametrize("module", PARTS)
def test_imports_run_one_way(module):
    part = part_of(module)
    assert part in RANK, f"{part} has no place in LAYERS"
    for imported in imported_modules(PARTS[module]):
        other = part_of(imported)
        if other is not None and other != part:
            assert RANK[other] < RANK[part], f"{module} imports {imported}"


def test_no_modules_import_each_other():
    graph = {
        module: {other for other in imported_modules(path) if other in PARTS}
        for module, path in PARTS.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError and names the modules.


@pytest.mark.parametrize("module", [name for name in MODULES if part_of(name) == "nn"])
def test_layers_import_only_jax_and_flax(module):
    for imported in imported_modules(MODULES[module]):
        is_nn = imported.startswith("mister_jax.nn")
        assert is_nn or imported.split(".")[0] in ALLOWED_IN_NN, imported


@pytest.mark.parametrize("module", PARTS)
def test_owned_packages_are_imported_by_their_owner_only(module):
    for imported in imported_modules(PARTS[module]):
        owner = OWNERS.get(imported.split(".")[0], part_of(module))
        assert part_of(module) == owner, f"{module} imports {imported}"
        if imported == "mister_jax.data.lazy":
            # The metric writer needs TensorFlow to write event files for TensorBoard.
            allowed = part_of(module) == "data" or module == "mister_jax.training.metric_writer"
            assert allowed, f"{module} imports TensorFlow from {imported}"


def run_python(script):
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_TENSORFLOW = """
import importlib, pkgutil, sys

class NoTensorFlow:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, NoTensorFlow())
import jax
import jax.numpy as jnp
from flax import nnx
import mister_jax
import mister_jax.inference.recognizer

config = mister_jax.MisterEConfig.small(
    speech_dim=4, text_dim=3, context_dim=4, fusion_dim=4, attention_dim=3, fusion_layers=1
)
graphdef, shapes = nnx.split(nnx.eval_shape(lambda: mister_jax.MisterE(config, rngs=nnx.Rngs(0))))
params = jax.tree.map(lambda shape: jnp.full(shape.shape, 0.1), shapes)
forward = jax.jit(lambda params, *batch: nnx.merge(graphdef, params)(*batch))
output = forward(params, jnp.ones((1, 2, 4)), jnp.ones((1, 2, 3)), jnp.ones((1, 2), bool))
assert jnp.isfinite(output.logits).all()
try:
    import mister_jax.training.loop
except mister_jax.errors.MissingExtraError as error:
    print(error)
"""


def test_the_model_and_the_recognizer_need_no_tensorflow():
    assert run_python(WITHOUT_TENSORFLOW) == (
        "mister_jax.training needs tensorflow, tensorflow_datasets; install it with pip install "
        '"mister_jax[train]"\n'
    )


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        (
            "from mister_jax import MisterE, MisterEConfig",
            "av h5py matplotlib ml_collections orbax.checkpoint safetensors "
            "tensorflow torch transformers",
        ),
        (
            "from mister_jax import load",
            "matplotlib mister_jax.evaluation mister_jax.training orbax.checkpoint "
            "tensorflow torch",
        ),
        ("import mister_jax.cli.main", "absl flax jax numpy"),
        ("import mister_jax.cli.train", "flax orbax.checkpoint tensorflow transformers"),
    ],
)
def test_an_import_does_not_load_what_it_does_not_need(statement, unwanted):
    script = f"import sys; {statement}; print(*sorted(set({unwanted.split()}) & set(sys.modules)))"
    assert run_python(script) == "\n"
