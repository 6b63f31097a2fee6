"""Training runs, and groups of runs that share compiled programs.

Runs whose configs differ only in the data, such as the folds of a cross-validation, share their
compiled steps. These runs train one after another or several at once. If several runs train at
once, their states are stacked, and each step takes one batch of every run. Each run has a separate
work directory, random numbers, schedule and progress, so its results equal the results of separate
training up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mister_jax import multi_seed
from mister_jax.checkpoint import Checkpoints
from mister_jax.data.batching import length_buckets
from mister_jax.data.padding import PADDING
from mister_jax.data.split_guard import training_splits_only
from mister_jax.errors import InputError
from mister_jax.io import flatten
from mister_jax.optim import OptimizerConfig, optimizer_with_schedule
from mister_jax.parallel.multihost import assert_same_in_all_processes
from mister_jax.parallel.partitioning import (
    CompiledStep,
    EvalFn,
    ParallelConfig,
    Partitioner,
    Step,
    make_partitioner,
    psum_if_mapped,
)
from mister_jax.tasks.base import Split, Task
from mister_jax.tasks.config import check_sections, config_seeds, dataclass_from_config
from mister_jax.tasks.registry import task_class
from mister_jax.training.metric_writer import MetricWriter
from mister_jax.training.progress import MAE, TrainConfig, TrainProgress
from mister_jax.training.steps import ModelTemplate, make_eval_step, make_train_step
from mister_jax.workdir import check_config, check_data, read_planned_epochs

Batch = dict[str, Any]
Shape = tuple[int, int]
"""Number of rows and padded length of a batch."""


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A config, its work directory, and the objects created from them before compilation.

    Attributes:
      config: Experiment config.
      workdir: Work directory.
      options: Options of the training loop.
      optimizer: Options of the optimizer.
      seeds: Seeds of the models that train together.
      task: Task of the config.
      partitioner: Partitioner of the steps.
      train_split: Training split.
      validation_split: Validation split.
      data_fingerprints: Fingerprints of the splits, as stored in the work directory.
    """

    config: ConfigDict
    workdir: epath.Path
    options: TrainConfig
    optimizer: OptimizerConfig
    seeds: tuple[int, ...]
    task: Task
    partitioner: Partitioner
    train_split: Split
    validation_split: Split
    data_fingerprints: dict[str, Any]

    @property
    def total_steps(self) -> int:
        """Number of training steps until the last epoch."""
        return self.options.epochs * self.train_split.steps

    def shares_steps_with(self, other: RunPlan) -> bool:
        """Returns whether two runs can share compiled steps, because only their data differ."""
        configs = [plan.config.to_dict() for plan in (self, other)]
        for config in configs:
            del config["data"]
        if configs[0] != configs[1] or not self.task.shares_steps_with(other.task):
            return False
        return self._batch_fields() == other._batch_fields()

    def _batch_fields(self) -> list[set[str]]:
        splits = (self.train_split, self.validation_split)
        return [set(split.example_batch(split.shapes[0])) for split in splits]


def load_task(config: ConfigDict) -> Task:
    """Creates the config's task for its dataset.

    Raises:
      InputError: The config or the dataset is invalid.
    """
    task = task_class(config).from_data(config)
    if config.train.get("select_by") == MAE and not task.predicts_score:
        raise InputError("config.train.select_by=mae needs config.model.predict_score=True")
    return task


def plan_run(config: ConfigDict, workdir: epath.PathLike) -> RunPlan:
    """Loads the data of a run, and checks its config and work directory.

    Raises:
      InputError: The config, dataset or work directory is invalid.
    """
    workdir = epath.Path(workdir)
    check_sections(config)
    options = dataclass_from_config(TrainConfig, config.train, "config.train")
    parallel = dataclass_from_config(ParallelConfig, config.parallel, "config.parallel")
    optimizer = dataclass_from_config(OptimizerConfig, config.optimizer, "config.optimizer")
    check_config(config, workdir)
    seeds = config_seeds(config)

    task = load_task(config)
    partitioner = make_partitioner(parallel, task.sharding_rules)
    num_shards = partitioner.num_shards
    planned_epochs = read_planned_epochs(workdir) or options.epochs
    train_split, validation_split = (
        task.split(name, num_shards=num_shards, shuffle=name == "train", epochs=planned_epochs)
        for name in ("train", "validation")
    )
    data_fingerprints = {
        "train": {
            "fingerprint": train_split.fingerprint(),
            "steps_per_epoch": train_split.steps,
            "planned_epochs": planned_epochs,
        },
        "validation": {"fingerprint": validation_split.fingerprint()},
    }
    check_data(data_fingerprints, config.data.name, workdir)
    # Otherwise, the processes would wait for each other forever, or train different models.
    values = flatten({"workdir": workdir, "config": config.to_dict(), "data": data_fingerprints})
    del values["config.data.data_dir"]  # Each machine may have its own copy of the dataset.
    assert_same_in_all_processes({name: str(value) for name, value in values.items()})
    return RunPlan(
        config=config,
        workdir=workdir,
        options=options,
        optimizer=optimizer,
        seeds=seeds,
        task=task,
        partitioner=partitioner,
        train_split=train_split,
        validation_split=validation_split,
        data_fingerprints=data_fingerprints,
    )


