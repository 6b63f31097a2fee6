"""Hyperparameter sweeps: trains the points of a grid, and ranks them by validation score.

The test split is scored only for the point that is best on validation, and only on request.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import hashlib
import io
import itertools
import math
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from mister_jax.errors import InputError
from mister_jax.evaluation.figures import plot_sweep
from mister_jax.evaluation.variants import Row, Study, Variant, score_seeds
from mister_jax.io import write_json, write_text
from mister_jax.metrics import SCORE_NAMES, title
from mister_jax.models import MisterE, MisterEConfig
from mister_jax.nn.rngs import make_rngs
from mister_jax.optim import OptimizerConfig
from mister_jax.parallel.partitioning import ParallelConfig, make_partitioner
from mister_jax.tasks.config import config_seeds, dataclass_from_config
from mister_jax.tasks.fusion import FusionTask
from mister_jax.training.progress import TrainConfig
from mister_jax.training.runs import load_task

FILES = ("sweep.json", "sweep.csv", "sweep.png")
"""Files that `run_sweep` writes."""

MAX_POINTS = 1000
"""Maximum number of points in a sweep. From a larger grid, a sweep must draw random points."""

_ROW_FILE = "sweep_point.json"  # exists in the work directory of each completed point
# Fields that a sweep cannot vary, because points that differ in data or seeds are not comparable.
_FIXED = (
    "task",
    "seed",
    "num_seeds",
    "data.name",
    "data.data_dir",
    "data.folds",
    "data.fold",
    "data.fold_seed",
    "data.fold_splits",
    "data.validate_on_train",
)
# Sections and fields whose allowed values depend on the dataset, the devices or each other.
_CHECKED_WITH_DATA = (
    *("data.", "parallel.", "train."),
    *("loss.class_weights", "loss.target", "model.predict_score"),
)
# Fields that are validated only when the model is built, not by `MisterEConfig`.
_CHECKED_BY_MODEL = ("model.kernel_sizes",)
_MAX_NAME = 150


@dataclasses.dataclass(frozen=True)
class Axis:
    """A config field and the values that a sweep gives it.

    Attributes:
      field: Field of the config, such as "optimizer.learning_rate".
      values: Values of the field's type, in the order of the grid.
    """

    field: str
    values: tuple[Any, ...]


def parse_grid(config: ConfigDict, text: str) -> Axis:
    """Parses "FIELD=VALUE,VALUE", such as "model.kernel_sizes=(1),(1,3)".

    Commas within parentheses do not separate values.

    Raises:
      InputError: The field does not exist or cannot be varied, or a value has the wrong type.
    """
    field, equals, values_text = text.partition("=")
    field = field.strip().removeprefix("config.")
    if not equals or not field:
        raise InputError(f"--grid={text}; needed: FIELD=VALUE,VALUE")
    kind, current = _field_type(config, field)
    texts = _split(field, values_text)
    if not all(texts):
        raise InputError(f"--grid={text}: empty value; needed: FIELD=VALUE,VALUE")
    values = tuple(_parse_value(field, value, kind, current) for value in texts)
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"--grid={text}: the value {format_value(value)} is repeated")
    return Axis(field, values)


def _field_type(config: ConfigDict, field: str) -> tuple[type, Any]:
    """Returns the type and the current value of a config field."""
    *path, name = field.split(".")
    section: Any = config
    for part in (*path, name):
        if not isinstance(section, ConfigDict) or part not in section:
            allowed = ", ".join(section) if isinstance(section, ConfigDict) else "none"
            raise InputError(f"--grid={field}: no such field {part!r}; allowed: {allowed}")
        parent, section = section, section[part]
    if isinstance(section, ConfigDict):
        allowed = ", ".join(f"{field}.{part}" for part in section)
        raise InputError(f"--grid={field}: a section of the config; allowed: its fields {allowed}")
    if field in _FIXED:
        raise InputError(
            f"--grid={field}: cannot be varied; allowed: fields that change neither the data nor "
            "the seeds"
        )
    return parent.get_type(name), section


def _split(field: str, text: str) -> list[str]:
    """Splits at the commas outside of parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise InputError(f"--grid={field}={text}: unbalanced parentheses")
    return [part.strip() for part in parts]


