"""Training loop for all tasks.

A run writes to a work directory. A restarted run resumes from the latest checkpoint in this
directory and reaches the same parameters, bit for bit, as an uninterrupted run. The loop reads only
the training and validation splits. It can train several seeds at once, and saves the parameters of
each seed's best epoch.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import math
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
from mister_jax.console import ProgressReporter, format_seconds
from mister_jax.data import import_tensorflow, prefetch_to_device
from mister_jax.data.batching import is_short_training
from mister_jax.data.split_guard import training_splits_only
from mister_jax.errors import InputError
from mister_jax.nn.initialization import JitInitialization
from mister_jax.optim import make_optimizer, params_for_evaluation
from mister_jax.parallel.multihost import (
    assert_visible_to_all_processes,
    same_error_in_all_processes,
    should_stop,
)
from mister_jax.parallel.oom import explain_oom
from mister_jax.parallel.partitioning import Partitioner
from mister_jax.tasks.base import Task
from mister_jax.training.curves import plot_training_curves
from mister_jax.training.metric_writer import MetricWriter
from mister_jax.training.progress import LAST, TrainConfig, TrainProgress
from mister_jax.training.runs import (
    CompiledSteps,
    RunBatches,
    RunGroup,
    RunPlan,
    SharedSteps,
    TrainingRun,
    make_shared_steps,
    plan_run,
)
from mister_jax.training.steps import ModelTemplate, initial_state, make_eval_step, make_train_step
from mister_jax.training.stop_signals import StopRequest, stop_on_signals
from mister_jax.training.warm_start import InitialParams, copy_params
from mister_jax.workdir import config_path, lock, write_description

# Seconds of training to measure before estimating the remaining time.
_MEASURED_SECONDS = 5.0

# Number of consecutive epochs with a single predicted class before the loop prints a warning.
_ONE_CLASS_EPOCHS = 3


class TrainingDivergedError(InputError):
    """Raised if the loss or the gradient is no longer finite."""


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

    A finished run continues if `config.train.epochs` is increased. The remaining epochs then follow
    the learning-rate schedule for the new number of epochs.

    Args:
      config: Experiment config.
      workdir: Work directory; created if missing.
      quiet: Whether to hide the progress bar and messages.
      on_step: Function called after each step with the number of completed steps.
      on_save: Function called when the background write of a checkpoint has started, or if the
        checkpoint already exists. Its arguments are the checkpoint's kind (`LATEST` or `BEST`),
        step, state and progress.

    Returns:
      Progress at the end; `finished` is False if SIGTERM interrupted the training.

    Raises:
      KeyboardInterrupt: Ctrl-C was pressed. In a single process, training first completes the step
        and saves the state, unless Ctrl-C is pressed again.
      InputError: The config, dataset or work directory is invalid, or a batch does not fit in the
        devices' memory.
      TrainingDivergedError: The loss or the gradient is not finite. Earlier checkpoints are kept,
        and the best parameters are saved.
    """
    group = RunGroup((config,), (workdir,))
    return train_group(group, quiet=quiet, on_step=on_step, on_save=on_save)[0]