@dataclasses.dataclass
class SharedSteps:
    """Batch shapes, compiled steps and initial states that several runs share.

    Attributes:
      train_shapes: Shapes (rows, padded length) of the training batches, by ascending length.
      validation_shapes: Shapes of the validation batches.
      num_steps: Number of steps of the longest run.
      compiled_steps: Compiled steps by number of simultaneous runs, filled in by `train_group`.
      initial_states: Model template, shapes of one seed's state, and stacked initial states of one
        run's seeds, filled in by `train_group` if the runs start from random parameters.
    """

    train_shapes: tuple[Shape, ...]
    validation_shapes: tuple[Shape, ...]
    num_steps: int
    compiled_steps: dict[int, CompiledSteps] = dataclasses.field(default_factory=dict)
    initial_states: tuple[ModelTemplate, Any, Any] | None = None

    def constants(self, runs: Sequence[TrainingRun], num_seeds: int) -> Any:
        """Returns the arrays that the runs' steps read as constants, stacked over all models."""
        per_run = [
            {
                # `resize` repeats the rates of shorter runs, which never use the repeated rates.
                "learning_rates": np.resize(run.learning_rates, self.num_steps),
                "task": run.plan.task.constants(),
            }
            for run in runs
        ]
        return multi_seed.stack_seeds([values for values in per_run for _ in range(num_seeds)])


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """Compiled functions for training.

    Attributes:
      train: Training step.
      eval: Evaluation step.
      params_for_evaluation: Function that takes a state's "params" and "opt_state" and returns the
        parameter tree for validation and prediction.
    """

    train: CompiledStep
    eval: CompiledStep
    params_for_evaluation: Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class RunGroup:
    """Runs that train at the same time.

    Attributes:
      configs: Config of each run.
      workdirs: Work directory of each run.
      shared: Steps shared with other groups; None for a single run with its own compiled steps.
    """

    configs: tuple[ConfigDict, ...]
    workdirs: tuple[epath.PathLike, ...]
    shared: SharedSteps | None = None


