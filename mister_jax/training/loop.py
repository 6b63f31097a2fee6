"""The one training loop: every training of the project is a task run through it.

A run is a work directory. Started again it goes on from its latest checkpoint and ends with the
same parameters as if it had never stopped. It sees the training and the validation split, and no
other. It trains one seed or several side by side, each with its own best epoch.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import mister_jax
from mister_jax import metrics, multi_seed
from mister_jax.checkpoint import BEST, LATEST, Checkpoints
from mister_jax.console import ProgressReporter, parameter_table
from mister_jax.data import prefetch_to_device
from mister_jax.errors import InputError
from mister_jax.io import read_json, write_json, write_text
from mister_jax.metrics import mean_and_deviation
from mister_jax.optim import OptimizerConfig, make_optimizer, params_for_evaluation
from mister_jax.parallel.memory import explain_oom
from mister_jax.parallel.multihost import assert_visible_to_all_processes
from mister_jax.parallel.partitioning import (
    CompiledStep,
    ParallelConfig,
    Partitioner,
    make_partitioner,
)
from mister_jax.tasks import Split, Task, config_seeds, dataclass_from_config, task_class
from mister_jax.training.curves import plot_training_curves
from mister_jax.training.metric_writer import MetricWriter
from mister_jax.training.steps import initial_state, make_eval_step, make_train_step

# Parts of the config that a resumed run may change: they move no parameter.
_FREE = ("data.data_dir", "train.log_every", "train.save_every", "parallel")
# Epochs with one predicted class after which a training warns.
_ONE_CLASS_EPOCHS = 3
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections")


class TrainingDiverged(InputError):
    """The loss or the gradient is no longer finite."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long a training runs, and how often it speaks and saves.

    Attributes:
      epochs: passes over the training split.
      patience: epochs without a better validation weighted F1 after which it stops; 0 never stops.
        Of several seeds one that would have stopped keeps its best; the training ends with the
        last.
      log_every: steps between two records of the training loss.
      save_every: steps between two saved states beside those at the end of each epoch; 0 for none.
      accumulation: parts of each device's rows that go through the model one after the other; 1
        for tasks whose loss is not a sum over rows.
    """

    epochs: int
    patience: int = 0
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


@dataclasses.dataclass
class TrainProgress:
    """Where a training stands; saved beside its state.

    Attributes:
      best_scores: greatest validation weighted F1 of each seed; -1 before the first validation.
      best_epochs: after which they were reached, counted from 1.
      epoch: of the next step.
      finished: nothing is left to do.
    """

    best_scores: list[float]
    best_epochs: list[int]
    epoch: int = 0
    finished: bool = False

    def waiting(self, patience: int) -> np.ndarray:
        """The seeds that may still get better [S] bool."""
        stale = self.epoch - np.array(self.best_epochs)
        return (stale < patience) | (patience == 0)


def train(config: ConfigDict, workdir: epath.PathLike, *, quiet: bool = False) -> TrainProgress:
    """Trains what the config says, from the start or from where the work directory stands.

    Args:
      config: of the experiment.
      workdir: made if it is not there.
      quiet: show no progress.

    Returns:
      Where the training ended; `finished` is false after SIGTERM.

    Raises:
      InputError: a config, dataset or work directory that cannot be used, or a batch that does not
        fit into the devices' memory.
      TrainingDiverged: the loss is not finite; the last good state is kept.
    """
    workdir = epath.Path(workdir)
    options = dataclass_from_config(TrainConfig, config.train, "config.train")
    parallel = dataclass_from_config(ParallelConfig, config.parallel, "config.parallel")
    optimizer_config = dataclass_from_config(OptimizerConfig, config.optimizer, "config.optimizer")
    check_workdir(config, workdir)
    chosen = config_seeds(config)
    task = task_class(config).from_data(config)
    partitioner = make_partitioner(parallel, task.rules)
    training = task.split("train", num_shards=partitioner.num_shards, shuffle=True)
    validation = task.split("validation", num_shards=partitioner.num_shards, shuffle=False)
    content = {
        "train": {"fingerprint": training.fingerprint(), "steps_per_epoch": training.steps},
        "validation": {"fingerprint": validation.fingerprint()},
    }
    check_data(content, config.data.name, workdir)
    total_steps = options.epochs * training.steps
    transformation = make_optimizer(optimizer_config, total_steps)
    rows, length = max((*training.shapes, *validation.shapes), key=math.prod)
    with explain_oom(
        str(workdir),
        f"batches of up to {rows} x {length} on {jax.device_count()} devices",
        task.oom_hint,
    ):
        graph, state = _initial_state(task, transformation, chosen, partitioner)
        if jax.process_index() == 0:
            first = multi_seed.unstack_seeds(state["params"], len(chosen))[0]
            describe(workdir, config, task, first, content)
        assert_visible_to_all_processes(workdir / "config.json")
        step = make_train_step(task, graph, transformation, options.accumulation)
        judge = make_eval_step(task, graph)
        loop = _Loop(
            workdir=workdir,
            options=options,
            seeds=chosen,
            task=task,
            partitioner=partitioner,
            training=training,
            validation=validation,
            step=partitioner.compile_step(multi_seed.vmap_over_seeds(step, len(chosen))),
            judge=partitioner.compile_eval(multi_seed.vmap_over_seeds(judge, len(chosen))),
            rate=optimizer_config.make_schedule(total_steps),
        )
        with Checkpoints(workdir) as checkpoints, terminated() as stop:
            return loop.run(state, checkpoints, stop, quiet)


def _initial_state(
    task: Task, transformation: Any, chosen: Sequence[int], partitioner: Partitioner
) -> tuple[Any, Any]:
    """The model's graph, and the joined states of the seeds."""

    def make(key: jax.Array) -> Any:
        return task.load(key, partitioner)

    made = [
        initial_state(task, transformation, seed, trainable=task.trainable, make=make)
        for seed in chosen
    ]
    return made[0][0], multi_seed.stack_seeds([state for _, state in made])


