"""Bundles: folders from which a trained model can predict on any machine.

A bundle has `config.json`, `model.safetensors` and a model card, `README.md`. The folder `encoders`
contains copies of encoders; encoders on the Hugging Face Hub may be downloaded instead. A bundle
has no absolute paths, so users can move and share it. In `config.json`, "./" stands for the
bundle's folder.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mister_jax.calibration import Calibration
from mister_jax.convert.safetensors import SINGLE_FILE, Checkpoint, save_tensors
from mister_jax.errors import InputError
from mister_jax.io import hash_file, read_json, write_json

FORMAT = 1
"""Version of the format; increment it if config or parameter names change."""

CONFIG_FILE, CARD_FILE = "config.json", "README.md"
LIBRARY = "mister_jax"
DOWNLOADED_FILES = (CONFIG_FILE, CARD_FILE, "*.safetensors*", "encoders/*")
"""Patterns of a bundle's files on the Hugging Face Hub."""

_IN_BUNDLE = "./"
_PACKAGES = ("mister_jax", "jax", "flax", "transformers")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle whose config has been read.

    Attributes:
      folder: Folder of the bundle.
      config: Experiment config of the training run, without the directory of the datasets.
      description: Model description; see `workdir.read_model_description`.
      progress: Training progress when the exported parameters were saved.
      calibration: Calibration of the probabilities; None if no calibration was fitted.
    """

    folder: pathlib.Path
    config: ConfigDict
    description: dict[str, Any]
    progress: dict[str, Any]
    calibration: Calibration | None

    def load_params(self, like: Any) -> Any:
        """Reads the parameters.

        Args:
          like: Tree of shapes with shardings, as for `Checkpoints.restore`.

        Raises:
          InputError: The weights are damaged or do not match `like`.
        """
        checkpoint = Checkpoint.open(self.folder / SINGLE_FILE)
        shapes = dict(_named_leaves(like))
        stored = {name: (tensor.shape, tensor.dtype) for name, tensor in checkpoint.items()}
        expected = {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
        different = sorted(
            name for name in stored | expected if stored.get(name) != expected.get(name)
        )
        if different:
            name = different[0]
            raise InputError(
                f"{self.folder / SINGLE_FILE}: {len(different)} parameters do not match "
                f"{CONFIG_FILE}, for example {name}: {_describe(stored.get(name))}; needed: "
                f"{_describe(expected.get(name))}"
            )

        def read(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            tensor = checkpoint[name]
            # Copy the slice, because a view would keep the file open.
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: np.array(tensor[index])
            )

        return jax.tree.unflatten(
            jax.tree.structure(like), [read(name, leaf) for name, leaf in shapes.items()]
        )


def is_bundle(folder: epath.PathLike) -> bool:
    """Returns whether a folder contains the config of a bundle.

    Raises:
      InputError: The config is damaged.
    """
    path = epath.Path(folder) / CONFIG_FILE
    return path.exists() and read_json(path).get("library_name") == LIBRARY


def read_bundle(folder: epath.PathLike) -> Bundle:
    """Reads the config of a bundle, and checks that no file it lists is missing or has changed.

    Raises:
      InputError: The bundle is damaged or incomplete, or its format is not `FORMAT`.
    """
    folder = pathlib.Path(os.path.normpath(pathlib.Path(folder).absolute()))
    path = folder / CONFIG_FILE
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path}: bundle format {content.get('format')}, written by mister_jax "
            f"{content.get('versions', {}).get('mister_jax', '(unknown)')}; this version reads "
            f"format {FORMAT}"
        )
    try:
        files = {str(name): str(expected) for name, expected in content["files"].items()}
        experiment, description, progress = (
            content[name] for name in ("experiment", "model", "progress")
        )
        for metadata in description.get("encoders", {}).values():
            _resolve_paths(metadata, folder)
            _resolve_paths(metadata["options"], folder)
        if "encoder" in experiment:
            _resolve_paths(experiment["encoder"]["options"], folder)
        config = ConfigDict(experiment)
        num_classes = description.get("model", {}).get("num_classes")
        class_names = tuple(description["class_names"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: damaged ({error!r}); needed: a file that mister-jax export has written"
        ) from error
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise InputError(f"{folder}: incomplete: no {name}; copy or export the bundle again")
        if hash_file(file) != expected:
            raise InputError(
                f"{file}: has changed since the bundle was written; copy or export the bundle again"
            )
    if num_classes is not None and num_classes != len(class_names):
        raise InputError(
            f"{path}: {len(class_names)} class names for a model of {num_classes} classes; needed: "
            "as many class names as classes"
        )
    calibration = content.get("calibration")
    if calibration is not None:
        calibration = Calibration.from_json(calibration, path, len(class_names))
    return Bundle(folder, config, description, progress, calibration)


def write_bundle(
    folder: pathlib.Path,
    config: ConfigDict,
    description: Mapping[str, Any],
    params: Any,
    progress: Mapping[str, Any],
    calibration: Calibration | None = None,
) -> None:
    """Writes the weights and the config of a bundle.

    Args:
      folder: Folder of the bundle, created if missing. Copied encoders must already be in it.
      config: Experiment config of the training run.
      description: Model description; see `workdir.read_model_description`.
      params: Tree of the trained parameters.
      progress: Training progress when these parameters were saved.
      calibration: Calibration of the probabilities.
    """
    tensors = {name: np.asarray(jax.device_get(leaf)) for name, leaf in _named_leaves(params)}
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    save_tensors(folder, tensors, max_shard_size=max(1, total))
    experiment = json.loads(copy.deepcopy(config).to_json_best_effort())
    experiment["data"]["data_dir"] = ""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    content = {
        "library_name": LIBRARY,
        "format": FORMAT,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "model": description,
        "progress": progress,
        "calibration": None if calibration is None else calibration.to_json(),
        "experiment": experiment,
        # The model card is not checked, because the owner of the bundle may edit it.
        "files": {
            file.relative_to(folder).as_posix(): hash_file(file)
            for file in files
            if file.name not in (CONFIG_FILE, CARD_FILE) or file.parent != folder
        },
    }
    write_json(folder / CONFIG_FILE, content)


def path_in_bundle(*parts: str) -> str:
    """Returns a path in a bundle with the prefix "./", which `read_bundle` makes absolute."""
    return _IN_BUNDLE + "/".join(parts)


def _resolve_paths(values: dict[str, Any], folder: pathlib.Path) -> None:
    """Replaces values that start with "./" with absolute paths."""
    for name, value in values.items():
        if isinstance(value, str) and value.startswith(_IN_BUNDLE):
            path = pathlib.Path(os.path.normpath((folder / value).absolute()))
            if not path.is_relative_to(folder.absolute()):
                raise ValueError(f"{value} is outside the bundle")
            values[name] = str(path)


def _named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a tree with dotted names, such as "gate.output.kernel"."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _describe(shape_and_dtype: tuple[tuple[int, ...], Any] | None) -> str:
    if shape_and_dtype is None:
        return "missing"
    shape, dtype = shape_and_dtype
    return f"{np.dtype(dtype).name} {list(shape)}"