@training_splits_only()
def plan_groups(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[epath.PathLike],
    models_at_once: int,
    *,
    is_complete: Callable[[int], bool] = lambda index: False,
) -> list[RunGroup]:
    """Groups runs that can train at the same time.

    Consecutive runs whose configs differ only in the data share compiled programs if the job has a
    single process. The data of all runs is read to plan the batches, but is not kept in memory.

    Args:
      configs: Experiment configs.
      workdirs: Work directory of each config.
      models_at_once: Maximum number of models that train at the same time. Each seed of a run is
        one model, and the seeds of a run always train together.
      is_complete: Function that takes the index of a run and returns whether the run is already
        complete. Complete runs are in no group, but the shared batch shapes include them, so that a
        restarted study uses the same shapes.

    Raises:
      InputError: A config, dataset or work directory is invalid.
    """
    families: list[_Family] = []
    for index, (config, workdir) in enumerate(zip(configs, workdirs, strict=True)):
        plan = plan_run(config, workdir)
        # In a job of several processes, each process takes an equal part of a batch's rows. Shared
        # shapes would change which rows a process takes, and with it their random numbers.
        can_share = families and jax.process_count() == 1
        if not can_share or not families[-1].first.shares_steps_with(plan):
            families.append(_Family(plan))
        families[-1].add(index, plan)
    groups = []
    for family in families:
        shared = family.shared_steps() if len(family.indices) > 1 else None
        pending = [index for index in family.indices if not is_complete(index)]
        size = max(1, models_at_once // len(family.first.seeds))
        for start in range(0, len(pending), size):
            members = pending[start : start + size]
            groups.append(
                RunGroup(
                    tuple(configs[index] for index in members),
                    tuple(workdirs[index] for index in members),
                    shared,
                )
            )
    return groups


@dataclasses.dataclass
class _Family:
    """Runs that share compiled steps, and the shapes of their batches."""

    first: RunPlan
    indices: list[int] = dataclasses.field(default_factory=list)
    train_shapes: list[list[Shape]] = dataclasses.field(default_factory=list)
    validation_shapes: list[list[Shape]] = dataclasses.field(default_factory=list)
    num_steps: int = 0

    def add(self, index: int, plan: RunPlan) -> None:
        self.indices.append(index)
        self.train_shapes.append(batch_shapes(plan.train_split))
        self.validation_shapes.append(batch_shapes(plan.validation_split))
        self.num_steps = max(self.num_steps, plan.total_steps)

    def shared_steps(self) -> SharedSteps:
        return SharedSteps(
            shared_shapes(self.train_shapes), shared_shapes(self.validation_shapes), self.num_steps
        )


def batch_shapes(split: Split) -> list[Shape]:
    """Returns the shape of each batch in an epoch of a split."""
    planned = split.plan.epoch(0, 0, shuffle=False)
    return [(len(rows), length) for rows, length in planned]


def shared_shapes(shapes_per_run: Sequence[Sequence[Shape]]) -> tuple[Shape, ...]:
    """Returns batch shapes into which the batches of all runs fit.

    There are at most as many shapes as in the run with the most shapes. The padded lengths minimize
    the sum of the lengths of all batches; their numbers of rows are not considered.

    Args:
      shapes_per_run: For each run, the shapes of all batches in an epoch.
    """
    num_shapes = max(len(set(shapes)) for shapes in shapes_per_run)
    batches = np.array([shape for shapes in shapes_per_run for shape in shapes])
    rows, lengths = batches.T
    boundaries = length_buckets(lengths, num_shapes)
    bucket = np.searchsorted(boundaries, lengths)
    return tuple(
        (int(rows[bucket == index].max()), length) for index, length in enumerate(boundaries)
    )


@dataclasses.dataclass
class TrainingRun:
    """A training run in progress.

    Attributes:
      plan: Config, work directory and data of the run.
      checkpoints: Checkpoints in the work directory.
      progress: Progress at the end of the last complete epoch.
      step: Number of completed steps.
      writer: Metric writer while the run trains.
      pending_metrics: Metrics of the most recent steps that have not been written yet.
      num_one_class_epochs: Number of consecutive epochs in which each seed has predicted a single
        class, [S].
    """

    plan: RunPlan
    checkpoints: Checkpoints
    progress: TrainProgress
    step: int = 0
    writer: MetricWriter | None = None
    pending_metrics: list[Any] = dataclasses.field(default_factory=list)
    num_one_class_epochs: Any = 0

    @functools.cached_property
    def learning_rates(self) -> np.ndarray:
        """Learning rates of all steps, [total_steps] float32."""
        schedule = self.plan.optimizer.make_schedule(self.plan.total_steps)
        # One program for the whole schedule compiles faster than one program per operation.
        return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(self.plan.total_steps)))

    @property
    def steps_left(self) -> int:
        """Number of steps until the last epoch; 0 if the run has finished or stopped early."""
        return 0 if self.progress.finished else self.plan.total_steps - self.step

    @property
    def step_in_epoch(self) -> int:
        """Number of completed steps since the last validation."""
        return self.step - self.progress.epoch * self.plan.train_split.steps

    @property
    def is_epoch_complete(self) -> bool:
        """Whether all steps of the current epoch are complete; its validation comes next."""
        return self.step_in_epoch == self.plan.train_split.steps

    def write(self, scalars: Mapping[str, float]) -> None:
        """Writes metrics of the current step."""
        if self.writer is not None:
            self.writer(self.step, scalars)