@dataclasses.dataclass
class _Loop:
    """What the loop works with; `run` is the loop."""

    workdir: epath.Path
    options: TrainConfig
    seeds: tuple[int, ...]
    task: Task
    partitioner: Partitioner
    training: Split
    validation: Split
    step: CompiledStep
    judge: CompiledStep
    rate: optax.Schedule
    one_class_epochs: Any = 0
    """Epochs in a row in which each seed has predicted one class [S]."""

    def run(
        self, state: Any, checkpoints: Checkpoints, stop: threading.Event, quiet: bool
    ) -> TrainProgress:
        options, steps = self.options, self.training.steps
        state = self.partitioner.put_state(state)
        progress = TrainProgress([-1.0] * len(self.seeds), [0] * len(self.seeds))
        restored = checkpoints.restore(LATEST, self._saved(state))
        if restored is not None:
            state = {**state, **self.partitioner.put_state(restored[0])}
            progress = TrainProgress(**restored[1])
        done = self._done(state)
        writer = MetricWriter(self.workdir, done)
        reporter = ProgressReporter(options.epochs * steps, completed=done, quiet=quiet)
        try:
            with reporter:
                if progress.finished:
                    reporter.print(f"{self.workdir} is finished; nothing to do")
                elif restored is not None:
                    reporter.print(f"resuming {self.workdir} at step {done}")
                else:
                    for note in self.task.notes:
                        reporter.print(note)
                if not progress.finished:
                    self._compile(state, reporter)
                while not progress.finished:
                    first = self._done(state) - progress.epoch * steps
                    state, stopped = self._epoch(
                        state, progress, first, checkpoints, stop, writer, reporter
                    )
                    if stopped:
                        reporter.print(
                            f"stopped by SIGTERM; the state of step {self._done(state)} is saved, "
                            "start again to go on"
                        )
                        break
                    self._validate(state, progress, checkpoints, writer, reporter)
        finally:
            writer.close()
        if progress.finished and jax.process_index() == 0:
            plot_training_curves(self.workdir / "metrics.jsonl", self.workdir / "curves.png")
        return progress

    def _compile(self, state: Any, reporter: ProgressReporter) -> None:
        """Compiles for every shape of batch before the first step, side by side."""
        work = []
        for program, split in ((self.step, self.training), (self.judge, self.validation)):
            shapes = {
                tuple(value.shape for value in batch.values()): batch for batch in split.batches()
            }
            work += [(program, self.partitioner.put_batch(batch)) for batch in shapes.values()]
        reporter.print(f"compiling {len(work)} programs")
        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for job in [pool.submit(program.compile, state, batch) for program, batch in work]:
                job.result()
        reporter.print(f"compiled in {time.perf_counter() - started:.0f} s")

    def _saved(self, state: Any) -> Any:
        """The single copy of what changes in a training."""
        changing = {name: value for name, value in state.items() if name != "frozen"}
        return self.partitioner.get_state(changing)

    def _done(self, state: Any) -> int:
        return int(np.ravel(self.partitioner.get_state(state["step"]))[0])

    def _save(
        self, state: Any, progress: TrainProgress, checkpoints: Checkpoints, done: int
    ) -> None:
        checkpoints.save(LATEST, done, self._saved(state), dataclasses.asdict(progress))

    def _epoch(
        self,
        state: Any,
        progress: TrainProgress,
        first: int,
        checkpoints: Checkpoints,
        stop: threading.Event,
        writer: MetricWriter,
        reporter: ProgressReporter,
    ) -> tuple[Any, bool]:
        """Takes the epoch's steps from its `first` on; true beside the state if told to stop."""
        options, steps = self.options, self.training.steps
        done = progress.epoch * steps + first
        unread: list[Any] = []
        batches = self.training.batches(progress.epoch, first)
        for batch in prefetch_to_device(batches, self.partitioner.put_batch):
            state, step_metrics = self.step(state, batch)
            unread.append(step_metrics)
            done += 1
            reporter.advance(self._headline(progress))
            last = done % steps == 0
            stopped = _stop_together(stop, done)
            saving = stopped or (options.save_every and done % options.save_every == 0)
            # Reading waits for the devices, so it is done seldom; always before a save, so that no
            # state is saved whose loss was not seen to be finite.
            if len(unread) == options.log_every or last or saving:
                self._record(unread, done, writer)
                unread = []
            if saving and not last:
                self._save(state, progress, checkpoints, done)
            if stopped and not last:
                return state, True
        return state, False

    def _headline(self, progress: TrainProgress) -> str:
        reached = f"best {_told(progress.best_scores, 3)}"
        best = reached if any(progress.best_epochs) else "no best yet"
        return f"epoch {progress.epoch + 1}/{self.options.epochs}, {best}"

    def _record(self, unread: list[Any], done: int, writer: MetricWriter) -> None:
        """Reads the metrics of some steps, checks that they are finite, writes their means."""
        read = jax.device_get(unread)
        means = {name: np.mean([step[name] for step in read], axis=0) for name in read[0]}
        bad = [name for name, value in means.items() if not np.isfinite(value).all()]
        if bad:
            raise TrainingDiverged(
                f"{self.workdir}: {', '.join(bad)} not finite between steps {done - len(read)} and "
                f"{done}; the last good state is kept. Allowed are finite losses: try a smaller "
                "config.optimizer.learning_rate or clip_norm"
            )
        scalars = self._scalars("train", means)
        writer(done, {**scalars, "learning_rate": float(self.rate(done - 1))})

    def _scalars(self, part: str, values: dict[str, np.ndarray]) -> dict[str, float]:
        """Named as they are written: the mean of the seeds; of several seeds each, too."""
        found = {f"{part}/{name}": float(np.mean(value)) for name, value in values.items()}
        if len(self.seeds) > 1:
            for seed, own in zip(
                self.seeds, multi_seed.unstack_seeds(values, len(self.seeds)), strict=True
            ):
                found |= {f"{part}/{name}/seed_{seed}": float(own[name]) for name in own}
        return found

    def _validate(
        self,
        state: Any,
        progress: TrainProgress,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        reporter: ProgressReporter,
    ) -> None:
        """Scores the validation split at the end of an epoch; keeps the best, saves the latest."""
        done = self._done(state)
        options, count = self.options, len(self.seeds)
        found = self._validation_scores(state)
        writer(done, self._scalars("validation", found))
        self._warn_of_one_class(np.atleast_1d(found["predicted_classes"]), reporter)
        scores = np.atleast_1d(found["weighted_f1"])
        waiting = progress.waiting(options.patience)
        progress.epoch += 1
        # A tie goes to the later epoch: on a small validation split scores repeat, and the later
        # parameters have seen more updates at a lower learning rate.
        better = waiting & (scores >= progress.best_scores)
        progress.best_scores = np.where(better, scores, progress.best_scores).tolist()
        progress.best_epochs = np.where(better, progress.epoch, progress.best_epochs).tolist()
        if better.any():
            single = self._saved(state)
            params = params_for_evaluation(single["params"], single["opt_state"])
            told = {"epoch": multi_seed.stack_seeds([progress.epoch] * count), **found}
            if not better.all():
                before = checkpoints.restore(BEST, params)
                if before is None:  # In the first epoch all are better.
                    raise InputError(
                        f"{self.workdir}: no best checkpoint; it was there and is needed to go on"
                    )
                params = multi_seed.select_seeds(better, params, before[0])
                told = {name: np.where(better, told[name], before[1][name]) for name in told}
            told = {name: np.asarray(value).tolist() for name, value in told.items()}
            checkpoints.save(BEST, done, params, told)
        last = progress.epoch == options.epochs
        progress.finished = last or not progress.waiting(options.patience).any()
        self._save(state, progress, checkpoints, done)
        if not reporter.console.is_terminal or progress.finished:
            reporter.print(
                f"epoch {progress.epoch}/{options.epochs}: validation weighted F1 "
                f"{_told(scores, 4)}, best {_told(progress.best_scores, 4)} "
                f"(epoch {', '.join(map(str, progress.best_epochs))})"
            )

    def _warn_of_one_class(self, predicted_classes: np.ndarray, reporter: ProgressReporter) -> None:
        """Warns once if a seed has predicted one class for several epochs.

        Args:
          predicted_classes: Number of classes that each seed predicts on the validation split [S].
          reporter: Where the warning goes.
        """
        self.one_class_epochs = np.where(predicted_classes == 1, self.one_class_epochs + 1, 0)
        stuck = np.flatnonzero(self.one_class_epochs == _ONE_CLASS_EPOCHS)
        if len(stuck) and len(self.task.class_names) > 1:
            reporter.print(
                f"WARNING: seed {', '.join(str(self.seeds[index]) for index in stuck)} has "
                f"predicted one class for all of validation in {_ONE_CLASS_EPOCHS} epochs; try "
                "config.data.standardize=speech,text, or another config.optimizer.learning_rate"
            )

    def _validation_scores(self, state: Any) -> dict[str, Any]:
        """Scores of the validation split; of several seeds, arrays of them."""
        sums: Any = None
        for batch in prefetch_to_device(self.validation.batches(), self.partitioner.put_batch):
            found = self.judge(state, batch)
            sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
        rows = []
        for own in multi_seed.unstack_seeds(jax.device_get(sums), len(self.seeds)):
            scores = metrics.scores(own["confusion"], self.task.class_names)
            mean_loss = float(own["cross_entropy"]) / scores["utterances"]
            kept = {name: scores[name] for name in metrics.SCORE_NAMES}
            num_predicted = int(np.count_nonzero(own["confusion"].sum(0)))
            rows.append({**kept, "cross_entropy": mean_loss, "predicted_classes": num_predicted})
        return multi_seed.stack_seeds(rows)


