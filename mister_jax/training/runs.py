"""Training runs, and groups of runs that share their programs.

Runs whose configs differ in their data alone, such as the folds of a cross-validation, share their
compiled steps. They train one after another, or several at once: then their states are stacked, and
each step takes one batch of every run. Each run keeps its work directory, random numbers, schedule
and progress, so its results are those of a separate training, up to rounding.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from mister_jax import multi_seed
from mister_jax.checkpoint import Checkpoints
from mister_jax.data.pipeline import PADDING
from mister_jax.data.split_guard import training_splits_only
from mister_jax.errors import InputError
from mister_jax.optim import OptimizerConfig, optimizer_with_schedule
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
from mister_jax.tasks.config import config_seeds, dataclass_from_config
from mister_jax.tasks.registry import task_class
from mister_jax.training.metric_writer import MetricWriter
from mister_jax.training.progress import MAE, TrainConfig, TrainProgress
from mister_jax.training.steps import ModelTemplate, make_eval_step, make_train_step
from mister_jax.workdir import check_config, check_data, read_planned_epochs

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A config, its work directory, and what they determine before anything is compiled.

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
      data_fingerprints: Fingerprints of the splits, as in the work directory.
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
        """Returns whether the steps of two runs differ only in their data."""
        configs = [plan.config.to_dict() for plan in (self, other)]
        for config in configs:
            del config["data"]
        return configs[0] == configs[1] and self.task.shares_steps_with(other.task)


def plan_run(config: ConfigDict, workdir: epath.PathLike) -> RunPlan:
    """Loads the data of a run, and checks its config and work directory.

    Raises:
      InputError: The config, dataset or work directory is invalid.
    """
    workdir = epath.Path(workdir)
    options = dataclass_from_config(TrainConfig, config.train, "config.train")
    parallel = dataclass_from_config(ParallelConfig, config.parallel, "config.parallel")
    optimizer = dataclass_from_config(OptimizerConfig, config.optimizer, "config.optimizer")
    check_config(config, workdir)
    seeds = config_seeds(config)

    task = task_class(config).from_data(config)
    if options.select_by == MAE and not task.predicts_score:
        raise InputError("config.train.select_by=mae needs config.model.predict_score=True")
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
    """What the groups of runs with the same steps share.

    Attributes:
      train_shape: Shape (rows, padded length) of all training batches.
      validation_shape: Shape of all validation batches.
      num_steps: Number of steps of the longest run.
      compiled_steps: Training step and evaluation step by number of runs at once, filled in by
        `train_group`.
      initial_states: Model template and stacked initial states of one run's seeds, filled in by
        `train_group` if the runs start from random parameters.
    """

    train_shape: tuple[int, int]
    validation_shape: tuple[int, int]
    num_steps: int
    compiled_steps: dict[int, tuple[CompiledStep, CompiledStep]] = dataclasses.field(
        default_factory=dict
    )
    initial_states: tuple[ModelTemplate, Any] | None = None

    @classmethod
    def of(cls, plans: Sequence[RunPlan]) -> SharedSteps:
        """Returns the shared steps of runs, with shapes for the batches of all of them."""
        return cls(
            RunBatches([plan.train_split for plan in plans]).largest_shape,
            RunBatches([plan.validation_split for plan in plans]).largest_shape,
            max(plan.total_steps for plan in plans),
        )

    def constants(self, runs: Sequence[TrainingRun], num_seeds: int) -> Any:
        """Returns the arrays on which the runs' steps depend, stacked over all models."""
        steps = jnp.arange(self.num_steps)
        constants = [
            {
                # Steps after a run's last are never used.
                "learning_rates": np.asarray(jax.vmap(run.schedule)(steps)),
                "task": run.task.constants(),
            }
            for run in runs
            for _ in range(num_seeds)
        ]
        return multi_seed.stack_seeds(constants)


@dataclasses.dataclass(frozen=True)
class RunGroup:
    """Runs that train at once.

    Attributes:
      plans: The runs.
      shared: What they share with other groups; None for a run whose steps are compiled for its
        data alone.
    """

    plans: tuple[RunPlan, ...]
    shared: SharedSteps | None = None


