"""Which part of the library may import which, and what works without TensorFlow."""

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

# A part may import those of its own row and of the rows below it.
LAYERS = (
    ("launch", "configs"),
    ("benchmarks",),
    ("train", "training", "evaluation", "extract", "evaluate", "predict", "export"),
    ("tasks",),
    ("steps", "seeds"),
    # "mister_jax" is its __init__.py, which gathers names.
    ("mister_jax", "models", "encoders", "convert", "data", "losses", "metrics", "console"),
    ("errors", "config_checks", "schedules", "parallel", "optim", "checkpoint", "io"),
    ("nn",),
)
RANK = {part: rank for rank, parts in enumerate(reversed(LAYERS)) for part in parts}
# A package imported by one part alone -> that part.
OWNERS = {"tensorflow": "data", "tensorflow_datasets": "data", "orbax": "checkpoint"}
FOR_LAYERS = {"jax", "flax", "numpy", *sys.stdlib_module_names}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported_modules(path):
    """Full names of what a file imports; of our own, the modules that are imported."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def part_of(module):
    """The row entry a module of ours belongs to; None for one of others."""
    package, *rest = module.split(".")
    if package == "mister_jax" and rest:
        return rest[0]
    return package if package in ("mister_jax", "configs", "launch", "benchmarks") else None


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    part = part_of(module)
    assert part in RANK, f"{part} has no place in LAYERS"
    for imported in imported_modules(MODULES[module]):
        other = part_of(imported)
        if other is not None:
            assert RANK[other] <= RANK[part], f"{module} imports {imported}"


def test_no_modules_import_each_other():
    graph = {
        module: {other for other in imported_modules(path) if other in MODULES}
        for module, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names them


@pytest.mark.parametrize("module", [name for name in MODULES if part_of(name) == "nn"])
def test_layers_import_jax_and_flax_only(module):
    for imported in imported_modules(MODULES[module]):
        ours = imported.startswith("mister_jax.nn")
        assert ours or imported.split(".")[0] in FOR_LAYERS, imported


@pytest.mark.parametrize("module", MODULES)
def test_packages_of_one_part_are_imported_there_alone(module):
    for imported in imported_modules(MODULES[module]):
        owner = OWNERS.get(imported.split(".")[0], part_of(module))
        assert part_of(module) == owner, f"{module} imports {imported}"
        if imported == "mister_jax.data.lazy":
            assert part_of(module) == "data", f"{module} imports TensorFlow from {imported}"


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

for module in pkgutil.walk_packages(mister_jax.__path__, "mister_jax."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # one module compares with PyTorch, some write datasets
        writes_datasets = module.name.startswith("mister_jax.data.")
        if error.name != "torch" and not (writes_datasets and error.name.startswith("tensorflow")):
            raise

config = mister_jax.MisterEConfig.small(
    speech_dim=4, text_dim=3, context_dim=4, fusion_dim=4, attention_dim=3, fusion_layers=1
)
graphdef, shapes = nnx.split(nnx.eval_shape(lambda: mister_jax.MisterE(config, rngs=nnx.Rngs(0))))
params = jax.tree.map(lambda shape: jnp.full(shape.shape, 0.1), shapes)
forward = jax.jit(lambda params, *batch: nnx.merge(graphdef, params)(*batch))
output = forward(params, jnp.ones((1, 2, 4)), jnp.ones((1, 2, 3)), jnp.ones((1, 2), bool))
assert jnp.isfinite(output.logits).all()
assert not {"tensorflow", "tensorflow_datasets"} & set(sys.modules)
print("works")
"""


def test_all_modules_import_and_the_model_runs_without_tensorflow():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "works\n", done.stderr


def test_loading_a_model_imports_neither_torch_nor_what_draws_and_logs():
    script = (
        "import sys; from mister_jax import load; "
        "print(sorted({'torch', 'tensorboardX', 'matplotlib', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