@dataclasses.dataclass(frozen=True)
class RunBatches:
    """Batches for R runs, from one split of each run.

    With a single run, each batch is padded to the smallest of the given shapes into which it fits.
    With several runs, all batches are padded to the largest number of rows and the largest length
    in `shapes`. Their arrays have a run axis after the row axis: [B, R, T, ...]. The row axis is
    first because rows are divided among devices.

    Attributes:
      splits: Split of each run.
      shapes: Result of `shared_shapes`, required for several runs. If None, the batches of a single
        run keep their shapes.
      num_epochs: Total number of epochs. One pipeline makes the batches of consecutive epochs.
    """

    splits: Sequence[Split]
    shapes: Sequence[Shape] | None = None
    num_epochs: int = 1
    _pipelines: dict[int, tuple[int, Iterator[Batch]]] = dataclasses.field(
        default_factory=dict, repr=False
    )
    """Next epoch of each run, and the iterator over the batches of this and later epochs."""

    def shapes_by_first_use(self, epoch: int, start_step: int) -> list[Shape]:
        """Returns the distinct shapes (rows, padded length) in the order of their first use."""
        if len(self.splits) > 1:
            return [self.largest_shape]
        shapes = self.splits[0].shapes_by_first_use(epoch, start_step)
        return list(dict.fromkeys(self._fitting_shape(shape) for shape in shapes))

    @property
    def largest_shape(self) -> Shape:
        """Shape of the largest batch; with several runs, the shape of all batches."""
        shapes = self.splits[0].shapes if self.shapes is None else self.shapes
        if len(self.splits) == 1:
            return max(shapes, key=math.prod)
        return max(rows for rows, _ in shapes), max(length for _, length in shapes)

    def example_batch(self, shape: Shape) -> Batch:
        """Returns a batch with one of `shapes_by_first_use`, for compilation."""
        examples = [split.example_batch(shape) for split in self.splits]
        return self._combine(examples)

    def epoch(
        self, positions: Mapping[int, tuple[int, int]]
    ) -> Iterator[tuple[Batch, tuple[int, ...]]]:
        """Yields the batches of one epoch until every run has completed the epoch.

        Args:
          positions: Epoch and first step of each participating run, by the run's index.

        Yields:
          A batch, and the indices of the runs that have items in it.
        """
        iterators = [
            self._batches(index, *positions[index]) if index in positions else ()
            for index in range(len(self.splits))
        ]
        for batches in itertools.zip_longest(*iterators):
            active = tuple(index for index, batch in enumerate(batches) if batch is not None)
            yield self._combine(batches), active

    def _batches(self, index: int, epoch: int, start_step: int) -> Iterator[Batch]:
        """Yields the batches of one epoch of a run.

        The pipeline of the previous epoch continues if this epoch follows it.
        """
        split = self.splits[index]
        next_epoch, pipeline = self._pipelines.pop(index, (None, iter(())))
        if (next_epoch, 0) != (epoch, start_step):
            pipeline = split.batches(epoch, start_step, max(1, self.num_epochs - epoch))
        yield from itertools.islice(pipeline, split.steps - start_step)
        if epoch + 1 < self.num_epochs:
            self._pipelines[index] = epoch + 1, pipeline

    def _fitting_shape(self, shape: Shape) -> Shape:
        """Returns the smallest shape into which a single run's batch of the given shape fits."""
        if self.shapes is None:
            return shape
        return next(fitting for fitting in self.shapes if fitting[1] >= shape[1])

    def _combine(self, batches: Sequence[Batch | None]) -> Batch:
        """Pads the batches of all runs and stacks them; None stands for an empty batch."""
        present = [batch for batch in batches if batch is not None]
        if self.shapes is None:
            return present[0]
        num_rows, length = self.largest_shape
        if len(batches) == 1:
            num_rows, length = self._fitting_shape(present[0]["mask"].shape)
        combined = {}
        for name, values in present[0].items():
            shape = (num_rows, len(batches), length, *values.shape[2:])
            array = np.full(shape[: values.ndim + 1], PADDING.get(name, 0), values.dtype)
            for index, batch in enumerate(batches):
                if batch is not None:
                    value = batch[name]
                    target = array[: len(value), index]
                    if value.ndim > 1:  # All arrays except the row numbers have a length axis.
                        target = target[:, : value.shape[1]]
                    target[...] = value
            combined[name] = array[:, 0] if len(batches) == 1 else array
        return combined


def make_shared_steps(
    task: Task, template: ModelTemplate, optimizer_config: OptimizerConfig
) -> tuple[Step, EvalFn]:
    """Creates a training step and an evaluation step for runs that differ only in the data.

    Values that depend on a run's data are not compiled into the steps. The steps read them from the
    state's "constants", the result of `SharedSteps.constants`. An empty batch does not change the
    state.

    Args:
      task: Task of any of the runs.
      template: Model template.
      optimizer_config: Optimizer options.
    """

    def train_step(state, batch, axis_name):
        constants = state["constants"]
        rates = constants["learning_rates"]
        optimizer = optimizer_with_schedule(optimizer_config, lambda step: rates[step])
        step = make_train_step(task.with_constants(constants["task"]), template, optimizer)
        new_state, metrics = step(state, batch, axis_name)
        num_items = psum_if_mapped(batch["mask"].sum(), axis_name)
        new_state = jax.tree.map(lambda new, old: jnp.where(num_items, new, old), new_state, state)
        return new_state, metrics

    def eval_step(state, batch, axis_name):
        step = make_eval_step(task.with_constants(state["constants"]["task"]), template)
        return step(state, batch, axis_name)

    return train_step, eval_step