@training_splits_only()
def plan_groups(
    configs: Sequence[ConfigDict], workdirs: Sequence[epath.PathLike], models_at_once: int
) -> list[RunGroup]:
    """Loads the data of several runs, and groups those that can train at once.

    Neighbors whose configs differ only in their data share their programs, if the job has a single
    process.

    Args:
      configs: Experiment configs.
      workdirs: Work directory of each config.
      models_at_once: Number of models, each a seed of a run, that train at once at most; a run's
        seeds always train at once.

    Raises:
      InputError: A config, dataset or work directory is invalid.
    """
    remaining = [plan_run(*run) for run in zip(configs, workdirs, strict=True)]
    groups = []
    while remaining:
        first = remaining[0]
        # The rows of a batch are split among processes, so that with other shapes they would get
        # other random numbers.
        count = 1
        if jax.process_count() == 1:
            count += len(list(itertools.takewhile(first.shares_steps_with, remaining[1:])))
        family, remaining = remaining[:count], remaining[count:]
        shared = SharedSteps.of(family) if len(family) > 1 else None
        size = max(1, models_at_once // len(first.seeds))
        groups += [
            RunGroup(tuple(family[start : start + size]), shared) for start in range(0, count, size)
        ]
    return groups


@dataclasses.dataclass
class TrainingRun:
    """A training run: its data, its files, and how far it is.

    Attributes:
      workdir: Work directory.
      task: Task of the run's config.
      train_split: Training split.
      validation_split: Validation split.
      epochs: Number of epochs.
      schedule: Learning-rate schedule.
      checkpoints: Checkpoints in the work directory.
      progress: Progress at the end of the last epoch.
      step: Number of completed steps.
      pending_metrics: Metrics of the last steps, which are not written yet.
      num_one_class_epochs: Number of consecutive epochs in which each seed has predicted a single
        class, [S].
    """

    workdir: epath.Path
    task: Task
    train_split: Split
    validation_split: Split
    epochs: int
    schedule: optax.Schedule
    checkpoints: Checkpoints
    progress: TrainProgress
    step: int = 0
    pending_metrics: list[Any] = dataclasses.field(default_factory=list)
    num_one_class_epochs: Any = 0

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch."""
        return self.train_split.steps

    @property
    def total_steps(self) -> int:
        """Number of steps until the last epoch."""
        return self.epochs * self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Number of completed steps since the last validation."""
        return self.step - self.progress.epoch * self.steps_per_epoch

    @property
    def is_epoch_complete(self) -> bool:
        """Whether all steps of the epoch are done, and its validation is not."""
        return self.step_in_epoch == self.steps_per_epoch

    def open_writer(self) -> MetricWriter:
        """Returns the writer of the run's metrics, from the present step on."""
        self.writer = MetricWriter(self.workdir, self.step)
        return self.writer


@dataclasses.dataclass(frozen=True)
class RunBatches:
    """Batches of one split of each of R runs.

    If a shape is given, all batches are padded to it. Several runs need one, by default that of
    their largest batches. Their batches have a run axis after the row axis: [B, R, T, ...]. The
    rows stay first because they are divided among devices.

    Attributes:
      splits: Split of each run.
      shape: Number of rows and length that all batches are padded to.
    """

    splits: Sequence[Split]
    shape: tuple[int, int] | None = None

    def shapes_by_first_use(self, epoch: int, start_step: int) -> list[tuple[int, int]]:
        """Returns the distinct shapes (rows, padded length) in the order of their first use."""
        if self._is_unchanged:
            return self.splits[0].shapes_by_first_use(epoch, start_step)
        return [self.largest_shape]

    @property
    def _is_unchanged(self) -> bool:
        return len(self.splits) == 1 and self.shape is None

    @property
    def largest_shape(self) -> tuple[int, int]:
        """Largest number of rows and largest padded length of any batch."""
        if self.shape is not None:
            return self.shape
        shapes = [shape for split in self.splits for shape in split.shapes]
        return max(rows for rows, _ in shapes), max(length for _, length in shapes)

    def example_batch(self, shape: tuple[int, int]) -> Batch:
        """Returns a batch with one of `shapes_by_first_use`, for compilation."""
        if self._is_unchanged:
            return self.splits[0].example_batch(shape)
        return self._combine([split.example_batch(split.shapes[0]) for split in self.splits])

    def epoch(
        self, positions: Mapping[int, tuple[int, int]]
    ) -> Iterator[tuple[Batch, tuple[int, ...]]]:
        """Yields the batches of one epoch until every run has had its last.

        Args:
          positions: Epoch and first step of each run that takes part, by its index.

        Yields:
          A batch, and the indices of the runs that have items in it.
        """
        iterators = [
            split.batches(*positions[index]) if index in positions else ()
            for index, split in enumerate(self.splits)
        ]
        for batches in itertools.zip_longest(*iterators):
            active = tuple(index for index, batch in enumerate(batches) if batch is not None)
            yield batches[0] if self._is_unchanged else self._combine(batches), active

    def _combine(self, batches: Sequence[Batch | None]) -> Batch:
        rows, length = self.largest_shape
        example = next(batch for batch in batches if batch is not None)
        combined = {}
        for name, values in example.items():
            shape = (rows, len(batches), length, *values.shape[2:])
            array = np.full(shape[: values.ndim + 1], PADDING.get(name, 0), values.dtype)
            for index, batch in enumerate(batches):
                if batch is not None:
                    value = batch[name]
                    target = array[: len(value), index]
                    if value.ndim > 1:  # All arrays but the row numbers have a length axis.
                        target = target[:, : value.shape[1]]
                    target[...] = value
            combined[name] = array[:, 0] if len(batches) == 1 else array
        return combined


def make_shared_steps(
    task: Task, template: ModelTemplate, optimizer_config: OptimizerConfig
) -> tuple[Step, EvalFn]:
    """Creates a training step and an evaluation step that runs with different data share.

    What depends on a run's data is not compiled in, but read from the state's "constants", the
    result of `SharedSteps.constants`. A batch without items does not change the state.

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