def _told(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """A number, or the mean and the deviation of several."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + (f" +- {deviation:.{digits}f}" if len(values) > 1 else "")


@contextlib.contextmanager
def terminated() -> Iterator[threading.Event]:
    """An event that SIGTERM sets while the context is open, if this process is alone."""
    event = threading.Event()
    # In a job of several JAX listens for the signal, and a handler here would replace its own.
    alone = jax.process_count() == 1
    if not alone or threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop_together(stop: threading.Event, done: int) -> bool:
    """Whether to stop at this step; all processes of a job answer alike.

    A SIGTERM to one of several processes stops all, after the same step.
    """
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(done):
        stop.set()
    return stop.is_set()


def check_workdir(config: ConfigDict, workdir: epath.Path) -> None:
    """Raises InputError if the work directory belongs to another experiment."""
    path = workdir / "config.json"
    if not path.exists():
        return
    changed = _changes(_plain(read_config(workdir)), _plain(config))
    if changed:
        raise InputError(
            f"{workdir}: made with another config ({changed}); use its config, or another workdir"
        )


def check_data(content: Mapping[str, Any], name: str, workdir: epath.Path) -> None:
    """Raises InputError if the work directory was made with other data of the same name.

    Args:
      content: of the splits, as `describe` writes it.
      name: of the dataset.
      workdir: of the training.
    """
    path = workdir / "data.json"
    if not (workdir / "config.json").exists() or not path.exists():
        return
    changed = _changes(read_json(path), content)
    if changed:
        raise InputError(
            f"{workdir}: made with other data than dataset {name} has now ({changed}); use what it "
            "was made with, or another workdir"
        )


def _changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What differs between two nested mappings, but for `_FREE`; empty if nothing does."""
    theirs, ours = _flat(theirs), _flat(ours)
    return ", ".join(
        f"{name} {theirs.get(name)} -> {ours.get(name)}"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name) and not name.startswith(_FREE)
    )