def _parse_value(field: str, text: str, kind: type, current: Any) -> Any:
    """Converts the text of a value to the type of its field."""
    if text.lower() == "none" and current is None:
        return None
    inside = text[1:-1] if text[0] in "([" and text[-1] in ")]" else None
    allowed = {bool: "true, false", int: "integers", float: "finite numbers"}
    try:
        if issubclass(kind, tuple | list):
            if inside is None:
                allowed[kind] = "values in parentheses, such as (1,3)"
                raise ValueError
            items = [item.strip() for item in inside.split(",") if item.strip()]
            return tuple(_parse_item(item, current) for item in items)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            return int(text)
        if kind is float:
            if not math.isfinite(number := float(text)):
                raise ValueError
            return number
    except (ValueError, KeyError) as error:
        described = allowed.get(kind, f"values like {current}")
        raise InputError(f"--grid={field}: value {text!r}; allowed: {described}") from error
    return text if inside is None else inside


def _parse_item(text: str, current: Sequence[Any]) -> Any:
    """Converts an item to the type of the field's items, or to a literal if the field is empty."""
    if current:
        kind = type(current[0])
        return text.strip("'\"") if kind is str else kind(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def format_value(value: Any) -> str:
    """Formats a value so that `parse_grid` can read it."""
    if isinstance(value, tuple):
        return f"({','.join(map(str, value))})"
    return str(value)


def short_names(axes: Sequence[Axis]) -> list[str]:
    """Returns the last part of each field, or the whole field if the last part is not unique."""
    names = [axis.field.rpartition(".")[2] for axis in axes]
    return [
        axis.field if names.count(name) > 1 else name
        for axis, name in zip(axes, names, strict=True)
    ]


def grid_points(
    axes: Sequence[Axis], num_random: int | None = None, seed: int = 0
) -> list[tuple[Any, ...]]:
    """Returns the points of a grid, with one value for each axis.

    Args:
      axes: Axes of the grid.
      num_random: Number of different points to draw at random; None for all points. With the same
        seed, a larger number keeps the points of a smaller number and adds others.
      seed: Random seed.

    Raises:
      InputError: There are no axes, an axis is repeated, `num_random` or `seed` is out of range, or
        the result would have more than `MAX_POINTS` points.
    """
    if not axes:
        raise InputError("--grid is needed, such as --grid=optimizer.learning_rate=1e-4,1e-3")
    fields = [axis.field for axis in axes]
    for field in fields:
        if fields.count(field) > 1:
            raise InputError(f"--grid={field}: used twice; allowed: one --grid for each field")
    if num_random is not None and num_random < 1:
        raise InputError(f"--random={num_random}; allowed: 1 or more")
    if seed < 0:
        raise InputError(f"--seed={seed}; allowed: 0 or more")
    total = math.prod(len(axis.values) for axis in axes)
    count = total if num_random is None else min(num_random, total)
    if count > MAX_POINTS:
        raise InputError(f"{count} points; allowed: up to {MAX_POINTS}, such as --random=100")
    if num_random is None:
        return list(itertools.product(*(axis.values for axis in axes)))
    random = np.random.default_rng(seed)
    chosen: dict[tuple[int, ...], None] = {}
    while len(chosen) < count:
        chosen[tuple(int(random.integers(len(axis.values))) for axis in axes)] = None
    return [
        tuple(axis.values[index] for axis, index in zip(axes, indices, strict=True))
        for indices in chosen
    ]


def make_variants(
    config: ConfigDict, axes: Sequence[Axis], points: Sequence[tuple[Any, ...]]
) -> list[Variant]:
    """Returns the config and the name, such as "learning_rate=0.001,gamma=2.0", of each point.

    Raises:
      InputError: The dataset does not exist, or the config of a point is invalid.
    """
    variants = []
    for point in points:
        changed = ConfigDict(config.to_dict())
        for axis, value in zip(axes, point, strict=True):
            _set_field(changed, axis.field, value)
        name = _point_name(short_names(axes), point)
        try:
            _check_config(changed)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        variants.append(Variant(name, "", changed))
    FusionTask.from_data(config)  # checks the dataset
    configs = [variant.config for variant in variants]
    _check_values(axes, points, configs, _CHECKED_WITH_DATA, _check_with_data)
    _check_values(axes, points, configs, _CHECKED_BY_MODEL, _check_model)
    return variants


def _set_field(config: ConfigDict, field: str, value: Any) -> None:
    *path, name = field.split(".")
    section = config
    for part in path:
        section = section[part]
    section[name] = value


def _point_name(names: Sequence[str], point: Sequence[Any]) -> str:
    """Returns the name of a point, which is also the name of its work directory."""
    parts = []
    for name, value in zip(names, point, strict=True):
        text = "-".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
        parts.append(f"{name}={urllib.parse.quote(text, safe='+')}")
    joined = ",".join(parts)
    if len(joined) <= _MAX_NAME:
        return joined
    return f"{joined[:_MAX_NAME]}-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"


def _check_config(config: ConfigDict) -> None:
    """Checks the fields of a config that do not depend on the dataset."""
    FusionTask(config, ("a", "b"), _model_config(config))
    dataclass_from_config(OptimizerConfig, config.optimizer, "config.optimizer")
    dataclass_from_config(ParallelConfig, config.parallel, "config.parallel")
    dataclass_from_config(TrainConfig, config.train, "config.train")
    config_seeds(config)


def _check_values(
    axes: Sequence[Axis],
    points: Sequence[tuple[Any, ...]],
    configs: Sequence[ConfigDict],
    fields: tuple[str, ...],
    check: Callable[[ConfigDict], None],
) -> None:
    """Checks one point for each combination of values in some fields.

    Args:
      axes: Axes of the points.
      points: Points of the sweep.
      configs: Config of each point.
      fields: Fields, and sections that end with a point.
      check: Function that raises an error if a config is invalid.

    Raises:
      InputError: A combination is invalid.
    """
    indices = [index for index, axis in enumerate(axes) if axis.field.startswith(fields)]
    combinations: dict[tuple[Any, ...], ConfigDict] = {}
    for point, config in zip(points, configs, strict=True):
        combinations.setdefault(tuple(point[index] for index in indices), config)
    for values, config in combinations.items():
        try:
            check(config)
        except (ValueError, TypeError) as error:
            names = ", ".join(
                f"{axes[index].field}={format_value(value)}"
                for index, value in zip(indices, values, strict=True)
            )
            raise InputError(f"{names}: {error}" if names else str(error)) from error


def _check_with_data(config: ConfigDict) -> None:
    task = load_task(config)
    task.split("train", num_shards=1, shuffle=True, epochs=config.train.epochs)
    parallel = dataclass_from_config(ParallelConfig, config.parallel, "config.parallel")
    make_partitioner(parallel, task.sharding_rules)


def _check_model(config: ConfigDict) -> None:
    nnx.eval_shape(lambda: MisterE(_model_config(config), rngs=make_rngs(0)))


def _model_config(config: ConfigDict) -> MisterEConfig:
    sizes = {"num_classes": 2, "speech_dim": 1, "text_dim": 1}
    return dataclass_from_config(MisterEConfig, config.model, "config.model", **sizes)


def selection_score(config: ConfigDict) -> str:
    """Returns the validation score that ranks the points.

    This is the score used to select the best epoch, or weighted F1 if `select_by` is not one of
    `SCORE_NAMES`.
    """
    name: str = config.train.get("select_by", "weighted_f1")
    return name if name in SCORE_NAMES else "weighted_f1"


def run_sweep(
    config: ConfigDict,
    axes: Sequence[Axis],
    workdir: epath.PathLike,
    *,
    num_random: int | None = None,
    seed: int = 0,
    evaluate_test: bool = False,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Trains and scores the points of a grid, and writes `FILES`.

    Completed points are skipped, and interrupted points resume. Points of an earlier sweep in the
    same directory are reused if both grids have the same fields.

    Args:
      config: Config that the points change.
      axes: Fields to vary.
      workdir: Directory of the sweep, created if it does not exist.
      num_random: Number of random points of the grid; None for all points.
      seed: Random seed of the random points.
      evaluate_test: Whether to score the best point on the test split.
      quiet: Whether to hide progress.

    Returns:
      The content of `sweep.json`: "dataset", "score" (name of the score that ranks the points),
      "fields", "points" (the best first, each with "point", "values" by field, "seeds", and
      "validation", the result of `variants.score_seeds`), "best" (name of the best point), and
      "test" (test scores of the best point), if evaluated. None if SIGTERM interrupted the
      training.

    Raises:
      InputError: The grid or the config of a point is invalid, the dataset does not exist, or the
        directory belongs to a sweep with another config.
    """
    points = grid_points(axes, num_random, seed)
    variants = make_variants(config, axes, points)
    values = {
        variant.name: {axis.field: value for axis, value in zip(axes, point, strict=True)}
        for variant, point in zip(variants, points, strict=True)
    }
    study = Study(
        variants, workdir, splits=("validation",), row_file=_ROW_FILE, kind="point", quiet=quiet
    )
    score = selection_score(config)

    def write(test: dict[str, Any] | None = None) -> dict[str, Any]:
        rows = sorted(study.rows(), key=lambda row: -row["validation"]["mean"][score])
        result = {
            "dataset": config.data.name,
            "score": score,
            "fields": [axis.field for axis in axes],
            "points": [
                {
                    "point": row["variant"],
                    "values": values[row["variant"]],
                    "seeds": row["seeds"],
                    "validation": row["validation"],
                }
                for row in rows
            ],
            "best": rows[0]["variant"],
        }
        if test is not None:
            result["test"] = test
        if jax.process_index() == 0:
            _write_files(result, axes, study.workdir)
        return result

    def describe(row: Row) -> str:
        scores = row["validation"]
        return f"validation {title(score)} {format_score(scores, score)}"

    study.print(f"points: {len(variants)}, seeds of each: {len(config_seeds(config))}")
    if not study.run(describe, write):
        return None
    result = write()
    if not evaluate_test:
        return result
    (best,) = (variant for variant in variants if variant.name == result["best"])
    return write(score_seeds(best.config, study.folder(best), "test"))


def format_score(scores: dict[str, Any], name: str) -> str:
    """Formats the mean and the standard deviation over the seeds."""
    mean, deviation = scores["mean"][name], scores["deviation"][name]
    return f"{mean:.3f}" + (f" ± {deviation:.3f}" if len(scores["of_each"]) > 1 else "")


def _write_files(result: dict[str, Any], axes: Sequence[Axis], workdir: epath.Path) -> None:
    write_json(workdir / "sweep.json", result)
    write_text(workdir / "sweep.csv", sweep_csv(result))
    score = result["score"]
    means_and_deviations = {
        tuple(map(_shown, point["values"].values())): (
            point["validation"]["mean"][score],
            point["validation"]["deviation"][score],
        )
        for point in result["points"]
    }
    names = short_names(axes)
    plot_sweep(
        {name: tuple(map(_shown, axis.values)) for name, axis in zip(names, axes, strict=True)},
        means_and_deviations,
        f"validation {title(score)}",
        workdir / "sweep.png",
    )


def _shown(value: Any) -> Any:
    """Converts a value for a plot: numbers are unchanged, and other values become text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else format_value(value)


def sweep_csv(result: dict[str, Any]) -> str:
    """Returns the values and validation scores of all points as CSV, the best point first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    kinds = ("mean", "deviation", "ensemble")
    columns = [(name, kind) for name in SCORE_NAMES for kind in kinds]
    scores = [f"validation_{name}_{kind}" for name, kind in columns]
    writer.writerow(["rank", "point", *result["fields"], "seeds", *scores])
    for rank, point in enumerate(result["points"], start=1):
        cells = [format_value(value) for value in point["values"].values()]
        values = [point["validation"][kind][name] for name, kind in columns]
        writer.writerow([rank, point["point"], *cells, len(point["seeds"]), *values])
    return text.getvalue()