@training_splits_only()
def train_group(
    group: RunGroup,
    *,
    quiet: bool = False,
    on_step: Callable[[int], None] | None = None,
    on_save: OnSave | None = None,
) -> list[TrainProgress]:
    """Trains a group of runs in one program, from the start or from their latest checkpoints.

    Each work directory gets the same files as if its run were trained separately, and the results
    are equal up to rounding. Runs that started as a group can be resumed one by one, and runs that
    started separately can be resumed as a group.

    Args:
      group: Group from `plan_groups`.
      quiet: See `train`.
      on_step: Function called after each step with the number of completed steps of the longest
        run.
      on_save: See `train`.

    Returns:
      Progress of each run. After SIGTERM, some runs may be unfinished.

    Raises:
      InputError: See `train`.
      TrainingDivergedError: See `train`.
    """
    plans = [plan_run(*run) for run in zip(group.configs, group.workdirs, strict=True)]
    first, shared = plans[0], group.shared
    options, seeds = first.options, first.seeds
    train_batches = RunBatches(
        [plan.train_split for plan in plans],
        None if shared is None else shared.train_shapes,
        num_epochs=options.epochs,
    )
    validation_batches = RunBatches(
        [plan.validation_split for plan in plans],
        None if shared is None else shared.validation_shapes,
    )
    # Shape of the largest batch, for the out-of-memory message.
    rows, length = max(train_batches.largest_shape, validation_batches.largest_shape, key=math.prod)
    activity = f"batches of up to {rows} x {length} on {jax.device_count()} devices"
    hint = first.task.oom_hint
    if len(plans) > 1:
        activity = f"{len(plans)} runs at once, {activity}"
        hint = f"a smaller --models_at_once, {hint}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(explain_oom(str(first.workdir), activity, hint))
        template, shapes, make_state = _load_initial_states(plans, shared, quiet)
        params = jax.eval_shape(template.to_tree, shapes["params"])
        for plan in plans:
            with same_error_in_all_processes():
                if jax.process_index() == 0:
                    stack.enter_context(lock(plan.workdir))
            if jax.process_index() == 0:
                write_description(
                    plan.workdir,
                    plan.config,
                    plan.task.description(),
                    params,
                    plan.data_fingerprints,
                )
            assert_visible_to_all_processes(config_path(plan.workdir))
        runs = [
            TrainingRun(
                plan,
                stack.enter_context(Checkpoints(plan.workdir, on_save=on_save)),
                TrainProgress.initial(len(seeds)),
            )
            for plan in plans
        ]
        # Groups that share steps need the same `is_short`, so they use the number of steps of the
        # longest run in all of these groups.
        num_steps = first.total_steps if shared is None else shared.num_steps
        leaves = jax.tree.leaves((shapes["params"], shapes["frozen"]))
        num_values = sum(leaf.size for leaf in leaves)
        is_short = is_short_training(
            len(runs) * len(seeds) * num_values,
            num_steps * math.prod(train_batches.largest_shape),
        )
        loop = _TrainingLoop(
            runs=runs,
            options=options,
            seeds=seeds,
            partitioner=first.partitioner,
            train_batches=train_batches,
            validation_batches=validation_batches,
            steps=_compiled_steps(plans, shared, template, is_short),
            stop=stack.enter_context(stop_on_signals()),
            executor=stack.enter_context(_background_executor()),
            on_step=on_step or (lambda step: None),
        )
        if shared is None and not _has_checkpoint(first.workdir):
            # While the first step is compiled, compute the initial state.
            loop.start_compiling(multi_seed.stacked_shapes(shapes, len(seeds)))
        # All runs have the same seeds, and start from the same parameters.
        state = multi_seed.join_runs([make_state()] * len(runs), len(seeds))
        if shared is not None:
            state = {**state, "constants": shared.constants(runs, len(seeds))}
        loop.run(state, quiet)
        if loop.stop.by_ctrl_c:
            raise KeyboardInterrupt
        return [run.progress for run in runs]


def _compiled_steps(
    plans: Sequence[RunPlan],
    shared: SharedSteps | None,
    template: ModelTemplate,
    is_short: bool,
) -> CompiledSteps:
    """Returns the compiled steps for runs that train at the same time."""
    first, num_runs = plans[0], len(plans)
    if shared is not None and num_runs in shared.compiled_steps:
        return shared.compiled_steps[num_runs]
    if shared is None:
        optimizer = make_optimizer(first.optimizer, first.total_steps)
        train_step = make_train_step(first.task, template, optimizer, first.options.accumulation)
        eval_step = make_eval_step(first.task, template)
    else:
        train_step, eval_step = make_shared_steps(first.task, template, first.optimizer)
    vmap = functools.partial(
        multi_seed.vmap_over_models, num_runs=num_runs, num_seeds=len(first.seeds)
    )
    steps = CompiledSteps(
        first.partitioner.compile_step(vmap(train_step), fast_compile=is_short),
        first.partitioner.compile_eval(vmap(eval_step)),
        functools.partial(_evaluation_tree, template),
    )
    if shared is not None:
        shared.compiled_steps[num_runs] = steps
    return steps


