"""Training loop for all tasks.

A run writes to a work directory. A restarted run resumes from the latest checkpoint there and
reaches the same parameters, bit for bit, as an uninterrupted run. The loop reads only the training
and validation splits. It can train several seeds at once, and keeps the best epoch of each seed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from mister_jax import metrics, multi_seed
from mister_jax.checkpoint import BEST, LATEST, Checkpoints, OnSave
from mister_jax.config_checks import check_choice
from mister_jax.console import ProgressReporter, format_seconds
from mister_jax.data import prefetch_to_device
from mister_jax.data.split_guard import training_splits_only
from mister_jax.errors import InputError
from mister_jax.optim import OptimizerConfig, make_optimizer, params_for_evaluation
from mister_jax.parallel.multihost import assert_visible_to_all_processes, should_stop
from mister_jax.parallel.oom import explain_oom
from mister_jax.parallel.partitioning import (
    CompiledStep,
    ParallelConfig,
    Partitioner,
    make_partitioner,
)
from mister_jax.tasks.base import Split, Task
from mister_jax.tasks.config import config_seeds, dataclass_from_config
from mister_jax.tasks.registry import task_class
from mister_jax.training.curves import plot_training_curves
from mister_jax.training.metric_writer import MetricWriter
from mister_jax.training.steps import ModelTemplate, initial_state, make_eval_step, make_train_step
from mister_jax.training.warm_start import InitialParams, copy_params
from mister_jax.workdir import (
    check_config,
    check_data,
    config_path,
    read_planned_epochs,
    write_description,
)

# Seconds of training that are measured before the expected time is computed.
_MEASURED_SECONDS = 5.0

# Number of consecutive epochs with a single predicted class before the loop prints a warning.
_ONE_CLASS_EPOCHS = 3


class TrainingDivergedError(InputError):
    """Raised if the loss or the gradient is no longer finite."""


# Values of `TrainConfig.select_by` that are not scores.
_LOSS, _LAST, _MAE = "loss", "last", "mae"
# Maps values of `TrainConfig.select_by` to validation values for which lower is better.
_ERRORS = {_LOSS: "cross_entropy", _MAE: "mae"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of a training run, and how often it logs and saves.

    Attributes:
      epochs: Number of passes over the training split.
      patience: Number of epochs without a better validation score after which a seed stops early; 0
        disables early stopping. Training ends when all seeds have stopped.
      select_by: Validation score that chooses the best epoch: one of `metrics.SCORE_NAMES`, or
        "loss" for the lowest cross-entropy, or "mae" for the lowest mean absolute error of a model
        that predicts scores. With "last", the last epoch is used and validation is only reported.
      init_from: Model to start training from: work directory, bundle or name on the Hugging Face
        Hub. Parameters with equal names and shapes are copied. If empty, the initial parameters are
        random or pretrained. A resumed run does not read it.
      log_every: Number of steps between records of the training loss.
      save_every: Number of steps between checkpoints within an epoch; 0 for none. The end of every
        epoch is always saved.
      accumulation: Number of gradient accumulation steps: each device splits its rows into this
        many parts. Must be 1 for MiSTER-E, whose loss is not a sum over rows.
    """

    epochs: int
    patience: int = 0
    select_by: str = "weighted_f1"
    init_from: str = ""
    log_every: int = 10
    save_every: int = 0
    accumulation: int = 1

    def __post_init__(self):
        if (
            min(self.epochs, self.log_every, self.accumulation) < 1
            or min(self.patience, self.save_every) < 0
        ):
            raise ValueError(
                f"{self}: epochs, log_every and accumulation must be at least 1, patience and "
                "save_every at least 0"
            )
        check_choice(self, "select_by", (*metrics.SCORE_NAMES, *_ERRORS, _LAST))
        if self.select_by == _LAST and self.patience:
            raise ValueError("patience needs a select_by other than 'last'; allowed: patience=0")

    def selection_scores(self, values: Mapping[str, Any]) -> np.ndarray:
        """Returns the validation score that chooses the epoch, [S]; higher is better.

        Args:
          values: Validation scores and "cross_entropy" by name, [S] or a number.
        """
        if self.select_by in _ERRORS:
            return -np.atleast_1d(values[_ERRORS[self.select_by]])
        if self.select_by == _LAST:  # A tie goes to the later epoch.
            return np.zeros(np.atleast_1d(values["cross_entropy"]).shape)
        return np.atleast_1d(values[self.select_by])

    def describe(self, scores: Sequence[float] | np.ndarray, digits: int) -> str:
        """Formats a selection score, or the mean and standard deviation of several."""
        mean, deviation = metrics.mean_and_deviation(scores)
        # Errors are stored with a negative sign, so that higher is better.
        mean = -mean if self.select_by in _ERRORS else mean
        return f"{mean:.{digits}f}" + (f" +- {deviation:.{digits}f}" if len(scores) > 1 else "")


