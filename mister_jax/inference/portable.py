"""Exports MiSTER-E as a StableHLO program that needs only JAX and flatbuffers to run."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from mister_jax.data.storage import atomic_directory
from mister_jax.errors import InputError
from mister_jax.io import write_json, write_text
from mister_jax.models import EXPERTS
from mister_jax.predictor import Predictor
from mister_jax.pretrained import load_mister_e

PROGRAM_FILE, CONFIG_FILE = "model.stablehlo", "config.json"
PLATFORMS = ("cpu", "cuda", "tpu")
_INPUTS = ("speech", "text", "mask", "speech_present", "text_present")

_README = """\
# A MiSTER-E model as a StableHLO program

The program takes the speech and text vectors of a batch of dialogues. It runs on CPU, NVIDIA GPU
and TPU wherever `jax` and `flatbuffers` are installed. `config.json` has the names of the classes
and experts, and the shapes of inputs and outputs.

```python
import json, pathlib
import numpy as np
from jax import export

config = json.loads(pathlib.Path("config.json").read_text())
program = export.deserialize(pathlib.Path("model.stablehlo").read_bytes())
batch, length = 1, 3  # any positive numbers
speech = np.zeros((batch, length, {speech_dim}), np.float32)
text = np.zeros((batch, length, {text_dim}), np.float32)
mask = np.ones((batch, length), bool)  # no padding; all utterances have speech and text
output = program.call(speech, text, mask, mask, mask)
print([config["class_names"][index] for index in output["probabilities"][0].argmax(-1)])
```
"""


def export_program(
    model: epath.PathLike, output: epath.PathLike, *, overwrite: bool = False
) -> None:
    """Writes a program that contains MiSTER-E's parameters and accepts dialogues of any length.

    The program takes raw features and standardizes them as in training. The predictions of several
    seeds are averaged, and probabilities are calibrated if the model has a calibration. Encoders
    are not included: their fastest kernels depend on the length of the input, so one program cannot
    support all lengths.

    Args:
      model: See `pretrained.find_model`.
      output: Folder to write, with `model.stablehlo`, `config.json` and a `README.md`.
      overwrite: Whether to replace an existing program.

    Raises:
      InputError: The model is not a MiSTER-E model, or the output exists or cannot be written.
    """
    target = epath.Path(output).resolve()
    if target.exists():
        if not overwrite:
            raise InputError(f"{target}: exists; allowed: another --output, or --overwrite")
        if not (target / PROGRAM_FILE).exists():
            raise InputError(f"{target}: no {PROGRAM_FILE}; --overwrite only replaces a program")
    predictor = load_mister_e(model)
    task = predictor.task
    exported = _export(predictor)
    dims = {"speech_dim": task.model.speech_dim, "text_dim": task.model.text_dim}
    config = {
        "class_names": task.class_names,
        "experts": EXPERTS,
        "inputs": _describe(dict(zip(_INPUTS, exported.in_avals, strict=True))),
        "outputs": _describe(jax.tree.unflatten(exported.out_tree, exported.out_avals)),
        "platforms": exported.platforms,
        "jax": jax.__version__,
    }
    with atomic_directory(target, target.parent, overwrite=overwrite) as place:
        folder = pathlib.Path(place) / target.name
        folder.mkdir()
        (folder / PROGRAM_FILE).write_bytes(exported.serialize())
        write_json(folder / CONFIG_FILE, json.loads(json.dumps(config)))
        write_text(folder / "README.md", _README.format(**dims))


def _export(predictor: Predictor) -> jax.export.Exported:
    """Exports the prediction function for any number of dialogues of any length."""
    task = predictor.task
    seeds = [nnx.split(model) for model in predictor.models()]

    def predict(*inputs: jax.Array) -> dict[str, jax.Array]:
        batch = dict(zip(_INPUTS, inputs, strict=True))
        outputs = [task.predict(nnx.merge(graph, state), batch) for graph, state in seeds]
        averaged = jax.tree.map(lambda *values: sum(values) / len(values), *outputs)
        if predictor.calibration is not None:
            averaged["probabilities"] = predictor.calibration(averaged["probabilities"])
        return {**averaged, "expert_present": outputs[0]["expert_present"]}

    size = jax.export.symbolic_shape("batch, length")
    flags = jax.ShapeDtypeStruct(size, bool)
    return jax.export.export(jax.jit(predict), platforms=PLATFORMS)(
        jax.ShapeDtypeStruct((*size, task.model.speech_dim), jnp.float32),
        jax.ShapeDtypeStruct((*size, task.model.text_dim), jnp.float32),
        flags,
        flags,
        flags,
    )


def _describe(avals: Mapping[str, Any]) -> dict[str, str]:
    """Returns the dtype and shape of each input or output by name."""
    return {
        name: f"{aval.dtype}[{', '.join(map(str, aval.shape))}]" for name, aval in avals.items()
    }