def _evaluation_tree(template: ModelTemplate, params: Any, opt_state: Any) -> Any:
    params = params_for_evaluation(params, opt_state)
    # Splitting the vectors on the host needs no compiled program.
    return params if template.vectors is None else template.to_tree(jax.device_get(params))


def _load_initial_states(
    plans: Sequence[RunPlan], shared: SharedSteps | None, quiet: bool
) -> tuple[ModelTemplate, Any, Callable[[], Any]]:
    """Prepares the initial states of one run's seeds.

    Returns:
      The model template, the shapes of the state of one seed, and a function that computes the
      stacked initial states.
    """
    if shared is not None and shared.initial_states is not None:
        template, shapes, state = shared.initial_states
        return template, shapes, lambda: state
    first = plans[0]
    init_from = first.options.init_from
    start = None
    # A resumed run does not use the initial parameters, and the model in `init_from` may no longer
    # exist.
    if init_from and not all(_has_checkpoint(plan.workdir) for plan in plans):
        start = InitialParams.load(init_from, first.task, first.config, len(first.seeds))
        shapes = nnx.eval_shape(lambda: first.task.init(jax.random.key(0)))
        note = start.check(shapes, first.task.trainable)
        if not quiet and jax.process_index() == 0:
            print(note, flush=True)
    optimizer = make_optimizer(first.optimizer, first.total_steps)
    template, shapes, make_state = _initial_states(
        first.task, optimizer, first.seeds, first.partitioner, start
    )
    if shared is not None and not init_from:
        # Keep a copy on the host, because the training step donates the state's buffers.
        state = jax.device_get(make_state())
        shared.initial_states = template, shapes, state
        return template, shapes, lambda: state
    return template, shapes, make_state


def _has_checkpoint(workdir: epath.Path) -> bool:
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.progress(LATEST) is not None


def _initial_states(
    task: Task,
    optimizer: optax.GradientTransformation,
    seeds: Sequence[int],
    partitioner: Any,
    start: InitialParams | None = None,
) -> tuple[ModelTemplate, Any, Callable[[], Any]]:
    """Prepares the states of all seeds; see `_load_initial_states`."""
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

    arguments = [
        (jax.random.key(seed), None if start is None else start.for_seed(index))
        for index, seed in enumerate(seeds)
    ]
    if as_vectors:  # These tasks load no pretrained weights, so JAX can trace `make_state`.
        # One program for the whole initialization is faster than one program per parameter.
        initialize = JitInitialization(make_state)
        shapes = initialize.shapes(*arguments[0])
        return (
            template,
            shapes,
            lambda: multi_seed.stack_seeds([initialize(*it) for it in arguments]),
        )
    states = multi_seed.stack_seeds([make_state(*it) for it in arguments])
    shapes = jax.eval_shape(lambda: multi_seed.unstack_seeds(states, len(seeds))[0])
    return template, shapes, lambda: states


@dataclasses.dataclass(frozen=True)
class _Best:
    """Parameters of the best epoch of each seed, stacked over the seeds.

    Attributes:
      step: Number of completed steps at the last improvement.
      params: Parameter tree; a copy on the host if the epoch is not saved when it ends.
      values: Validation scores and epochs by name; with several seeds, they are arrays [S].
    """

    step: int
    params: Any
    values: dict[str, Any]