@dataclasses.dataclass
class TrainProgress:
    """Progress of a training run, saved with its state.

    Attributes:
      best_scores: Best validation score per seed; see `TrainConfig.selection_scores`.
      best_epochs: Epoch of each best score, counted from 1; 0 before the first validation.
      epoch: Number of completed epochs.
      finished: Whether training is complete.
    """

    best_scores: list[float]
    best_epochs: list[int]
    epoch: int = 0
    finished: bool = False

    @classmethod
    def initial(cls, num_seeds: int) -> TrainProgress:
        """Returns the progress before the first step."""
        return cls([0.0] * num_seeds, [0] * num_seeds)

    def active_seeds(self, patience: int) -> np.ndarray:
        """Returns which seeds have not stopped early, [S] bool."""
        stale_epochs = self.epoch - np.array(self.best_epochs)
        return (stale_epochs < patience) | (patience == 0)

    def is_finished(self, options: TrainConfig) -> bool:
        """Returns whether the last epoch is complete, or all seeds have stopped early."""
        return self.epoch >= options.epochs or not self.active_seeds(options.patience).any()

    def complete_epoch(self, scores: np.ndarray, options: TrainConfig) -> np.ndarray:
        """Completes an epoch and returns which seeds have a new best score, [S] bool.

        Args:
          scores: Validation score per seed, [S]; higher is better.
          options: Number of epochs and patience.
        """
        active = self.active_seeds(options.patience)
        self.epoch += 1
        # If scores are equal, which happens on small validation splits, the later epoch wins: its
        # parameters have had more updates, at a lower learning rate.
        is_first = np.array(self.best_epochs) == 0
        improved = active & (is_first | (scores >= self.best_scores))
        self.best_scores = np.where(improved, scores, self.best_scores).tolist()
        self.best_epochs = np.where(improved, self.epoch, self.best_epochs).tolist()
        self.finished = self.is_finished(options)
        return improved


@training_splits_only()
def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    quiet: bool = False,
    on_step: Callable[[int], None] | None = None,
    on_save: OnSave | None = None,
) -> TrainProgress:
    """Trains the config's task, from the start or from the latest checkpoint.

    If `config.train.epochs` is increased, even a finished run continues. The remaining epochs
    follow the learning-rate schedule of the new number of epochs.

    Args:
      config: Experiment config.
      workdir: Work directory; created if missing.
      quiet: Whether to hide the progress bar and messages.
      on_step: Called after each step with the number of completed steps.
      on_save: Called when the background write of a checkpoint has started, with its kind (`LATEST`
        or `BEST`), step, state and progress.

    Returns:
      Progress at the end; `finished` is False after SIGTERM.

    Raises:
      InputError: The config, dataset or work directory is invalid, or a batch does not fit in the
        devices' memory.
      TrainingDivergedError: The loss or the gradient is not finite. The last good checkpoint is
        kept.
    """
    workdir = epath.Path(workdir)
    options = dataclass_from_config(TrainConfig, config.train, "config.train")
    parallel = dataclass_from_config(ParallelConfig, config.parallel, "config.parallel")
    optimizer_config = dataclass_from_config(OptimizerConfig, config.optimizer, "config.optimizer")
    check_config(config, workdir)
    seeds = config_seeds(config)

    task = task_class(config).from_data(config)
    if options.select_by == _MAE and not task.predicts_score:
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

    total_steps = options.epochs * train_split.steps
    optimizer = make_optimizer(optimizer_config, total_steps)
    # Shape of the largest batch, for the out-of-memory message.
    rows, length = max((*train_split.shapes, *validation_split.shapes), key=math.prod)
    activity = f"batches of up to {rows} x {length} on {jax.device_count()} devices"
    with explain_oom(str(workdir), activity, task.oom_hint):
        start = None
        # A resumed run replaces the initial parameters anyway, and the model that they came from
        # may no longer exist.
        if options.init_from and not config_path(workdir).exists():
            start = InitialParams.load(options.init_from, config.task, len(seeds))
            note = start.check(nnx.eval_shape(lambda: task.init(jax.random.key(0))), task.trainable)
            if not quiet and jax.process_index() == 0:
                print(note, flush=True)
        template, state = _initial_states(task, optimizer, seeds, partitioner, start)
        if jax.process_index() == 0:
            params = multi_seed.unstack_seeds(state["params"], len(seeds))[0]
            params = jax.eval_shape(template.to_tree, params)
            write_description(workdir, config, task.description(), params, data_fingerprints)
        assert_visible_to_all_processes(config_path(workdir))
        train_step = make_train_step(task, template, optimizer, options.accumulation)
        eval_step = make_eval_step(task, template)
        with Checkpoints(workdir, on_save=on_save) as checkpoints, _stop_on_sigterm() as stop_event:
            loop = _TrainingLoop(
                workdir=workdir,
                options=options,
                seeds=seeds,
                task=task,
                partitioner=partitioner,
                train_split=train_split,
                validation_split=validation_split,
                params_for_evaluation=jax.jit(
                    lambda params, opt_state: template.to_tree(
                        params_for_evaluation(params, opt_state)
                    )
                ),
                train_step=partitioner.compile_step(
                    multi_seed.vmap_over_seeds(train_step, len(seeds))
                ),
                eval_step=partitioner.compile_eval(
                    multi_seed.vmap_over_seeds(eval_step, len(seeds))
                ),
                schedule=optimizer_config.make_schedule(total_steps),
                checkpoints=checkpoints,
                stop_event=stop_event,
                on_step=on_step or (lambda step: None),
            )
            return loop.run(state, quiet)