def read_config(workdir: epath.PathLike) -> ConfigDict:
    """The config a work directory was made with.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; the workdir must be one that training has made")
    try:
        return ConfigDict(read_json(path))
    except InputError:
        raise
    except ValueError as error:  # such as a dot in a name
        raise InputError(f"{path}: not a readable config ({error})") from error


def _plain(config: ConfigDict) -> dict[str, Any]:
    """As JSON has it: lists for tuples."""
    plain: dict[str, Any] = json.loads(config.to_json_best_effort())
    return plain


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names to values."""
    pairs = jax.tree_util.tree_flatten_with_path(
        values, is_leaf=lambda value: not isinstance(value, dict)
    )[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in pairs}


def describe(
    workdir: epath.Path,
    config: ConfigDict,
    task: Task,
    params: Any,
    content: Mapping[str, Any],
) -> None:
    """Writes what a work directory is: its config, model, parameters, data, package versions.

    Args:
      workdir: of the training; made if it is not there.
      config: of the experiment.
      task: of it.
      params: of one seed.
      content: by split what tells that a training goes on with the data it began with: the
        "fingerprint", and of the training split "steps_per_epoch".
    """
    workdir.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    device = jax.devices()[0]
    write_json(
        workdir / "versions.json",
        {
            "mister_jax": mister_jax.__version__,
            "python": platform.python_version(),
            **versions,
            "backend": device.platform,
            "device": device.device_kind,
            "devices": jax.device_count(),
        },
    )
    write_text(workdir / "parameters.txt", parameter_table(params))
    write_json(workdir / "model.json", task.description())
    write_json(workdir / "data.json", content)
    # Last: a work directory with a config has all the rest.
    write_json(workdir / "config.json", _plain(config))