@dataclasses.dataclass
class _TrainingLoop:
    """State and components of the training loop for one or several runs.

    The methods take and return the training state, which contains the models of all seeds of all
    runs.
    """

    runs: Sequence[TrainingRun]
    options: TrainConfig
    seeds: tuple[int, ...]
    partitioner: Partitioner
    train_batches: RunBatches
    validation_batches: RunBatches
    steps: CompiledSteps
    stop: StopRequest
    executor: concurrent.futures.Executor
    on_step: Callable[[int], None]
    last_save: float = dataclasses.field(default_factory=time.monotonic)
    """Time of the last checkpoint, or of the start."""
    unsaved_best: dict[int, _Best] = dataclasses.field(default_factory=dict)
    """Best parameters that are not in a checkpoint yet, by run."""
    first_metrics: tuple[int, float] | None = None
    """Step and time at which this process first read metrics."""
    first_program: concurrent.futures.Future[Any] | None = None
    """Program of the first step, if `start_compiling` has been called."""
    compile_start: float = dataclasses.field(default_factory=time.perf_counter)
    """Time at which the compilation started."""
    has_printed_time: bool = False
    """Whether this process has printed the expected time."""

    def start_compiling(self, shapes: Any) -> None:
        """Starts compiling the first training step of a new run, before the state is known."""
        shape = self.train_batches.shapes_by_first_use(0, 0)[0]
        batch = self.partitioner.put_batch(self.train_batches.example_batch(shape))
        state = self.partitioner.abstract_state(shapes)
        self.first_program = self.steps.train.compile(self.executor, state, batch)

    def run(self, state: Any, quiet: bool) -> None:
        """Trains until the last epoch, early stopping or a request to stop."""
        state = self.partitioner.put_state(state)
        resumed = self._restore(state)
        if resumed is not None:
            state = {**state, **self.partitioner.put_state(resumed)}
        was_finished = all(run.progress.finished for run in self.runs)
        for run in self.runs:
            run.progress.finished = run.progress.is_finished(self.options)
        reporter = ProgressReporter(self._max_steps(), completed=self._step(), quiet=quiet)
        with contextlib.ExitStack() as stack:
            for run in self.runs:
                run.writer = MetricWriter(run.plan.workdir, run.step)
                stack.enter_context(contextlib.closing(run.writer))
            stack.enter_context(reporter)
            self._print_start(reporter, resumed is not None, was_finished)
            if not self._is_finished():
                reporter.print(self._summary())
                self._compile(state, reporter)
            if jax.process_count() == 1:  # After an error, the best parameters may be unsaved.
                for index in range(len(self.runs)):
                    stack.callback(self._save_best, index)
            self.stop.is_training = True
            while not self._is_finished():
                state, stopped = self._train_epoch(state, reporter)
                self._validate(state, reporter, stopped)
                if stopped and not self._is_finished():
                    reporter.print(
                        f"stopped by {self.stop.signal_name}; the state of step {self._step()} is "
                        "saved. Run the same command again to resume"
                    )
                    break
        for run in self.runs:
            if run.progress.finished and jax.process_index() == 0:
                plot_training_curves(
                    run.plan.workdir / "metrics.jsonl", run.plan.workdir / "curves.png"
                )

    def _restore(self, state: Any) -> Any:
        """Restores all runs; returns the restored state, or None if there are no checkpoints."""
        parts = self._split(self._saved_part(state))
        restored = [
            run.checkpoints.restore(LATEST, part)
            for run, part in zip(self.runs, parts, strict=True)
        ]
        for index, checkpoint in enumerate(restored):
            if checkpoint is not None:
                run, (parts[index], progress) = self.runs[index], checkpoint
                run.progress = TrainProgress(**progress)
                # All seeds have the same step.
                run.step = int(np.ravel(parts[index]["step"])[0])
            self.runs[index].checkpoints.delete_best_after(self.runs[index].step)
        if all(checkpoint is None for checkpoint in restored):
            return None
        return multi_seed.join_runs(parts, len(self.seeds))

    def _is_finished(self) -> bool:
        return all(run.progress.finished for run in self.runs)

    def _step(self) -> int:
        """Returns `_max_steps` minus the number of steps that the longest run has left."""
        return self._max_steps() - self._longest().steps_left

    def _max_steps(self) -> int:
        return max(run.plan.total_steps for run in self.runs)

    def _title(self) -> str:
        """Returns a title with the work directories of all runs."""
        first = str(self.runs[0].plan.workdir)
        return first if len(self.runs) == 1 else f"{len(self.runs)} runs, starting with {first}"

    def _print_start(
        self, reporter: ProgressReporter, is_resumed: bool, was_finished: bool
    ) -> None:
        if self._is_finished():
            reporter.print(f"{self._title()}: finished; nothing to do")
        elif was_finished:
            run = self._longest()
            rate = run.learning_rates[run.step]
            reporter.print(
                f"continuing {self._title()} after {run.progress.epoch} epochs, until epoch "
                f"{self.options.epochs}; the learning rate is now {rate:.2g}, as in "
                f"a training run of {self.options.epochs} epochs"
            )
        elif is_resumed:
            reporter.print(f"resuming {self._title()} at step {self._step()}")
        else:
            for note in dict.fromkeys(note for run in self.runs for note in run.plan.task.notes):
                reporter.print(note)

    def _summary(self) -> str:
        """Describes the devices and the amount of work."""
        devices = jax.devices()
        steps_per_epoch = max(run.plan.train_split.steps for run in self.runs)
        rows, length = self.train_batches.largest_shape
        runs = f"{len(self.runs)} runs at once, " if len(self.runs) > 1 else ""
        seeds = f"{len(self.seeds)} seeds, " if len(self.seeds) > 1 else ""
        return (
            f"training on {len(devices)} x {devices[0].device_kind}: {runs}{seeds}"
            f"{self.options.epochs} epochs of {steps_per_epoch} steps, batches of up to "
            f"{rows} x {length}"
        )

    def _compile(self, state: Any, reporter: ProgressReporter) -> None:
        """Starts compiling the steps for every batch shape, in the order of their first use.

        Returns when the first step's program is ready. The other programs are compiled in the
        background during training.
        """
        position = divmod(self.runs[0].step, self.runs[0].plan.train_split.steps)
        examples = [
            (compiled_step, self.partitioner.put_batch(batches.example_batch(shape)))
            for compiled_step, batches in (
                (self.steps.train, self.train_batches),
                (self.steps.eval, self.validation_batches),
            )
            for shape in batches.shapes_by_first_use(*position)
        ]
        # An earlier group of runs may have compiled the shared steps.
        jobs = [(step, batch) for step, batch in examples if not step.has_program(batch)]
        num_jobs = len(jobs) + (self.first_program is not None)
        if not num_jobs:
            return
        reporter.print(f"compiling {num_jobs} programs; the first step needs one")
        if self.first_program is None:
            self.compile_start = time.perf_counter()
            compiled_step, batch = jobs.pop(0)
            self.first_program = compiled_step.compile(self.executor, state, batch)
        # Meanwhile, do other slow work that would delay the first epoch.
        _import_slow_packages()
        for run in self.runs:
            _ = run.learning_rates
        self.first_program.result()
        seconds = time.perf_counter() - self.compile_start
        reporter.print(f"ready for the first step in {seconds:.1f} s")
        for compiled_step, batch in jobs:
            compiled_step.compile(self.executor, state, batch)

    def _saved_part(self, state: Any) -> Any:
        """Returns a single copy of the state, without the parts that never change."""
        changing = {
            name: value for name, value in state.items() if name not in ("frozen", "constants")
        }
        return self.partitioner.get_state(changing)

    def _split(self, tree: Any) -> list[Any]:
        """Splits a single-copy tree with all models into one tree per run."""
        return multi_seed.split_runs(tree, len(self.runs), len(self.seeds))

    def _save(self, state: Any, indices: Sequence[int]) -> None:
        """Saves the best parameters and the state of the runs with these indices."""
        parts = self._split(self._saved_part(state))
        for index in indices:
            self._save_best(index)
            run = self.runs[index]
            run.checkpoints.save(LATEST, run.step, parts[index], dataclasses.asdict(run.progress))
        self.last_save = time.monotonic()

    def _is_multiple_of_save_every(self, run: TrainingRun) -> bool:
        return self.options.save_every > 0 and run.step % self.options.save_every == 0

    def _save_best(self, index: int) -> None:
        """Saves the best parameters of a run if they are not in a checkpoint yet."""
        best = self.unsaved_best.pop(index, None)
        if best is not None:
            values = {name: np.asarray(value).tolist() for name, value in best.values.items()}
            self.runs[index].checkpoints.save(BEST, best.step, best.params, values)

    def _should_save_epoch(self, indices: Sequence[int], stopped: bool) -> bool:
        """Returns whether to save checkpoints at the end of an epoch of these runs."""
        return (
            stopped
            or jax.process_count() > 1
            or any(self.runs[index].progress.finished for index in indices)
            or any(self._is_multiple_of_save_every(self.runs[index]) for index in indices)
            or time.monotonic() - self.last_save >= self.options.min_save_seconds
        )

    def _train_epoch(self, state: Any, reporter: ProgressReporter) -> tuple[Any, bool]:
        """Runs the remaining steps of each run's epoch.

        Returns:
          The state, and whether a signal has stopped training. An epoch may be complete even if a
          signal has stopped training.
        """
        options = self.options
        positions = {
            index: (run.progress.epoch, run.step_in_epoch)
            for index, run in enumerate(self.runs)
            if not run.progress.finished
        }

        def put(item: tuple[Any, tuple[int, ...]]) -> tuple[Any, tuple[int, ...]]:
            return self.partitioner.put_batch(item[0]), item[1]

        for batch, active in prefetch_to_device(self.train_batches.epoch(positions), put):
            state, step_metrics = self.steps.train(state, batch)
            for index in active:
                self.runs[index].pending_metrics.append(step_metrics)
                self.runs[index].step += 1
            reporter.advance(self._headline())
            self.on_step(self._step())
            stop = should_stop(self.stop.event)
            to_save = []
            for index in active:
                run = self.runs[index]
                save = stop or self._is_multiple_of_save_every(run)
                # Reading metrics waits for the devices, so most steps do not read metrics. Every
                # save first reads metrics, so that a state with a non-finite loss is never saved.
                if len(run.pending_metrics) == options.log_every or run.is_epoch_complete or save:
                    self._write_metrics(index)
                    self._print_expected_time(reporter)
                # After the epoch's last step, `_validate` saves.
                if save and not run.is_epoch_complete:
                    to_save.append(index)
            if to_save:
                self._save(state, to_save)
            if stop:
                return state, True
        return state, False

    def _headline(self) -> str:
        best = "no best yet"
        progress = self._longest().progress
        if self.options.select_by == LAST:
            best = "last epoch counts"
        elif all(any(run.progress.best_epochs) for run in self.runs):
            best = f"best {self.options.describe(self._best_scores(), 3)}"
        return f"epoch {progress.epoch + 1}/{self.options.epochs}, {best}"

    def _longest(self) -> TrainingRun:
        """Returns the run with the most steps left; a finished run has no steps left."""
        return max(self.runs, key=lambda run: run.steps_left)

    def _best_scores(self) -> list[float]:
        return [score for run in self.runs for score in run.progress.best_scores]

    def _write_metrics(self, index: int) -> None:
        """Writes the means of a run's pending metrics, after checking that they are finite."""
        run = self.runs[index]
        read_metrics = [
            self._split(step_metrics)[index] for step_metrics in jax.device_get(run.pending_metrics)
        ]
        run.pending_metrics = []
        means = {
            name: np.mean([step_metrics[name] for step_metrics in read_metrics], axis=0)
            for name in read_metrics[0]
        }
        not_finite = [name for name, value in means.items() if not np.isfinite(value).all()]
        if not_finite:
            raise TrainingDivergedError(
                f"{run.plan.workdir}: non-finite {', '.join(not_finite)} between steps "
                f"{run.step - len(read_metrics)} and {run.step}; the best parameters of complete "
                "epochs are saved. Try a smaller config.optimizer.learning_rate or clip_norm"
            )
        scalars = self._scalars("train", means)
        run.write({**scalars, "learning_rate": float(run.learning_rates[run.step - 1])})

    def _print_expected_time(self, reporter: ProgressReporter) -> None:
        """Prints the expected time once, after some steps have been measured.

        Call this method only after metrics have been read, because reading metrics waits until the
        devices have finished the steps. The steps before the first call are not measured, because
        other programs may still be compiling.
        """
        if self.has_printed_time:
            return
        step = self._step()
        if self.first_metrics is None:
            self.first_metrics = step, time.perf_counter()
            return
        first_step, start = self.first_metrics
        seconds = time.perf_counter() - start
        if seconds < _MEASURED_SECONDS or step == first_step:
            return
        per_step = seconds / (step - first_step)
        num_steps = self._longest().steps_left
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

    def _validate(self, state: Any, reporter: ProgressReporter, stopped: bool) -> None:
        """Validates the runs whose epoch is complete, and saves checkpoints if they are due.

        Args:
          state: Training state.
          reporter: Reporter that prints the scores.
          stopped: Whether a signal has stopped training.
        """
        indices = [index for index, run in enumerate(self.runs) if run.is_epoch_complete]
        if not indices:
            return
        scores_per_run = self._validation_scores(state, indices)
        best_params, updated = None, []
        for index, values in scores_per_run.items():
            run = self.runs[index]
            run.write(self._scalars("validation", values))
            self._warn_of_one_class(run, np.atleast_1d(values["predicted_classes"]), reporter)
            scores = self.options.selection_scores(values)
            improved = run.progress.complete_epoch(scores, self.options)
            if improved.any():
                if best_params is None:
                    single_copy = self._saved_part(state)
                    params = self.steps.params_for_evaluation(
                        single_copy["params"], single_copy["opt_state"]
                    )
                    best_params = self._split(params)
                updated.append(index)
                self._update_best(
                    index, best_params[index], improved, {"epoch": run.progress.epoch, **values}
                )
        if self._should_save_epoch(indices, stopped):
            self._save(state, indices)
        else:
            # The next step donates the buffers of the state, which may contain these parameters.
            for index in updated:
                best = self.unsaved_best[index]
                self.unsaved_best[index] = dataclasses.replace(best, params=_host_copy(best.params))
        if not reporter.console.is_terminal or self._is_finished():
            reporter.print(self._describe_epoch(scores_per_run))

    def _describe_epoch(self, scores_per_run: Mapping[int, Mapping[str, Any]]) -> str:
        options = self.options
        runs = [self.runs[index] for index in scores_per_run]
        text = f"epoch {max(run.progress.epoch for run in runs)}/{options.epochs}: validation "
        if options.select_by == LAST:
            name = metrics.SCORE_NAMES[0]
            mean = np.mean([values[name] for values in scores_per_run.values()])
            return f"{text}{metrics.title(name)} {mean:.4f}"
        scores = [options.selection_scores(values) for values in scores_per_run.values()]
        epochs = [epoch for run in self.runs for epoch in run.progress.best_epochs]
        listed = ", ".join(map(str, epochs))
        if len(self.runs) > 1:
            listed = f"{min(epochs)} to {max(epochs)}"
        return (
            f"{text}{metrics.title(options.select_by)} "
            f"{options.describe(np.concatenate(scores), 4)}, best "
            f"{options.describe(self._best_scores(), 4)} (epoch {listed})"
        )

    def _update_best(
        self, index: int, params: Any, improved: np.ndarray, values: dict[str, Any]
    ) -> None:
        """Replaces the best parameters and scores of a run's improved seeds."""
        run = self.runs[index]
        values["epoch"] = multi_seed.stack_seeds([values["epoch"]] * len(self.seeds))
        if not improved.all():
            previous: tuple[Any, dict[str, Any]] | None
            if index in self.unsaved_best:
                best = self.unsaved_best[index]
                previous = best.params, best.values
            else:
                previous = run.checkpoints.restore(BEST, params)
            # Every seed improves in the first epoch, so later epochs have a best checkpoint.
            if previous is None:
                raise InputError(
                    f"{run.plan.workdir}: the best checkpoint is missing; training cannot resume "
                    "without it"
                )
            previous_params, previous_values = previous
            params = multi_seed.select_seeds(improved, params, previous_params)
            values = {
                name: np.where(improved, value, previous_values[name])
                for name, value in values.items()
            }
        self.unsaved_best[index] = _Best(run.step, params, values)

    def _warn_of_one_class(
        self, run: TrainingRun, num_predicted_classes: np.ndarray, reporter: ProgressReporter
    ) -> None:
        """Warns if a seed has predicted a single class for several epochs.

        Args:
          run: Training run to check.
          num_predicted_classes: Number of classes that each seed predicted in validation, [S].
          reporter: Reporter that prints the warning.
        """
        run.num_one_class_epochs = np.where(
            num_predicted_classes == 1, run.num_one_class_epochs + 1, 0
        )
        collapsed = np.flatnonzero(run.num_one_class_epochs == _ONE_CLASS_EPOCHS)
        if len(collapsed) and len(run.plan.task.class_names) > 1:
            title = f"{run.plan.workdir.name}, " if len(self.runs) > 1 else ""
            reporter.print(
                f"WARNING: {title}seed {', '.join(str(self.seeds[index]) for index in collapsed)} "
                f"has predicted a single class in validation for {_ONE_CLASS_EPOCHS} epochs; try "
                "config.data.standardize=speech,text, or another config.optimizer.learning_rate"
            )

    def _validation_scores(self, state: Any, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Returns the validation scores of some runs; with several seeds, they are arrays [S]."""
        sums: Any = None
        batches = self.validation_batches.epoch(dict.fromkeys(indices, (0, 0)))
        for batch in prefetch_to_device(batches, lambda item: self.partitioner.put_batch(item[0])):
            batch_sums = self.steps.eval(state, batch)
            sums = batch_sums if sums is None else jax.tree.map(jnp.add, sums, batch_sums)
        sums_per_run = self._split(jax.device_get(sums))
        return {index: self._scores(self.runs[index], sums_per_run[index]) for index in indices}

    def _scores(self, run: TrainingRun, sums: Any) -> dict[str, Any]:
        """Computes the validation scores of a run's seeds."""
        scores_per_seed = []
        for seed_sums in multi_seed.unstack_seeds(sums, len(self.seeds)):
            confusion = seed_sums["confusion"]
            scores = metrics.classification_scores(confusion, run.plan.task.class_names)
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
    """Returns the mean absolute error "mae" of the predicted scores, or an empty dict."""
    if "score_error" not in sums:
        return {}
    return {"mae": float(sums["score_error"]) / max(1, int(sums["scored"]))}


def _import_slow_packages() -> None:
    """Imports packages that training needs later, while XLA compiles in another thread."""
    import_tensorflow()
    if jax.process_index() == 0:
        importlib.import_module("matplotlib.figure")


def _host_copy(tree: Any) -> Any:
    # On CPU, `device_get` may return a view of the device's buffer.
    return jax.tree.map(np.array, jax.device_get(tree))


@contextlib.contextmanager
def _background_executor() -> Iterator[concurrent.futures.Executor]:
    """Yields an executor; jobs that have not started by the end are canceled."""
    executor = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="compile")
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