def _initial_states(
    task: Task,
    optimizer: optax.GradientTransformation,
    seeds: Sequence[int],
    partitioner: Any,
    start: InitialParams | None = None,
) -> tuple[ModelTemplate, Any]:
    """Returns the model template and the stacked states of all seeds."""
    template: Any = None
    as_vectors = not task.sharding_rules

    def make_state(key: jax.Array, params: Any) -> Any:
        nonlocal template

        def make_model(key: jax.Array) -> nnx.Module:
            model = task.load(key, partitioner)
            return model if params is None else copy_params(model, params, task.trainable)

        template, state = initial_state(
            task,
            optimizer,
            key,
            trainable=task.trainable,
            make_model=make_model,
            as_vectors=as_vectors,
        )
        return state

    if as_vectors:  # These tasks load no pretrained weights, so JAX can trace `make_state`.
        # One program for the whole initialization is faster than one program per parameter. It runs
        # so briefly that optimizing it is not worth the compile time.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        make_state = jax.jit(make_state, compiler_options=options)
    states = [
        make_state(jax.random.key(seed), None if start is None else start.for_seed(index))
        for index, seed in enumerate(seeds)
    ]
    return template, multi_seed.stack_seeds(states)


@dataclasses.dataclass
class _TrainingLoop:
    """Components of a training run; `run` is the loop."""

    workdir: epath.Path
    options: TrainConfig
    seeds: tuple[int, ...]
    task: Task
    partitioner: Partitioner
    train_split: Split
    validation_split: Split
    params_for_evaluation: Callable[[Any, Any], Any]
    train_step: CompiledStep
    eval_step: CompiledStep
    schedule: optax.Schedule
    checkpoints: Checkpoints
    stop_event: threading.Event
    on_step: Callable[[int], None]
    num_one_class_epochs: Any = 0
    """Number of consecutive epochs in which each seed has predicted a single class, [S]."""
    first_metrics: tuple[int, float] | None = None
    """Step and time at which this process first read metrics."""
    has_printed_time: bool = False
    """Whether this process has printed the expected time."""

    def run(self, state: Any, quiet: bool) -> TrainProgress:
        """Trains until the last epoch, early stopping or SIGTERM."""
        steps_per_epoch = self.train_split.steps
        state = self.partitioner.put_state(state)
        progress = TrainProgress.initial(len(self.seeds))
        restored = self.checkpoints.restore(LATEST, self._saved_part(state))
        if restored is not None:
            saved_state, saved_progress = restored
            state = {**state, **self.partitioner.put_state(saved_state)}
            progress = TrainProgress(**saved_progress)
        was_finished, progress.finished = progress.finished, progress.is_finished(self.options)
        step = self._global_step(state)
        writer = MetricWriter(self.workdir, step)
        reporter = ProgressReporter(
            self.options.epochs * steps_per_epoch, completed=step, quiet=quiet
        )
        with contextlib.closing(writer), reporter, _background_executor() as executor:
            if progress.finished:
                reporter.print(f"{self.workdir} is finished; nothing to do")
            elif was_finished:
                reporter.print(
                    f"continuing {self.workdir} after {progress.epoch} epochs, until epoch "
                    f"{self.options.epochs}; the learning rate is now {self.schedule(step):.2g}, "
                    f"as in a training of {self.options.epochs} epochs"
                )
            elif restored is not None:
                reporter.print(f"resuming {self.workdir} at step {step}")
            else:
                for note in self.task.notes:
                    reporter.print(note)
            if not progress.finished:
                reporter.print(self._summary())
                self._compile(executor, state, reporter)
            while not progress.finished:
                state, stopped = self._train_epoch(state, progress, writer, reporter)
                step = self._global_step(state)
                if step == (progress.epoch + 1) * steps_per_epoch:
                    self._validate(state, progress, writer, reporter)
                if stopped and not progress.finished:
                    reporter.print(
                        f"stopped by SIGTERM; the state of step {step} is saved. Run the same "
                        "command again to resume"
                    )
                    break
        if progress.finished and jax.process_index() == 0:
            plot_training_curves(self.workdir / "metrics.jsonl", self.workdir / "curves.png")
        return progress

    def _summary(self) -> str:
        """Describes the devices and the amount of work."""
        devices = jax.devices()
        rows, length = max(self.train_split.shapes, key=math.prod)
        seeds = f"{len(self.seeds)} seeds, " if len(self.seeds) > 1 else ""
        return (
            f"training on {len(devices)} x {devices[0].device_kind}: {seeds}{self.options.epochs} "
            f"epochs of {self.train_split.steps} steps, batches of up to {rows} x {length}"
        )

    def _compile(
        self, executor: concurrent.futures.Executor, state: Any, reporter: ProgressReporter
    ) -> None:
        """Starts compiling the steps for every batch shape, in the order of their first use.

        Returns when the first step's program is ready. The other programs are compiled in the
        background during training.
        """
        step, steps_per_epoch = self._global_step(state), self.train_split.steps
        jobs = [
            (compiled_step, split, shape)
            for compiled_step, split in (
                (self.train_step, self.train_split),
                (self.eval_step, self.validation_split),
            )
            for shape in split.shapes_by_first_use(*divmod(step, steps_per_epoch))
        ]
        reporter.print(f"compiling {len(jobs)} programs; the first step needs one")
        start = time.perf_counter()
        for index, (compiled_step, split, shape) in enumerate(jobs):
            batch = self.partitioner.put_batch(split.example_batch(shape))
            program = compiled_step.compile(executor, state, batch)
            if index == 0:
                program.result()
                reporter.print(f"compiled the first program in {time.perf_counter() - start:.1f} s")

    def _saved_part(self, state: Any) -> Any:
        """Returns a single copy of the state without the frozen parameters."""
        changing = {name: value for name, value in state.items() if name != "frozen"}
        return self.partitioner.get_state(changing)

    def _global_step(self, state: Any) -> int:
        # All seeds have the same step.
        return int(np.ravel(self.partitioner.get_state(state["step"]))[0])

    def _save_latest(self, state: Any, progress: TrainProgress, step: int) -> None:
        self.checkpoints.save(LATEST, step, self._saved_part(state), dataclasses.asdict(progress))

    def _train_epoch(
        self, state: Any, progress: TrainProgress, writer: MetricWriter, reporter: ProgressReporter
    ) -> tuple[Any, bool]:
        """Runs the remaining steps of the epoch.

        Returns:
          The state, and whether SIGTERM has stopped training. The epoch may be complete in this
          case.
        """
        options, steps_per_epoch = self.options, self.train_split.steps
        step = self._global_step(state)
        pending_metrics: list[Any] = []
        batches = self.train_split.batches(progress.epoch, step - progress.epoch * steps_per_epoch)
        for batch in prefetch_to_device(batches, self.partitioner.put_batch):
            state, step_metrics = self.train_step(state, batch)
            pending_metrics.append(step_metrics)
            step += 1
            reporter.advance(self._headline(progress))
            self.on_step(step)
            is_last = step % steps_per_epoch == 0
            stop = should_stop(self.stop_event)
            save = stop or (options.save_every and step % options.save_every == 0)
            # Reading metrics waits for the devices, so most steps do not read them. They are read
            # before every save, so that a state with a non-finite loss is never saved.
            if len(pending_metrics) == options.log_every or is_last or save:
                self._write_metrics(pending_metrics, step, writer)
                pending_metrics = []
                self._print_expected_time(step, reporter)
            # After the epoch's last step, `run` validates and saves.
            if save and not is_last:
                self._save_latest(state, progress, step)
            if stop:
                return state, True
        return state, False

    def _headline(self, progress: TrainProgress) -> str:
        best = "no best yet"
        if self.options.select_by == _LAST:
            best = "last epoch counts"
        elif any(progress.best_epochs):
            best = f"best {self.options.describe(progress.best_scores, 3)}"
        return f"epoch {progress.epoch + 1}/{self.options.epochs}, {best}"

    def _write_metrics(self, pending_metrics: list[Any], step: int, writer: MetricWriter) -> None:
        """Writes the means of the pending metrics, after checking that they are finite."""
        read_metrics = jax.device_get(pending_metrics)
        means = {
            name: np.mean([step_metrics[name] for step_metrics in read_metrics], axis=0)
            for name in read_metrics[0]
        }
        not_finite = [name for name, value in means.items() if not np.isfinite(value).all()]
        if not_finite:
            raise TrainingDivergedError(
                f"{self.workdir}: non-finite {', '.join(not_finite)} between steps "
                f"{step - len(read_metrics)} and {step}; the last good checkpoint is kept. Try a "
                "smaller config.optimizer.learning_rate or clip_norm"
            )
        scalars = self._scalars("train", means)
        writer(step, {**scalars, "learning_rate": float(self.schedule(step - 1))})

    def _print_expected_time(self, step: int, reporter: ProgressReporter) -> None:
        """Prints the expected time once, when some steps have been measured.

        It is called when metrics are read, because the devices have finished the steps only then.
        The first steps are not measured: other programs may still be compiling.
        """
        if self.has_printed_time:
            return
        if self.first_metrics is None:
            self.first_metrics = step, time.perf_counter()
            return
        first_step, start = self.first_metrics
        seconds = time.perf_counter() - start
        if seconds < _MEASURED_SECONDS:
            return
        per_step = seconds / (step - first_step)
        num_steps = self.options.epochs * self.train_split.steps - step
        reporter.print(
            f"about {format_seconds(per_step * num_steps)} for the remaining {num_steps} steps, "
            f"with validation ({per_step:.2g} s per step)"
        )
        self.has_printed_time = True

    def _scalars(self, prefix: str, values: dict[str, np.ndarray]) -> dict[str, float]:
        """Returns each value's mean over the seeds and, with several seeds, its value per seed."""
        scalars = {f"{prefix}/{name}": float(np.mean(value)) for name, value in values.items()}
        if len(self.seeds) > 1:
            per_seed = multi_seed.unstack_seeds(values, len(self.seeds))
            for seed, seed_values in zip(self.seeds, per_seed, strict=True):
                scalars |= {
                    f"{prefix}/{name}/seed_{seed}": float(value)
                    for name, value in seed_values.items()
                }
        return scalars

    def _validate(
        self, state: Any, progress: TrainProgress, writer: MetricWriter, reporter: ProgressReporter
    ) -> None:
        """Scores the validation split after an epoch, and saves the best and latest checkpoints."""
        step = self._global_step(state)
        values = self._validation_scores(state)
        writer(step, self._scalars("validation", values))
        self._warn_of_one_class(np.atleast_1d(values["predicted_classes"]), reporter)
        scores = self.options.selection_scores(values)
        improved = progress.complete_epoch(scores, self.options)
        if improved.any():
            self._save_best(state, step, improved, {"epoch": progress.epoch, **values})
        self._save_latest(state, progress, step)
        if not reporter.console.is_terminal or progress.finished:
            reporter.print(self._describe_epoch(values, scores, progress))

    def _describe_epoch(
        self, values: Mapping[str, Any], scores: np.ndarray, progress: TrainProgress
    ) -> str:
        options = self.options
        text = f"epoch {progress.epoch}/{options.epochs}: validation "
        if options.select_by == _LAST:
            name = metrics.SCORE_NAMES[0]
            return f"{text}{metrics.title(name)} {np.mean(values[name]):.4f}"
        return (
            f"{text}{metrics.title(options.select_by)} {options.describe(scores, 4)}, best "
            f"{options.describe(progress.best_scores, 4)} (epoch "
            f"{', '.join(map(str, progress.best_epochs))})"
        )

    def _save_best(
        self, state: Any, step: int, improved: np.ndarray, values: dict[str, Any]
    ) -> None:
        """Saves the parameters and scores of improved seeds; other seeds keep their saved ones."""
        single_copy = self._saved_part(state)
        params = self.params_for_evaluation(single_copy["params"], single_copy["opt_state"])
        values["epoch"] = multi_seed.stack_seeds([values["epoch"]] * len(self.seeds))
        if not improved.all():
            previous = self.checkpoints.restore(BEST, params)
            # The first epoch is the best of every seed so far, so a best checkpoint must exist.
            if previous is None:
                raise InputError(
                    f"{self.workdir}: the best checkpoint is missing; training cannot resume "
                    "without it"
                )
            previous_params, previous_values = previous
            params = multi_seed.select_seeds(improved, params, previous_params)
            values = {
                name: np.where(improved, value, previous_values[name])
                for name, value in values.items()
            }
        plain_values = {name: np.asarray(value).tolist() for name, value in values.items()}
        self.checkpoints.save(BEST, step, params, plain_values)

    def _warn_of_one_class(
        self, num_predicted_classes: np.ndarray, reporter: ProgressReporter
    ) -> None:
        """Warns if a seed has predicted a single class for several epochs.

        Args:
          num_predicted_classes: Number of classes that each seed predicted in validation, [S].
          reporter: Reporter that prints the warning.
        """
        self.num_one_class_epochs = np.where(
            num_predicted_classes == 1, self.num_one_class_epochs + 1, 0
        )
        collapsed = np.flatnonzero(self.num_one_class_epochs == _ONE_CLASS_EPOCHS)
        if len(collapsed) and len(self.task.class_names) > 1:
            reporter.print(
                f"WARNING: seed {', '.join(str(self.seeds[index]) for index in collapsed)} has "
                f"predicted a single class in validation for {_ONE_CLASS_EPOCHS} epochs; try "
                "config.data.standardize=speech,text, or another config.optimizer.learning_rate"
            )

    def _validation_scores(self, state: Any) -> dict[str, Any]:
        """Returns the validation scores by name; with several seeds, they are arrays [S]."""
        sums: Any = None
        batches = self.validation_split.batches()
        for batch in prefetch_to_device(batches, self.partitioner.put_batch):
            batch_sums = self.eval_step(state, batch)
            sums = batch_sums if sums is None else jax.tree.map(jnp.add, sums, batch_sums)
        scores_per_seed = []
        for seed_sums in multi_seed.unstack_seeds(jax.device_get(sums), len(self.seeds)):
            confusion = seed_sums["confusion"]
            scores = metrics.classification_scores(confusion, self.task.class_names)
            scores_per_seed.append(
                {
                    **{name: scores[name] for name in metrics.SCORE_NAMES},
                    "cross_entropy": float(seed_sums["cross_entropy"]) / scores["utterances"],
                    "predicted_classes": int(np.count_nonzero(confusion.sum(0))),
                    **_score_errors(seed_sums),
                }
            )
        return multi_seed.stack_seeds(scores_per_seed)


def _score_errors(sums: Mapping[str, Any]) -> dict[str, float]:
    """Returns the mean absolute error "mae" of the predicted scores, if there are any."""
    if "score_error" not in sums:
        return {}
    return {"mae": float(sums["score_error"]) / max(1, int(sums["scored"]))}


@contextlib.contextmanager
def _background_executor() -> Iterator[concurrent.futures.Executor]:
    """Yields an executor; jobs that have not started by the end are canceled."""
    executor = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="compile")
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets, if the job has a single process."""
    event = threading.Event()
    # With several processes, JAX handles the signal. A handler here would replace JAX's handler.
    is_single_process = jax.process_count() == 1
    if not is_single_process or threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
